"""The forge and the bench of kernels: how many per minute, and what they take from a training run next door."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from esper_core.blueprint.interface import Layout, SlotInterface
from esper_core.bus import subjects
from esper_core.pb.esper.core.v1 import blueprint_pb2, kernel_pb2
from esper_core.pb.esper.urza.v1 import urza_pb2
from esper_core.rpc.client import open_channel
from esper_core.rpc.convert import to_proto
from services.child import WarmChild
from services.pace import SHARE
from services.sandbox import Limits
from services.tezzeret.assortment import assortment
from tests.bench.bench import Pace, Table
from tests.bench.device import settled
from tests.bench.driver import FORGE, driving, jobs
from tests.bench.figures import Row, Sample, ratio_row
from tests.bench.ground import visit
from tests.bench.nets import FAMILIES, adam, fresh, step_of
from tests.service.platform import STUBS, Stage, registration

WINDOW = 4.0
"""Seconds of training between two switches of the forge: some builds long, however small the slices."""
WARM_UP = 6.0
"""Seconds beside the trainer in which a polite forge spends what it has saved."""
PATIENCE = 120.0


def run(pace: Pace) -> list[Table]:
    endpoints = pace.ground.platform()

    async def through() -> Row:
        async with visit(endpoints) as stage:
            return await _through_the_platform(stage)

    pace.say("a new interface through the whole platform")
    whole = pace.ground.run(through())
    pace.say("builds and evaluations by warm children")
    alone = pace.ground.run(_alone(pace.rounds(24, 8)))
    rounds = pace.rounds(5, 1)
    steps, builds = [], []
    for case in _cases(pace.quick):
        pace.say(f"training beside the forge, {case.name}")
        found, meanwhile = _beside(case, rounds, pace.device)
        steps += found
        builds += meanwhile
    return [
        Table(
            "Warm children",
            alone,
            ("Catalogue blueprints for a 64-64-64 slot, in turn; forged with parity check and packed; wall clock.",),
        ),
        Table(
            "From RunRegistered to every kernel judged",
            [whole],
            (
                "One new interface: ordered, built, signed, stored, streamed, measured, signed, told; children started cold.",
            ),
        ),
        Table(
            "Training step while the forge works next door / while it does not",
            steps,
            (
                f"CNN, batch 64. Windows of {WINDOW} s in turn, two without the forge for one with it, wall clock: the ratio is of "
                "seconds per step. 'at rest again' is the noise floor: one window without against the other.",
                "A core each: trainer and forge are each kept to one core of their own. One core: both are kept to the same. Nobody "
                "kept: the system places them. Priority alone: the forge has one thread at the lowest priority and no manners; polite: "
                f"as the platform runs it, which also keeps it to {SHARE:.0%} of a core while none is free; its savings were spent "
                "before.",
            ),
        ),
        Table(
            "Kernels finished meanwhile",
            builds,
            ("Pipeline standard. Only what was finished within the window counts.",),
        ),
    ]


@dataclass(frozen=True)
class Case:
    """Who may run where.

    Attributes:
        place: for tables.
        polite: whether the forge gives way, or has nothing but its priority.
        threads: of the trainer.
        trainer, forge: cores each is kept to; empty for any.
    """

    place: str
    polite: bool
    threads: int = 1
    trainer: frozenset[int] = frozenset()
    forge: frozenset[int] = frozenset()

    @property
    def name(self) -> str:
        return f"{self.place}, {'polite' if self.polite else 'priority alone'}"


def _cases(quick: bool) -> list[Case]:
    """A core to spare, none to spare, and what happens when nobody is kept anywhere; before and after manners."""
    loose = [Case("nobody kept, 2 threads", polite, threads=2) for polite in (False, True)]
    if not hasattr(os, "sched_setaffinity"):
        return loose[1:] if quick else loose
    cores = sorted(os.sched_getaffinity(0))
    first, last = frozenset(cores[:1]), frozenset(cores[-1:])
    both = [Case("one core for both", polite, 1, first, first) for polite in (False, True)]
    apart = [Case("a core each", polite, 1, first, last) for polite in (False, True)] if len(cores) > 1 else []
    return [*apart[1:], both[1]] if quick else [*apart, *both, *loose]


async def _alone(rounds: int) -> list[Row]:
    forge, judge = WarmChild(FORGE, Limits()), WarmChild("services.urabrask.bench", Limits())
    builds, evaluations = [], []
    try:
        blob = forge.scratch / "kernel"
        orders = jobs(blob)
        for number in range(rounds + 1):
            began = time.perf_counter()
            answer = await forge.ask(orders[number % len(orders)])
            builds.append(time.perf_counter() - began)
            began = time.perf_counter()
            for phase in ("safety", "benchmark"):
                told = await judge.ask({"do": phase, "manifest": answer["manifest"], "blob": str(blob)})
                if "unfit" in told:
                    raise RuntimeError(f"a catalogue kernel is unfit: {told['unfit']}")
            evaluations.append(time.perf_counter() - began)
    finally:
        await forge.close()
        await judge.close()
    both = tuple(60 / (a + b) for a, b in zip(builds[1:], evaluations[1:], strict=True))
    return [
        Sample((builds[0],)).row("first build, child started cold", "s"),
        Sample(tuple(builds[1:])).row("a build", "ms", 1e3),
        Sample(tuple(60 / seconds for seconds in builds[1:])).row("builds", "per minute"),
        Sample((evaluations[0],)).row("first evaluation, child started cold", "s"),
        Sample(tuple(evaluations[1:])).row("an evaluation, safety and benchmark", "ms", 1e3),
        Sample(both).row("built and evaluated one after the other", "per minute"),
    ]


def _beside(case: Case, rounds: int, device: str) -> tuple[list[Row], list[Row]]:
    """Steps with the forge at work against without, and what the forge got done meanwhile against alone."""
    family = FAMILIES[1].on(device)
    model = fresh(family)
    step = step_of(model, adam(model), family.rows(64))
    windows: dict[str, list[float]] = {"working": [], "rest": [], "again": []}
    beside, alone = [], []
    with _kept(case), driving(case.forge, polite=case.polite) as driver:
        driver.work()
        _train(step, WARM_UP, device)
        driver.rest()
        for number in range(rounds):
            turned = [*windows][number % 3 :] + [*windows][: number % 3]
            for name in turned if number % 2 else reversed(turned):
                if name == "working":
                    driver.work()
                windows[name].append(_train(step, WINDOW, device))
                if name == "working":
                    beside.append(driver.rest())
        for _ in range(rounds):  # not between the others: a polite forge saves up while nobody trains
            driver.work()
            time.sleep(WINDOW / 2)
            alone.append(driver.rest())
    return (
        [
            ratio_row(f"{case.name}: the forge at work", windows["working"], windows["rest"]),
            ratio_row(f"{case.name}: at rest again", windows["again"], windows["rest"]),
        ],
        [
            Sample(tuple(beside)).row(f"{case.name}: beside training", "per minute", 60),
            Sample(tuple(alone)).row(f"{case.name}: nobody training", "per minute", 60),
        ],
    )


@contextlib.contextmanager
def _kept(case: Case) -> Iterator[None]:
    """The trainer, this thread, on its cores with its threads."""
    cores = os.sched_getaffinity(0) if case.trainer else set()
    torch.set_num_threads(case.threads)
    if case.trainer:
        os.sched_setaffinity(0, case.trainer)
    try:
        yield
    finally:
        torch.set_num_threads(1)
        if case.trainer:
            os.sched_setaffinity(0, cores)


def _train(step: Callable[[], None], seconds: float, device: str) -> float:
    """Train for ``seconds``; wall seconds per step."""
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        step()
        steps += 1
    settled(device)
    return (time.perf_counter() - began) / steps


async def _through_the_platform(stage: Stage) -> Row:
    run_id = f"bench-{secrets.token_hex(4)}"
    slot = SlotInterface(
        layout=Layout.FEATURES,
        in_width=60 + secrets.randbelow(1000),
        out_width=48,
        hidden_width=3,
        activation="relu",
        foldable=True,
    )
    message = registration(run_id)
    message.run.slots[0].interface.CopyFrom(to_proto(slot, blueprint_pb2.SlotInterface))
    wanted = len(assortment(slot))
    channel = open_channel(stage.endpoints.grpc_address, tls_dir=stage.endpoints.tls_dir, principal="operator")
    try:
        library = STUBS["urza"](channel)
        began = time.perf_counter()
        await stage.send(subjects.RUN_EVENTS, stage.seal(message, run_id))
        first = 0.0
        request = urza_pb2.QueryKernelsRequest(
            interface_id=slot.id, status=kernel_pb2.KERNEL_STATUS_VALIDATED, page_size=100
        )
        async with asyncio.timeout(PATIENCE):
            while True:
                found = len((await library.QueryKernels(request)).kernels)
                first = first or (time.perf_counter() - began if found else 0.0)
                if found >= wanted:
                    break
                await asyncio.sleep(0.1)
        seconds = time.perf_counter() - began
    finally:
        await channel.close()
        await stage.end(run_id)
    return {
        "what": f"{wanted} kernels for one slot",
        "first s": first,
        "all s": seconds,
        "kernels per minute": 60 * wanted / seconds,
    }
