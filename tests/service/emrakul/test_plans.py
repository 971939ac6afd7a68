"""Plans: made of what runs tell, ordered once, followed to their end, and ordered by nobody who may not."""

from __future__ import annotations

from typing import Any

import pytest

from esper_core.bus import subjects
from esper_core.bus.envelope import unwrap, wrap
from esper_core.control.carve.papers import CarveEvent, CarveSurvey, Cut, PlanState, Standing
from esper_core.errors import AlreadyExists, Conflict, Forbidden, InvalidInput, NotFound
from esper_core.ids import new_id
from esper_core.pb.esper.bus.v1 import bus_pb2
from esper_core.pb.esper.core.v1 import carve_pb2
from esper_core.pb.esper.emrakul.v1 import emrakul_pb2
from esper_core.rpc.convert import to_proto
from esper_core.rpc.policy import PRINCIPALS
from services.emrakul.plans import Plans
from services.emrakul.projection import Projection
from services.emrakul.service import Facts, send
from tests.service.platform import Stage, until


def survey(run_id: str, epoch: int = 5, **facts: Any) -> CarveSurvey:
    standing = Standing(
        cluster="fc1",
        units=4,
        unit_parameters=10,
        unit_flops=20,
        candidates=(2, 0, 1),
        importance=(0.0, 0.1, 3.0),
        change=(0.0, 0.05, 2.0),
    )
    given = {"clusters": (standing,), "autonomous": False} | facts
    return CarveSurvey(
        run_id=run_id,
        epoch=epoch,
        loss=0.5,
        parameters=400,
        flops=800,
        room_parameters=100,
        room_loss=1.0,
        room_share=0.5,
        **given,
    )


async def tell(stage: Stage, run_id: str, said: CarveSurvey | CarveEvent) -> None:
    kind = carve_pb2.CarveSurvey if isinstance(said, CarveSurvey) else carve_pb2.CarveEvent
    await stage.send(subjects.CARVE_EVENTS, stage.seal(to_proto(said, kind), run_id, said.epoch))


async def happened(stage: Stage, order: carve_pb2.CarveOrder, state: PlanState, epoch: int, order_id: str = "") -> None:
    """The run tells that a plan has come further, and that is known when this returns."""
    event = CarveEvent(
        run_id=order.run_id,
        plan_id=order.plan_id,
        order_id=order_id or order.order_id,
        epoch=epoch,
        state=state,
        cuts=(Cut(cluster="fc1", units=(0, 2)),),
        reason="so it is",
    )
    before = len((await read(stage, order.plan_id)).events)
    await tell(stage, order.run_id, event)

    async def known() -> bool:
        return len((await read(stage, order.plan_id)).events) > before

    await until(known)


async def read(stage: Stage, plan_id: str) -> emrakul_pb2.Plan:
    plan: emrakul_pb2.Plan = (await stage.stub("emrakul").GetPlan(emrakul_pb2.GetPlanRequest(plan_id=plan_id))).plan
    return plan


async def state(stage: Stage, plan_id: str) -> PlanState:
    return PlanState((await read(stage, plan_id)).state)


@pytest.fixture
async def run(stage: Stage, run_id: str) -> str:
    """A registered run that has told what its units are worth."""
    await stage.register(run_id)
    await tell(stage, run_id, survey(run_id))
    await until(lambda: stage.stub("emrakul").GetSurvey(emrakul_pb2.GetSurveyRequest(run_id=run_id)))
    return run_id


async def plan(stage: Stage, run_id: str, **wish: Any) -> emrakul_pb2.Plan:
    made: emrakul_pb2.Plan = (
        await stage.stub("emrakul").PlanCarving(emrakul_pb2.PlanCarvingRequest(run_id=run_id, **wish))
    ).plan
    return made


async def apply(stage: Stage, plan_id: str, principal: str = "operator") -> carve_pb2.CarveOrder:
    request = emrakul_pb2.ApplyPlanRequest(plan_id=plan_id, reason="because")
    order: carve_pb2.CarveOrder = (await stage.stub("emrakul", principal).ApplyPlan(request)).order
    return order


async def undo(stage: Stage, plan_id: str) -> carve_pb2.CarveOrder:
    order: carve_pb2.CarveOrder = (
        await stage.stub("emrakul").UndoPlan(emrakul_pb2.UndoPlanRequest(plan_id=plan_id))
    ).order
    return order


async def sent(stage: Stage, run_id: str) -> list[bus_pb2.EventEnvelope]:
    """What was recorded for the run's order subject, in order."""
    rows = await stage.database.fetch(
        "SELECT data FROM bus.outbox WHERE subject = $1 ORDER BY position", subjects.CARVE_ORDERS.of(run_id)
    )
    return [unwrap(row["data"]).envelope for row in rows]


async def test_a_plan_orders_nothing_until_it_is_applied_and_then_once(stage: Stage, run: str) -> None:
    made = await plan(stage, run, reason="smaller")
    assert [(cut.cluster, list(cut.units)) for cut in made.proposal.cuts] == [("fc1", [0, 2])]
    assert (made.proposal.parameters, made.proposal.flops) == (20, 40)
    assert (made.issued_by, made.epoch, made.reason) == ("operator", 5, "smaller")
    assert await state(stage, made.plan_id) is PlanState.PROPOSED
    assert await sent(stage, run) == []
    order = await apply(stage, made.plan_id)
    assert await apply(stage, made.plan_id) == order
    (envelope,) = await sent(stage, run)
    assert (envelope.producer, envelope.priority) == ("emrakul", bus_pb2.PRIORITY_CONTROL)
    assert carve_pb2.CarveOrder.FromString(envelope.payload) == order
    assert (order.issued_by, order.act, order.reason) == ("operator", carve_pb2.CARVE_ACT_SEDATE, "because")
    assert await state(stage, made.plan_id) is PlanState.ORDERED


async def test_a_plan_is_made_once_per_name_and_asks_for_less_or_more(stage: Stage, run: str) -> None:
    name = new_id()
    made = await plan(stage, run, plan_id=name, max_parameters=10)
    assert [list(cut.units) for cut in made.proposal.cuts] == [[2]]
    assert await plan(stage, run, plan_id=name) == made
    await stage.register(f"{run}-b")
    with pytest.raises(AlreadyExists):
        await plan(stage, f"{run}-b", plan_id=name)
    with pytest.raises(Conflict, match=r"everything in run .* pays"):
        await plan(stage, run, max_parameters=5)


async def test_followed_to_its_end(stage: Stage, run: str) -> None:
    order = await apply(stage, (await plan(stage, run)).plan_id)
    await happened(stage, order, PlanState.SEDATED, 6)
    assert await state(stage, order.plan_id) is PlanState.SEDATED
    assert await apply(stage, order.plan_id) == order
    await happened(stage, order, PlanState.REMOVED, 9)
    told = await read(stage, order.plan_id)
    assert PlanState(told.state) is PlanState.REMOVED
    assert [event.epoch for event in told.events] == [6, 9]
    with pytest.raises(Conflict, match="are gone already"):
        await apply(stage, order.plan_id)
    with pytest.raises(Conflict, match="gone for good") as refusal:
        await undo(stage, order.plan_id)
    assert "checkpoint of before" in refusal.value.hint


async def test_undone_once_and_applied_again(stage: Stage, run: str) -> None:
    made = await plan(stage, run)
    with pytest.raises(Conflict, match="is PROPOSED: there is nothing to undo"):
        await undo(stage, made.plan_id)
    order = await apply(stage, made.plan_id)
    await happened(stage, order, PlanState.SEDATED, 6)
    wake = await undo(stage, made.plan_id)
    assert (wake.act, list(wake.cuts)) == (carve_pb2.CARVE_ACT_WAKE, [])
    assert await undo(stage, made.plan_id) == wake
    await happened(stage, wake, PlanState.WOKEN, 7)
    assert await state(stage, made.plan_id) is PlanState.WOKEN
    again = await apply(stage, made.plan_id)
    assert again.order_id != order.order_id
    assert await state(stage, made.plan_id) is PlanState.ORDERED
    assert len(await sent(stage, run)) == 3


async def test_a_refused_wake_leaves_the_plan_as_it_is(stage: Stage, run: str) -> None:
    order = await apply(stage, (await plan(stage, run)).plan_id)
    await happened(stage, order, PlanState.SEDATED, 6)
    wake = await undo(stage, order.plan_id)
    await happened(stage, order, PlanState.REMOVED, 8)
    await happened(stage, wake, PlanState.REFUSED, 8)
    assert await state(stage, order.plan_id) is PlanState.REMOVED


async def test_a_run_that_goes_back_takes_back_what_it_told(stage: Stage, run: str) -> None:
    order = await apply(stage, (await plan(stage, run)).plan_id)
    await happened(stage, order, PlanState.SEDATED, 6)
    await happened(stage, order, PlanState.REMOVED, 9)
    await stage.register(run, epoch=8)
    await until(lambda: back(stage, order.plan_id, PlanState.SEDATED))
    await stage.register(run, epoch=5)
    await until(lambda: back(stage, order.plan_id, PlanState.ORDERED))
    with pytest.raises(Conflict, match="has told nothing of its units"):
        await stage.stub("emrakul").GetSurvey(emrakul_pb2.GetSurveyRequest(run_id=run))


async def back(stage: Stage, plan_id: str, wanted: PlanState) -> bool:
    return await state(stage, plan_id) is wanted


async def test_autonomous_runs_are_ordered_by_the_rules_one_plan_at_a_time(stage: Stage, run_id: str) -> None:
    await stage.register(run_id)
    await tell(stage, run_id, survey(run_id, autonomous=True))
    listed = await until(lambda: plans(stage, run_id))
    (made,) = listed
    assert (made.issued_by, PlanState(made.state)) == ("emrakul", PlanState.ORDERED)
    (envelope,) = await sent(stage, run_id)
    order = carve_pb2.CarveOrder.FromString(envelope.payload)
    assert (order.issued_by, order.plan_id) == ("emrakul", made.plan_id)
    await tell(stage, run_id, survey(run_id, 10, autonomous=True))
    await happened(stage, order, PlanState.SEDATED, 10)  # told later than the second survey
    assert len(await plans(stage, run_id)) == 1
    await happened(stage, order, PlanState.REMOVED, 12)
    await tell(stage, run_id, survey(run_id, 15, autonomous=True))
    await until(lambda: many(stage, run_id, 2))
    await tell(stage, run_id, survey(run_id, 20, autonomous=True, obstacle="the budget is used up"))
    await until_known(stage, run_id, 20)
    with pytest.raises(Conflict, match="the budget is used up"):
        await plan(stage, run_id)


async def until_known(stage: Stage, run_id: str, epoch: int) -> None:
    async def known() -> bool:
        answer = await stage.stub("emrakul").GetSurvey(emrakul_pb2.GetSurveyRequest(run_id=run_id))
        return bool(answer.survey.epoch == epoch)

    await until(known)


async def plans(stage: Stage, run_id: str) -> list[emrakul_pb2.Plan]:
    answer = await stage.stub("emrakul").ListPlans(emrakul_pb2.ListPlansRequest(run_id=run_id))
    return list(answer.plans)


async def many(stage: Stage, run_id: str, count: int) -> bool:
    return len(await plans(stage, run_id)) == count


async def test_unknown_names_and_ended_runs_are_refused(stage: Stage, run: str) -> None:
    made = await plan(stage, run)
    with pytest.raises(NotFound, match="there is no run") as missing:
        await plan(stage, run[:-1])
    assert run in missing.value.hint
    with pytest.raises(NotFound, match="there is no plan"):
        await apply(stage, "nowhere")
    with pytest.raises(InvalidInput):
        await plan(stage, "x" * 64)
    await stage.end(run)
    await until(lambda: ended(stage, run))
    with pytest.raises(Conflict, match="has ended") as over:
        await apply(stage, made.plan_id)
    assert "carve copy" in over.value.hint


async def ended(stage: Stage, run_id: str) -> bool:
    try:
        await plan(stage, run_id)
    except Conflict as refusal:
        return "has ended" in refusal.message
    return False


async def test_paged_newest_first(stage: Stage, run: str) -> None:
    made = [(await plan(stage, run)).plan_id for _ in range(3)]
    stub = stage.stub("emrakul")
    first = await stub.ListPlans(emrakul_pb2.ListPlansRequest(run_id=run, page_size=2))
    rest = await stub.ListPlans(emrakul_pb2.ListPlansRequest(run_id=run, page_size=2, page_token=first.next_page_token))
    assert [p.plan_id for p in (*first.plans, *rest.plans)] == made[::-1]
    assert not rest.next_page_token


@pytest.mark.parametrize("principal", sorted(PRINCIPALS - {"emrakul", "operator"}))
async def test_nobody_else_plans_or_orders(stage: Stage, run: str, principal: str) -> None:
    made = await plan(stage, run)
    stub = stage.stub("emrakul", principal)
    with pytest.raises(Forbidden):
        await stub.PlanCarving(emrakul_pb2.PlanCarvingRequest(run_id=run))
    with pytest.raises(Forbidden):
        await stub.ApplyPlan(emrakul_pb2.ApplyPlanRequest(plan_id=made.plan_id))
    with pytest.raises(Forbidden):
        await stub.UndoPlan(emrakul_pb2.UndoPlanRequest(plan_id=made.plan_id))
    assert (await stub.GetPlan(emrakul_pb2.GetPlanRequest(plan_id=made.plan_id))).plan.plan_id == made.plan_id
    assert await sent(stage, run) == []


async def test_only_training_processes_say_that_something_was_carved(stage: Stage, run: str) -> None:
    order = await apply(stage, (await plan(stage, run)).plan_id)
    event = CarveEvent(run_id=run, plan_id=order.plan_id, order_id=order.order_id, epoch=6, state=PlanState.REMOVED)
    subject = subjects.CARVE_EVENTS.of(run)
    forgers = sorted(PRINCIPALS - {"tolaria"})
    for producer in forgers:
        forged = wrap(to_proto(event, carve_pb2.CarveEvent), producer=producer, run_id=run, epoch=6, sequence=99)
        await stage.bus.publish_bytes(subject, forged.SerializeToString(), message_id=forged.event_id)
    await happened(stage, order, PlanState.SEDATED, 7)
    told = await read(stage, order.plan_id)
    assert [(PlanState(each.state), each.epoch) for each in told.events] == [(PlanState.SEDATED, 7)]

    async def buried() -> bool:
        rows = await stage.database.fetch("SELECT reason FROM bus.dead_letters WHERE subject = $1", subject)
        return sum("may not speak" in row["reason"] for row in rows) >= len(forgers)

    await until(buried, 20)


async def test_a_run_speaks_of_itself_only(stage: Stage, run: str) -> None:
    order = await apply(stage, (await plan(stage, run)).plan_id)
    event = CarveEvent(run_id=run, plan_id=order.plan_id, order_id=order.order_id, epoch=6, state=PlanState.REMOVED)
    other = wrap(to_proto(event, carve_pb2.CarveEvent), producer="tolaria", run_id=f"{run}-b", epoch=6, sequence=99)
    handle = Facts(Projection(Plans(stage.database, send))).handle
    async with stage.database.acquire() as connection:
        with pytest.raises(InvalidInput, match="speaks of"):
            await handle(connection, unwrap(other.SerializeToString(), subjects.CARVE_EVENTS.of(f"{run}-b")))
    assert await state(stage, order.plan_id) is PlanState.ORDERED
