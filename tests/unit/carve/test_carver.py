"""The carver: units that do not pay go, those that do stay, and everything stops when it should."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from esper_core.control.carve.carver import Carver
from esper_core.control.carve.papers import Act, CarveEvent, CarveOrder, Cut, PlanState
from esper_core.control.carve.surveying import held_back
from tests.unit.carve.carved import LOSS, QUICK, carver, outputs, task, train, wide

HELD = task(256, 2)


def settings(**changes: Any) -> Any:
    return QUICK.model_copy(update=changes)


def live(carve: Carver, epochs: int, first: int = 0, **step: Any) -> list[CarveEvent]:
    """Train and step ``epochs`` times."""
    events: list[CarveEvent] = []
    for epoch in range(first, first + epochs):
        train(carve.host, carve.optimizer, task())
        events += carve.step(epoch, **step).events
    return events


def ordered(carve: Carver, plan: str, act: Act = Act.SEDATE, order_id: str = "", **cuts: tuple[int, ...]) -> None:
    made = tuple(Cut(cluster=name.removeprefix("c"), units=units) for name, units in cuts.items())
    order = CarveOrder(order_id=order_id or f"{plan}-{act.name}", run_id="local", plan_id=plan, act=act, cuts=made)
    carve.order(order)


def idle(carve: Carver, cluster: int, units: list[int]) -> None:
    """Let nobody read some units of a layer."""
    with torch.no_grad():
        carve.host.model[cluster + 2].weight[:, units] = 0


def test_a_wide_network_gets_smaller_and_no_worse() -> None:
    host, optimizer = wide()
    before = host.parameter_count
    twin, twins = wide()
    carve = carver(host, optimizer)
    events = live(carve, 24)
    train(twin, twins, task(), 24)
    states = [event.state for event in events]
    assert PlanState.REMOVED in states
    freed = sum(event.parameters for event in events)
    assert 0.3 * before < freed <= 0.5 * before
    assert before - host.parameter_count == freed == carve.freed
    mine, theirs = (held_back(each, HELD, LOSS) for each in (host, twin))
    assert mine.accuracy >= theirs.accuracy - 0.03
    removed = next(event for event in events if event.state is PlanState.REMOVED)
    assert removed.flops > 0
    assert removed.difference <= 1e-5 * outputs(host, HELD[0][0]).abs().max() * 10
    assert (removed.left_parameters, removed.accuracy_before is None) == (before - removed.parameters, False)


def test_units_go_only_after_they_were_silenced_and_observed() -> None:
    host, optimizer = wide()
    events = live(carver(host, optimizer), 20)
    by_plan: dict[str, list[CarveEvent]] = {}
    for event in events:
        by_plan.setdefault(event.plan_id, []).append(event)
    for story in by_plan.values():
        if story[-1].state is PlanState.REMOVED:
            assert [event.state for event in story] == [PlanState.SEDATED, PlanState.REMOVED]
            assert story[1].epoch - story[0].epoch >= QUICK.observe_epochs
            assert story[1].cuts == story[0].cuts


def test_nothing_is_begun_or_finished_while_a_graft_is_in_flight() -> None:
    host, optimizer = wide()
    carve = carver(host, optimizer)
    assert live(carve, 6, busy=True) == []
    begun = live(carve, 1, first=6)
    assert [event.state for event in begun] == [PlanState.SEDATED]
    assert live(carve, 6, first=7, busy=True) == []
    assert live(carve, 1, first=13)[0].state is PlanState.REMOVED


def test_a_plan_that_costs_accuracy_wakes_and_three_end_it() -> None:
    host, optimizer = wide()
    carve = carver(host, optimizer, settings=settings(measure_every=1))
    train(host, optimizer, task(), 10)
    states = []
    epoch, accuracy = 2, 0.9
    while not carve.ended:
        states += [(event.state, event.reason) for event in carve.step(epoch, 0.3, accuracy).events]
        epoch, accuracy = epoch + 1, accuracy - 0.03  # told by the caller: three points lower
    woken = [reason for state, reason in states if state is PlanState.WOKEN]
    assert woken[0] == "accuracy fell from 0.9000 to 0.8700, more than 0.02"
    assert len(woken) == 3
    assert carve.ended == "3 plans failed"
    assert carve.freed == 0
    ordered(carve, "late", c0=(0,))
    (event,) = carve.step(epoch, 0.3, 0.9).events
    assert event.state is PlanState.REFUSED
    assert "3 plans failed" in event.reason


def test_a_drop_over_all_plans_ends_it_too() -> None:
    host, optimizer = wide()
    carve = carver(host, optimizer)
    train(host, optimizer, task(), 10)
    accuracy = 0.95
    for epoch in range(2, 40):
        carve.step(epoch, 0.3, accuracy)
        accuracy -= 0.004  # never two points within one plan
        if carve.ended:
            break
    assert "all plans together, accuracy fell from 0.95" in carve.ended
    assert carve.failures == 0


def test_a_regression_is_judged_by_its_loss() -> None:
    host, optimizer = wide()
    carve = carver(host, optimizer)
    train(host, optimizer, task(), 10)
    assert carve.step(2, 0.30).events[0].state is PlanState.SEDATED
    assert carve.step(3, 0.32).events == ()
    event = carve.step(4, 0.34).events[0]
    assert event.state is PlanState.WOKEN
    assert event.reason == "held-back loss rose from 0.3 to 0.34, more than 10%"


def test_a_loss_that_is_no_number_wakes_and_nothing_begins() -> None:
    host, optimizer = wide()
    carve = carver(host, optimizer)
    train(host, optimizer, task(), 10)
    assert carve.step(2, 0.30).events[0].state is PlanState.SEDATED
    (event,) = carve.step(3, float("nan")).events
    assert (event.state, event.loss) == (PlanState.WOKEN, None)
    assert carve.step(4, float("nan")).events == ()


def test_an_order_is_obeyed_once_confirmed_and_observed() -> None:
    host, optimizer = wide()
    carve = carver(host, optimizer, autonomous=False)
    train(host, optimizer, task(), 5)
    idle(carve, 0, [3, 4])
    ordered(carve, "p", c0=(3, 4))
    ordered(carve, "p", c0=(3, 4))
    assert carve.step(0).events[0].state is PlanState.SEDATED
    removed = live(carve, 2, first=1)
    assert [event.state for event in removed] == [PlanState.REMOVED]
    assert removed[0].parameters == 2 * (4 + 1 + 32)
    assert host.model[0].out_features == 30


def test_what_pays_is_spared_though_ordered() -> None:
    host, optimizer = wide(8)
    carve = carver(host, optimizer, autonomous=False, settings=settings(halvings=0))
    train(host, optimizer, task(), 30)
    ordered(carve, "p", c0=(0, 1, 2))
    (event,) = carve.step(0).events
    assert event.state is PlanState.REFUSED
    assert "held-back loss could rise by" in event.reason
    assert carve.trial is None


def test_the_half_that_is_confirmed_is_carved() -> None:
    host, optimizer = wide(8)
    carve = carver(host, optimizer, autonomous=False)
    train(host, optimizer, task(), 30)
    idle(carve, 0, [5])
    ordered(carve, "p", c0=(0, 5))
    (event,) = carve.step(0).events
    assert event.state is PlanState.SEDATED
    assert event.cuts == (Cut(cluster="0", units=(5,)),)


@pytest.mark.parametrize(
    ("cuts", "reason"),
    [
        ({"cnowhere": (0,)}, "no units stand at 'nowhere'"),
        ({"c0": (99,)}, "0 has units 0 to 7"),
        ({"c0": tuple(range(8))}, "all 8 units of 0 would go"),
        ({"c4": (0,)}, "its output is the network's"),
        ({"ckernel 0:2": (0,)}, "there is no 'kernel 0:2' beside the network"),
        ({}, "names no units"),
        ({"c0": (0, 1, 2, 3, 4), "c2": (0, 1, 2, 3)}, "may still go in this run"),
    ],
)
def test_an_order_that_cannot_be_obeyed_is_answered(cuts: dict[str, tuple[int, ...]], reason: str) -> None:
    host, optimizer = wide(8)
    carve = carver(host, optimizer, autonomous=False)
    ordered(carve, "p", **cuts)
    (event,) = carve.step(0).events
    assert (event.state, event.order_id) == (PlanState.REFUSED, "p-SEDATE")
    assert reason in event.reason
    assert carve.step(1).events == ()


def test_a_second_plan_waits_and_a_graft_comes_first() -> None:
    host, optimizer = wide()
    carve = carver(host, optimizer, autonomous=False)
    idle(carve, 0, [1])
    ordered(carve, "early", c0=(1,))
    assert "a graft is in flight" in carve.step(0, busy=True).events[0].reason
    ordered(carve, "first", c0=(1,))
    ordered(carve, "second", c0=(1,))
    states = [(event.plan_id, event.state) for event in carve.step(1).events]
    assert states == [("first", PlanState.SEDATED), ("second", PlanState.REFUSED)]


def test_undone_while_silenced_and_refused_when_gone() -> None:
    host, optimizer = wide()
    carve = carver(host, optimizer, autonomous=False)
    idle(carve, 0, [1])
    reference = {name: value.clone() for name, value in host.state_dict().items()}
    ordered(carve, "p", c0=(1,))
    carve.step(0)
    train(host, optimizer, task())
    ordered(carve, "p", Act.WAKE)
    (event,) = carve.step(1).events
    assert (event.state, event.order_id) == (PlanState.WOKEN, "p-WAKE")
    assert torch.equal(host.state_dict()["0.weight"][1], reference["0.weight"][1])
    ordered(carve, "q", c0=(1,))
    idle(carve, 0, [1])
    events = carve.step(2).events + carve.step(3).events + carve.step(4).events
    assert [event.state for event in events] == [PlanState.SEDATED, PlanState.REMOVED]
    ordered(carve, "q", Act.WAKE)
    ordered(carve, "r", Act.WAKE)
    gone, unknown = carve.step(5).events
    assert "are gone for good" in gone.reason
    assert "start again from a checkpoint" in gone.reason
    assert "no units are on trial for r" in unknown.reason


def test_the_end_wakes_what_is_not_proven() -> None:
    host, optimizer = wide()
    carve = carver(host, optimizer)
    live(carve, 3)
    assert carve.trial is not None
    (event,) = carve.finish(3).events
    assert event.state is PlanState.WOKEN
    assert not any(module._forward_pre_hooks for module in host.modules())
    assert carve.finish(3).events == ()


def test_a_survey_names_what_there_is() -> None:
    host, optimizer = wide(8)
    report = carver(host, optimizer, autonomous=False).step(2)
    survey = report.survey
    assert survey is not None
    assert [(standing.cluster, standing.units) for standing in survey.clusters] == [("0", 8), ("2", 8), ("4", 3)]
    assert survey.clusters[2].obstacle == "its output is the network's"
    assert sorted(survey.clusters[0].candidates) == list(range(8))
    assert survey.parameters == host.parameter_count
    assert survey.room_parameters == int(0.3 * host.parameter_count)
    assert report.events == ()
