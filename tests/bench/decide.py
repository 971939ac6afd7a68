"""How long a decision takes: Tamiyo.Step over mutual TLS, recorded in PostgreSQL, and the policy by itself."""

from __future__ import annotations

import asyncio
import secrets
import time

from esper_core.blueprint.interface import SlotInterface
from esper_core.control.heuristic import HeuristicPolicy
from esper_core.control.packet import GrowthSignal, HealthSignal, KernelCandidate, SlotState, SystemStatePacket
from esper_core.lifecycle import State
from esper_core.pb.esper.core.v1 import telemetry_pb2
from esper_core.pb.esper.tamiyo.v1 import tamiyo_pb2
from esper_core.rpc.convert import to_proto
from tests.bench.bench import Pace, Table
from tests.bench.figures import Row, Sample
from tests.bench.ground import visit
from tests.service.platform import INTERFACE, Stage

SLOTS = (1, 10, 50, 200)
INTERFACES = 5
KERNELS = 6
"""Kernels that fit each interface."""
SPECTRUM = tuple(0.5**power for power in range(16))


def run(pace: Pace) -> list[Table]:
    alone = [_policy(count, pace.rounds(300, 60)) for count in SLOTS]
    endpoints = pace.ground.platform()

    async def over_the_wire() -> list[Row]:
        async with visit(endpoints) as stage:
            return await _steps(stage, pace)

    return [
        Table(
            "Tamiyo.Step over gRPC with mutual TLS",
            pace.ground.run(over_the_wire()),
            (
                f"A fresh decision each time, recorded with its order; every slot wants to grow, {INTERFACES} interfaces "
                f"with {KERNELS} kernels each. 'whole' is what an epoch boundary waits: packet to bytes, call, bytes to "
                "signal; 'policy' is the part that Tamiyo itself reports. Counts interleaved, wall clock.",
            ),
        ),
        Table(
            "The heuristic policy alone", alone, (f"decide() with {KERNELS} kernels offered per slot; processor time.",)
        ),
    ]


def _policy(count: int, rounds: int) -> Row:
    policy, packet = HeuristicPolicy(), _packet("bench", 0, count, [INTERFACE], offers=KERNELS)
    seconds = []
    for _ in range(rounds + 3):
        began = time.process_time()
        policy.decide(packet)
        seconds.append(time.process_time() - began)
    return Sample(tuple(seconds[3:])).row(f"{count} slots", "ms", 1e3)


async def _steps(stage: Stage, pace: Pace) -> list[Row]:
    interfaces = [INTERFACE.model_copy(update={"in_width": 200 + number}) for number in range(INTERFACES)]
    pace.say(f"{INTERFACES * KERNELS} kernels into the library")
    for interface in interfaces:
        await asyncio.gather(*(stage.kernel(interface, seed=seed, width=4 + seed) for seed in range(KERNELS)))
    tamiyo = stage.stub("tamiyo", "tolaria")
    runs = {count: f"bench-{secrets.token_hex(4)}" for count in SLOTS}
    whole: dict[int, list[float]] = {count: [] for count in SLOTS}
    inside: dict[int, list[float]] = {count: [] for count in SLOTS}
    for epoch in range(pace.rounds(100, 20) + 3):
        for count in SLOTS:
            packet = _packet(runs[count], epoch, count, interfaces)
            began = time.perf_counter()
            request = tamiyo_pb2.StepRequest(packet=to_proto(packet, telemetry_pb2.SystemStatePacket))
            answer = await tamiyo.Step(request)
            seconds = time.perf_counter() - began
            if len(answer.signal.actions) != 1:
                raise RuntimeError(f"{len(answer.signal.actions)} orders for {count} slots that want to grow, not 1")
            if epoch >= 3:
                whole[count].append(seconds)
                inside[count].append(answer.signal.seconds)
    rows = []
    for count in SLOTS:
        size = _packet(runs[count], 0, count, interfaces)
        kib = to_proto(size, telemetry_pb2.SystemStatePacket).ByteSize() / 1024
        rows.append(Sample(tuple(whole[count])).row(f"{count} slots, whole ({kib:.1f} KiB packet)", "ms", 1e3))
        rows.append(Sample(tuple(inside[count])).row(f"{count} slots, policy", "ms", 1e3))
    return rows


def _packet(run_id: str, epoch: int, count: int, interfaces: list[SlotInterface], offers: int = 0) -> SystemStatePacket:
    """A run whose every slot asks for growth, each a little more urgently than the one before."""
    candidates = tuple(
        KernelCandidate(
            kernel_id=f"kernel-{number:064x}",
            blueprint_name="bottleneck_mlp",
            width=4 + number,
            parameters=100 * number,
        )
        for number in range(offers)
    )

    def slot(number: int) -> SlotState:
        name = f"block{number}.fc1:block{number}.fc2"
        signal = GrowthSignal(
            gain=1.0 + number / 1000,
            gain_relative=0.1 + number / 10_000,
            share=0.9,
            score=1.0,
            gain_of_loss=0.5,
            spectrum=SPECTRUM,
            confidence=0.99,
            samples=1024,
            unit_parameters=29,
        )
        health = HealthSignal(
            slot=name, epoch=epoch, health=0.1, dead_unit_ratio=0.0, effective_rank=3.0, signal=signal
        )
        return SlotState(
            slot=name,
            interface=interfaces[number % len(interfaces)],
            state=State.DORMANT,
            health=health,
            evidence=(signal, signal),
            candidates=candidates,
        )

    return SystemStatePacket(
        run_id=run_id,
        epoch=epoch,
        train_loss=1.0,
        loss_window=(1.0,) * 16,
        slots=tuple(slot(number) for number in range(count)),
        host_parameters=100_000,
    )
