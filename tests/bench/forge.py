"""The forge and the bench of kernels: how many per minute, and what they take from a training run next door."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable

import torch

from esper_core.blueprint.interface import Layout, SlotInterface
from esper_core.bus import subjects
from esper_core.pb.esper.core.v1 import blueprint_pb2, kernel_pb2
from esper_core.pb.esper.urza.v1 import urza_pb2
from esper_core.rpc.client import open_channel
from esper_core.rpc.convert import to_proto
from services.child import WarmChild
from services.sandbox import Limits
from services.tezzeret.assortment import assortment
from tests.bench.bench import Pace, Table
from tests.bench.driver import FORGE, Driver, driving, jobs
from tests.bench.figures import Row, Sample, ratio_row
from tests.bench.ground import visit
from tests.bench.nets import FAMILIES, adam, fresh, step_of
from tests.service.platform import STUBS, Stage, registration

WINDOW = 0.5
"""Seconds of training between two switches of the forge."""
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
    rounds = pace.rounds(12, 2)
    with driving() as driver:
        pairs = []
        for threads in (1,) if pace.quick else (1, 2):
            pace.say(f"training on {threads} threads beside the forge")
            pairs.append(_beside(driver, threads, rounds))
        quiet = _undisturbed(driver, rounds)
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
            [row for row, _ in pairs],
            (
                f"Windows of {WINDOW} s in turn, wall clock: the ratio is of seconds per step. The forge runs at the lowest "
                "priority on one thread.",
            ),
        ),
        Table("What the forge gets done meanwhile", [*(row for _, row in pairs), quiet]),
    ]


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


def _beside(driver: Driver, threads: int, rounds: int) -> tuple[Row, Row]:
    """Steps with and without the forge at work, and what the forge got done meanwhile."""
    family = FAMILIES[1]
    model = fresh(family)
    step = step_of(model, adam(model), family.rows(64))
    torch.set_num_threads(threads)
    try:
        _train(step, WINDOW)
        busy, idle, rates = [], [], []
        for number in range(rounds):
            for working in (True, False) if number % 2 else (False, True):
                if not working:
                    idle.append(_train(step, WINDOW))
                    continue
                driver.work()
                busy.append(_train(step, WINDOW))
                rates.append(driver.rest())
    finally:
        torch.set_num_threads(1)
    what = f"on {threads} thread{'s' if threads > 1 else ''}"
    return (
        ratio_row(f"CNN, batch 64, {what}", busy, idle),
        Sample(tuple(rates)).row(f"builds beside training {what}", "per second"),
    )


def _undisturbed(driver: Driver, rounds: int) -> Row:
    rates = []
    for _ in range(rounds):
        driver.work()
        time.sleep(WINDOW)
        rates.append(driver.rest())
    return Sample(tuple(rates)).row("builds with nobody training", "per second")


def _train(step: Callable[[], None], seconds: float) -> float:
    """Train for ``seconds``; wall seconds per step."""
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        step()
        steps += 1
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
