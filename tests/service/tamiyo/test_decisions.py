"""Decisions: taken once per packet, with their orders; on kernels that the library really has."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from esper_core.bus import subjects
from esper_core.bus.envelope import wrap
from esper_core.control.packet import (
    AdaptationSignal,
    Budget,
    GrowthSignal,
    HealthSignal,
    ReasonCode,
    SlotState,
    SystemStatePacket,
)
from esper_core.errors import Forbidden, InvalidInput
from esper_core.lifecycle import State
from esper_core.pb.esper.core.v1 import decision_pb2, lifecycle_pb2, telemetry_pb2
from esper_core.pb.esper.tamiyo.v1 import tamiyo_pb2
from esper_core.rpc.convert import from_proto, to_proto
from tests.service.platform import INTERFACE, OTHER_INTERFACE, SLOT, Stage, until

EVIDENCE = GrowthSignal(
    gain=1.0, gain_relative=0.5, share=0.8, score=1.0, gain_of_loss=0.1, spectrum=(0.6, 0.3, 0.1),
    confidence=0.95, samples=1024, unit_parameters=29,
)  # fmt: skip


def packet(
    run_id: str, epoch: int = 10, *, health: float = 0.1, interface: Any = INTERFACE, **vital: Any
) -> SystemStatePacket:
    """A host with one slot that asks for growth, or does not."""
    signs = HealthSignal(slot=SLOT, epoch=epoch, health=health, signal=EVIDENCE, **vital)
    slot = SlotState(slot=SLOT, interface=interface, state=State.DORMANT, health=signs, evidence=(EVIDENCE, EVIDENCE))
    return SystemStatePacket(run_id=run_id, epoch=epoch, train_loss=1.0, slots=(slot,), budget=Budget())


async def step(stage: Stage, told: SystemStatePacket) -> AdaptationSignal:
    request = tamiyo_pb2.StepRequest(packet=to_proto(told, telemetry_pb2.SystemStatePacket))
    answer = await stage.stub("tamiyo", "tolaria").Step(request)
    return from_proto(answer.signal, AdaptationSignal)


async def listed(stage: Stage, run_id: str, **fields: Any) -> list[decision_pb2.AdaptationSignal]:
    answer = await stage.stub("tamiyo").ListDecisions(tamiyo_pb2.ListDecisionsRequest(run_id=run_id, **fields))
    return list(answer.decisions)


async def orders(stage: Stage, run_id: str) -> int:
    subject = f"esper.control.kasmina.commands.{run_id}"
    return int(await stage.database.fetchval("SELECT count(*) FROM bus.outbox WHERE subject = $1", subject))


async def test_a_slot_that_asks_for_growth_gets_a_kernel_of_the_library(stage: Stage, run_id: str) -> None:
    await stage.kernel(seed=1)
    signal = await step(stage, packet(run_id))
    (action,) = signal.actions
    assert action.command.target is State.GERMINATED
    assert (action.command.slot, action.command.issued_by) == (SLOT, "tamiyo")
    found = await stage.database.fetchval(
        "SELECT status FROM urza.kernels WHERE kernel_id = $1", action.command.kernel_id
    )
    assert found is not None
    assert 0 < signal.seconds < 5
    assert not signal.conservative
    assert await orders(stage, run_id) == 1


async def test_the_same_packet_gets_the_same_decision_and_its_orders_once(stage: Stage, run_id: str) -> None:
    """Also when eight ask at the same time, and when nothing but a clock reading differs."""
    await stage.kernel(seed=1)
    signals = await asyncio.gather(*(step(stage, packet(run_id)) for _ in range(8)))
    later = await step(stage, packet(run_id, latency_seconds=0.125))
    assert len({signal.decision_id for signal in (*signals, later)}) == 1
    assert all(signal == signals[0] for signal in signals)
    assert len(await listed(stage, run_id)) == 1
    assert await orders(stage, run_id) == 1


async def test_another_packet_gets_another_decision(stage: Stage, run_id: str) -> None:
    decisions = {
        (await step(stage, told)).decision_id
        for told in (packet(run_id), packet(run_id, health=0.2), packet(run_id, 11))
    }
    assert len(decisions) == 3


async def test_a_healthy_host_is_left_alone(stage: Stage, run_id: str) -> None:
    signal = await step(stage, packet(run_id, health=0.9))
    assert signal.actions == ()
    assert [reason.code for reason in signal.abstentions] == [ReasonCode.HEALTHY]
    assert await orders(stage, run_id) == 0


async def test_analyze_leaves_no_trace(stage: Stage, run_id: str) -> None:
    await stage.kernel(seed=1)
    request = tamiyo_pb2.AnalyzeRequest(packet=to_proto(packet(run_id), telemetry_pb2.SystemStatePacket))
    answer = await stage.stub("tamiyo").Analyze(request)
    assert len(answer.signal.actions) == 1
    assert await listed(stage, run_id) == []
    assert await orders(stage, run_id) == 0


async def test_a_verdict_is_heard_before_the_remembered_answer_is_old(stage: Stage, run_id: str) -> None:
    """Without the news, "there is no kernel" would be believed for 15 s."""
    before = await step(stage, packet(run_id, 1, interface=OTHER_INTERFACE))
    assert [reason.code for reason in before.abstentions] == [ReasonCode.NO_KERNEL]
    await stage.kernel(OTHER_INTERFACE, seed=5)
    epochs = iter(range(2, 1000))

    async def grown() -> bool:
        return bool((await step(stage, packet(run_id, next(epochs), interface=OTHER_INTERFACE))).actions)

    assert await until(grown, 5)


async def test_pages_of_decisions_newest_first(stage: Stage, run_id: str) -> None:
    await stage.kernel(seed=1)
    for epoch in range(5):
        await step(stage, packet(run_id, epoch, health=0.1 if epoch == 3 else 0.9))
    request = tamiyo_pb2.ListDecisionsRequest(run_id=run_id, page_size=2)
    seen: list[int] = []
    while True:
        answer = await stage.stub("tamiyo").ListDecisions(request)
        seen.extend(decision.epoch for decision in answer.decisions)
        if not answer.next_page_token:
            break
        request.page_token = answer.next_page_token
    assert seen == [4, 3, 2, 1, 0]
    assert [decision.epoch for decision in await listed(stage, run_id, actions_only=True)] == [3]


async def test_who_may_ask_and_what_is_malformed(stage: Stage, run_id: str) -> None:
    told = to_proto(packet(run_id), telemetry_pb2.SystemStatePacket)
    with pytest.raises(Forbidden):
        await stage.stub("tamiyo", "operator").Step(tamiyo_pb2.StepRequest(packet=told))
    told.train_loss = float("nan")
    with pytest.raises(InvalidInput, match="train_loss"):
        await stage.stub("tamiyo", "tolaria").Step(tamiyo_pb2.StepRequest(packet=told))


async def test_an_outcome_is_kept_once_by_either_road(stage: Stage, run_id: str) -> None:
    report = decision_pb2.FieldReport(
        report_id=f"report-{run_id}",
        run_id=run_id,
        seed_id=f"{run_id}/{SLOT}/0",
        slot=SLOT,
        kernel_id="kernel-" + "1" * 64,
        outcome=lifecycle_pb2.SEED_STATE_FOSSILIZED,
        contribution=0.5,
    )
    tamiyo = stage.stub("tamiyo", "tolaria")
    kept = (await tamiyo.AddExperience(tamiyo_pb2.AddExperienceRequest(report=report))).reports
    assert (await tamiyo.AddExperience(tamiyo_pb2.AddExperienceRequest(report=report))).reports == kept
    other = decision_pb2.FieldReport()
    other.CopyFrom(report)
    other.report_id += "-2"
    for told in (report, other, other):
        await stage.send(subjects.FIELD_REPORTS, wrap(told, producer="tolaria"))
    await until(
        lambda: stage.database.fetchval("SELECT true FROM tamiyo.experience WHERE report_id = $1", other.report_id)
    )
    assert (await tamiyo.AddExperience(tamiyo_pb2.AddExperienceRequest(report=report))).reports == kept + 1
