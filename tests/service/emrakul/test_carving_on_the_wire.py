"""A run that is carved through the platform: measured there, planned here, ordered over the bus, carried out by the run alone."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esper_core.bus import subjects
from esper_core.bus.envelope import wrap
from esper_core.config import ENDPOINTS_FILE, load
from esper_core.control.carve.papers import Act, CarveOrder, Cut, PlanState
from esper_core.errors import EsperError
from esper_core.ids import new_id
from esper_core.local.credentials import revealed
from esper_core.pb.esper.core.v1 import carve_pb2
from esper_core.pb.esper.emrakul.v1 import emrakul_pb2
from esper_core.rpc.convert import to_proto
from esper_core.rpc.policy import PRINCIPALS
from services.tolaria.config import TolariaConfig
from services.tolaria.experiment import Experiment
from services.tolaria.history import Boundary
from services.tolaria.plane import Online
from services.tolaria.report import SeedRun
from services.tolaria.trainer import Stop
from tests.service.platform import Stage, until
from tests.service.tolaria_trainer.test_trainer_platform import Heard

CARVE = {
    "enabled": True,
    "warmup_epochs": 1,
    "measure_every": 1,
    "observe_epochs": 2,
    "plan_share": 0.3,
    "loss_share": 1.0,
    "max_accuracy_drop": 1.0,
}


def settings(stage: Stage, folder: Path, epochs: int, **carve: Any) -> TolariaConfig:
    (folder / ENDPOINTS_FILE).write_text(json.dumps(revealed(stage.endpoints)))
    return load(
        TolariaConfig,
        {
            "name": "carved",
            "model": {"widths": [16, 12]},
            "dataset": {"name": "iris", "validation_fraction": 0.3},
            "optimization": {"epochs": epochs, "batch_size": 16, "learning_rate": 0.01},
            "morphogenetic": {"carve": CARVE | carve, "growth": {"warmup_epochs": 1000}, "decision_wait_seconds": 5},
            "services": {"data_dir": str(folder), "drain_seconds": 10},
        },
    )


class Paced(Heard):
    """Lets the run go on from a boundary only when it is told to."""

    def __init__(self, until_epoch: int) -> None:
        self.free, self._from = threading.Event(), until_epoch
        self.reached = threading.Event()
        super().__init__(self._hold)

    def _hold(self, boundary: Boundary) -> None:
        if boundary.figures.epoch >= self._from and not self.free.is_set():
            self.reached.set()
            assert self.free.wait(60)


def train(config: TolariaConfig, run_id: str, view: Heard) -> SeedRun:
    return Experiment(config, run_id, True, False, False, view, Stop()).run()


async def begun(config: TolariaConfig, run_id: str, at: int) -> tuple[asyncio.Task[SeedRun], Paced]:
    """A run in the background, held at an epoch's end."""
    view = Paced(at)
    task = asyncio.create_task(asyncio.to_thread(train, config, run_id, view))
    assert await asyncio.to_thread(view.reached.wait, 60)
    return task, view


async def read(stage: Stage, plan_id: str) -> emrakul_pb2.Plan:
    plan: emrakul_pb2.Plan = (await stage.stub("emrakul").GetPlan(emrakul_pb2.GetPlanRequest(plan_id=plan_id))).plan
    return plan


async def listed(stage: Stage, run_id: str) -> list[emrakul_pb2.Plan]:
    return list((await stage.stub("emrakul").ListPlans(emrakul_pb2.ListPlansRequest(run_id=run_id))).plans)


def known(directory: Path, count: int) -> Callable[[], Any]:
    """Whether so many orders to carve are on the run's disk."""

    async def look() -> bool:
        path = directory / "carve-orders.jsonl"
        return path.exists() and len(path.read_bytes().splitlines()) >= count

    return look


def story(done: SeedRun) -> list[tuple[str, PlanState]]:
    return [(event.plan_id, event.state) for boundary in done.grown for event in boundary.carved]


async def test_emrakul_plans_and_the_run_carries_it_out(stage: Stage, tmp_path: Path, run_id: str) -> None:
    config = settings(stage, tmp_path, 12)
    task, view = await begun(config, run_id, 2)
    await until(known(tmp_path / "runs" / run_id, 1))
    view.free.set()
    done = await task
    states = {state for _, state in story(done)}
    assert {PlanState.SEDATED, PlanState.REMOVED} <= states
    assert done.result.carved_parameters > 0
    first = next(plan_id for plan_id, state in story(done) if state is PlanState.REMOVED)

    async def over() -> emrakul_pb2.Plan | None:
        plan = await read(stage, first)
        return plan if PlanState(plan.state) is PlanState.REMOVED else None

    plan = await until(over)
    assert plan.issued_by == "emrakul"
    assert [PlanState(event.state) for event in plan.events] == [PlanState.SEDATED, PlanState.REMOVED]
    assert plan.events[1].parameters > 0
    assert plan.events[1].order_id == plan.events[0].order_id != ""


async def test_planned_applied_and_undone_by_an_operator_while_it_trains(
    stage: Stage, tmp_path: Path, run_id: str
) -> None:
    config = settings(stage, tmp_path, 10, autonomous=False, observe_epochs=100)
    task, view = await begun(config, run_id, 2)
    stub, directory = stage.stub("emrakul"), tmp_path / "runs" / run_id
    await until(lambda: stub.GetSurvey(emrakul_pb2.GetSurveyRequest(run_id=run_id)))
    assert await listed(stage, run_id) == []
    plan = (await stub.PlanCarving(emrakul_pb2.PlanCarvingRequest(run_id=run_id))).plan
    await stub.ApplyPlan(emrakul_pb2.ApplyPlanRequest(plan_id=plan.plan_id))
    await until(known(directory, 1))
    view._from = 4
    view.reached.clear()
    view.free.set()
    view.free.clear()
    assert await asyncio.to_thread(view.reached.wait, 60)
    await until(lambda: in_state(stage, plan.plan_id, PlanState.SEDATED))
    await stub.UndoPlan(emrakul_pb2.UndoPlanRequest(plan_id=plan.plan_id, reason="changed my mind"))
    await until(known(directory, 2))
    view.free.set()
    done = await task
    assert story(done) == [(plan.plan_id, PlanState.SEDATED), (plan.plan_id, PlanState.WOKEN)]
    assert done.result.carved_parameters == 0
    await until(lambda: in_state(stage, plan.plan_id, PlanState.WOKEN))
    assert (await read(stage, plan.plan_id)).events[1].reason == "changed my mind"


async def in_state(stage: Stage, plan_id: str, state: PlanState) -> bool:
    return PlanState((await read(stage, plan_id)).state) is state


async def test_a_run_obeys_nobody_but_emrakul(stage: Stage, tmp_path: Path, run_id: str) -> None:
    plane = Online(settings(stage, tmp_path, 3), stage.endpoints, run_id, tmp_path)
    subject = subjects.CARVE_ORDERS.of(run_id)

    def order(number: int) -> carve_pb2.CarveOrder:
        cuts = (Cut(cluster="fc1", units=(number,)),)
        made = CarveOrder(order_id=new_id(), run_id=run_id, plan_id=f"p{number}", act=Act.SEDATE, cuts=cuts)
        return to_proto(made, carve_pb2.CarveOrder)

    async def send(message: carve_pb2.CarveOrder, producer: str) -> None:
        """Past the sender's own checks, as somebody would who means harm."""
        envelope = wrap(message, producer=producer, run_id=run_id)
        await stage.bus.publish_bytes(subject, envelope.SerializeToString(), message_id=envelope.event_id)

    for producer in sorted(PRINCIPALS - {"emrakul"}):
        await send(order(1), producer)
    unsigned = order(2)
    unsigned.issued_by = "karn"
    with pytest.raises(EsperError):
        await send(unsigned, "emrakul")
    await send(order(3), "emrakul")
    taken: list[CarveOrder] = []

    async def came() -> bool:
        taken.extend(plane.carve_orders())
        return bool(taken)

    async def buried() -> bool:
        rows = await stage.database.fetch("SELECT reason FROM bus.dead_letters WHERE subject = $1", subject)
        return sum("may not speak" in row["reason"] for row in rows) >= len(PRINCIPALS) - 1

    try:
        await until(came, 20)
        await until(buried, 20)
    finally:
        await asyncio.to_thread(plane.link.close, 0.1)
    assert [each.plan_id for each in taken] == ["p3"]
