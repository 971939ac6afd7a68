"""The forge and the bench of kernels: how many per minute, and what they take from a training run next door."""

from __future__ import annotations

import asyncio
import secrets
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from esper_core.blueprint.catalogue import catalogue
from esper_core.blueprint.interface import Layout, SlotInterface
from esper_core.bus import subjects
from esper_core.pb.esper.core.v1 import blueprint_pb2, kernel_pb2
from esper_core.pb.esper.urza.v1 import urza_pb2
from esper_core.rpc.client import open_channel
from esper_core.rpc.convert import to_proto
from services.child import WarmChild
from services.sandbox import Limits
from services.tezzeret.assortment import assortment
from services.tezzeret.builds import Wish
from tests.bench.bench import Pace, Table
from tests.bench.figures import Row, Sample
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
    alone, beside, built = pace.ground.run(_children(pace))
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
            beside,
            (
                f"Windows of {WINDOW} s in turn, wall clock: the ratio is of steps per second. The forge runs at the lowest "
                "priority on one thread.",
            ),
        ),
        Table("What the forge gets done meanwhile", built),
    ]


def _wishes() -> list[Wish]:
    slot = SlotInterface(
        layout=Layout.FEATURES, in_width=64, out_width=64, hidden_width=64, activation="relu", foldable=True
    )
    return assortment(slot)


def _job(wish: Wish, blob: Path, seed: int) -> dict[str, Any]:
    designs = {ir.id: ir for ir in catalogue().values()}
    return {
        "do": "forge",
        "blueprint": designs[wish.blueprint_id].model_dump(mode="json"),
        "interface": wish.interface.model_dump(mode="json"),
        "symbols": dict(wish.symbols),
        "pipeline": wish.pipeline,
        "seed": seed,
        "blob": str(blob),
    }


async def _children(pace: Pace) -> tuple[list[Row], list[Row], list[Row]]:
    forge, judge = WarmChild("services.tezzeret.forge", Limits()), WarmChild("services.urabrask.bench", Limits())
    try:
        pace.say("builds and evaluations by warm children")
        alone = await _alone(forge, judge, pace.rounds(24, 8))
        beside, built = [], []
        for threads in (1, 2):
            pace.say(f"training on {threads} threads beside the forge")
            row, rates = await _beside(forge, threads, pace.rounds(12, 3))
            beside.append(row)
            built += rates
        torch.set_num_threads(1)
        return alone, beside, built
    finally:
        await forge.close()
        await judge.close()


async def _alone(forge: WarmChild, judge: WarmChild, rounds: int) -> list[Row]:
    wishes, builds, evaluations = _wishes(), [], []
    starts = []
    for number in range(rounds + 1):
        blob = forge.scratch / "kernel"
        began = time.perf_counter()
        answer = await forge.ask(_job(wishes[number % len(wishes)], blob, number))
        build = time.perf_counter() - began
        began = time.perf_counter()
        for phase in ("safety", "benchmark"):
            told = await judge.ask({"do": phase, "manifest": answer["manifest"], "blob": str(blob)})
            if "unfit" in told:
                raise RuntimeError(f"{wishes[number % len(wishes)].blueprint_name}: {told['unfit']}")
        evaluation = time.perf_counter() - began
        if number:
            builds.append(build)
            evaluations.append(evaluation)
        else:
            starts = [build, evaluation]
    per_minute = [60 / (a + b) for a, b in zip(builds, evaluations, strict=True)]
    return [
        Sample((starts[0],)).row("first build, child started cold", "s"),
        Sample(tuple(builds)).row("a build", "ms", 1e3),
        Sample(tuple(60 / seconds for seconds in builds)).row("builds", "per minute"),
        Sample((starts[1],)).row("first evaluation, child started cold", "s"),
        Sample(tuple(evaluations)).row("an evaluation, safety and benchmark", "ms", 1e3),
        Sample(tuple(per_minute)).row("built and evaluated one after the other", "per minute"),
    ]


async def _beside(forge: WarmChild, threads: int, rounds: int) -> tuple[Row, list[Row]]:
    """Steps per second with and without the forge at work, and builds per second with and without training."""
    family = FAMILIES[1]
    model = fresh(family)
    step = step_of(model, adam(model), family.rows(64))
    busy, idle, during = [], [], []
    await asyncio.to_thread(_train, step, threads, WINDOW)
    for number in range(rounds):
        for working in (True, False) if number % 2 else (False, True):
            stop = asyncio.Event()
            work = asyncio.create_task(_forging(forge, stop)) if working else None
            if work:
                await asyncio.sleep(0)
            rate = await asyncio.to_thread(_train, step, threads, WINDOW)
            stop.set()
            (busy if working else idle).append(1 / rate)
            if work:
                during.append(await work)
    quiet = []
    for _ in range(rounds):
        stop = asyncio.Event()
        work = asyncio.create_task(_forging(forge, stop))
        await asyncio.sleep(WINDOW)
        stop.set()
        quiet.append(await work)
    ratios = Sample(tuple(a / b for a, b in zip(busy, idle, strict=True)))
    what = f"CNN, batch 64, on {threads} thread{'s' if threads > 1 else ''}"
    row: Row = {
        "what": what,
        "n": rounds,
        "ratio": ratios.median,
        "q1": ratios.quantile(0.25),
        "q3": ratios.quantile(0.75),
        "ms beside": statistics.median(busy) * 1e3,
        "ms alone": statistics.median(idle) * 1e3,
    }
    return row, [
        Sample(tuple(during)).row(f"builds beside training on {threads}", "per second"),
        Sample(tuple(quiet)).row("builds with nobody training", "per second"),
    ]


def _train(step: Callable[[], None], threads: int, seconds: float) -> float:
    """Train for ``seconds``; steps per second."""
    torch.set_num_threads(threads)
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        step()
        steps += 1
    return steps / (time.perf_counter() - began)


async def _forging(forge: WarmChild, stop: asyncio.Event) -> float:
    """Build until told to stop, finishing what was begun; builds per second."""
    wishes, began, done = _wishes(), time.perf_counter(), 0
    while not stop.is_set():
        await forge.ask(_job(wishes[done % len(wishes)], forge.scratch / "kernel", done))
        done += 1
    return done / (time.perf_counter() - began)


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
