"""Orders, embargo, bars and the budget: what may be done to a slot, and what is answered when it may not."""

from __future__ import annotations

from typing import Any

import pytest

from esper_core.control.packet import Budget
from esper_core.control.settings import HeuristicSettings
from esper_core.lifecycle import IN_FLIGHT, State
from tests.unit.control.growing import (
    LEARNING,
    Run,
    blended,
    germinate,
    moves,
    offer,
    order,
    settings,
)

SLOT = "2:4"


def test_a_slot_rests_before_it_can_be_tried_again() -> None:
    run = Run(seed=1, settings=LEARNING)
    germinate(run.grower, SLOT)
    run.epoch(0)
    run.grower.command(order(SLOT, State.CULLED))
    run.epoch(1)
    rests = run.grower.settings.embargo_epochs
    for number in range(2, 1 + rests):
        germinate(run.grower, SLOT)
        run.epoch(number)
        assert run.seed(SLOT).state is State.CULLED
    assert len(run.refused) == rests - 1
    germinate(run.grower, SLOT)
    run.epoch(1 + rests)
    assert run.path(SLOT)[-4:] == [State.DORMANT, State.GERMINATED, State.LOADING, State.TRAINING]
    assert run.seed(SLOT).generation == 1


def fail(run: Run, number: int) -> int:
    """Germinate at that epoch and cull at the next; how many epochs the slot rested."""
    germinate(run.grower, SLOT)
    run.epoch(number)
    run.grower.command(order(SLOT, State.CULLED))
    culled = number + 1
    run.epoch(culled)
    assert run.path(SLOT)[-2:] == [State.TRAINING, State.CULLED]
    return run.until(State.DORMANT, SLOT, culled + 1, 100) - 1 - culled


def test_each_failure_in_a_row_doubles_the_rest() -> None:
    run = Run(seed=1, settings=LEARNING)
    first = run.grower.settings.embargo_epochs
    number, rests = 0, []
    for _ in range(4):
        rests.append(fail(run, number))
        number = run.events[-1].epoch + 1
    assert rests == [first, 2 * first, 4 * first, 8 * first]
    assert (run.seed(SLOT).generation, run.seed(SLOT).failures) == (4, 4)


def test_a_rollback_counts_as_a_failure_and_other_slots_are_not_punished_for_it() -> None:
    run, number = blended()
    rest = run.grower.settings.embargo_epochs
    run.grower.command(order(SLOT, State.ROLLED_BACK))
    run.epoch(number)
    back = run.until(State.DORMANT, SLOT, number + 1)
    germinate(run.grower, SLOT, "low_rank")
    again = run.until(State.GRAFTING, SLOT, back)
    run.grower.command(order(SLOT, State.ROLLED_BACK))
    run.epoch(again)
    assert run.seed(SLOT).embargo_until == again + 2 * rest
    assert [seed.failures for seed in run.grower.seeds] == [0, 2, 0]


def test_what_was_kept_ends_the_row_of_failures() -> None:
    run = Run(seed=1)
    germinate(run.grower, SLOT)
    run.until(State.GRAFTING, SLOT)
    run.grower.command(order(SLOT, State.ROLLED_BACK))
    number = run.until(State.DORMANT, SLOT, 2)
    assert run.seed(SLOT).failures == 1
    germinate(run.grower, SLOT)
    run.until(State.FOSSILIZED, SLOT, number)
    assert run.seed(SLOT).state is State.DORMANT  # folded in: the slot's next seed
    assert run.seed(SLOT).failures == 0


def test_a_row_of_failures_survives_a_checkpoint() -> None:
    run = Run(seed=1, settings=LEARNING)
    fail(run, 0)
    again = Run(seed=1, settings=LEARNING)
    again.grower.load_state_dict(run.grower.state_dict())
    assert fail(again, run.events[-1].epoch + 1) == 2 * LEARNING.embargo_epochs


def test_a_blueprint_that_was_rolled_back_is_barred_there_for_good_and_only_there() -> None:
    seen: list[Any] = []

    class Listener:
        def decide(self, packet: Any) -> None:
            seen.append({slot.slot: slot.barred_blueprint_ids for slot in packet.slots})

    run, number = blended(controller=Listener(), settings=settings(evaluate_every=1))
    blueprint = run.seed(SLOT).blueprint_id
    run.grower.command(order(SLOT, State.ROLLED_BACK))
    run.epochs(number, number + 6)
    assert run.seed(SLOT).state is State.DORMANT
    assert seen[-1] == {"0:2": (), SLOT: (blueprint,), "4:6": ()}


def test_a_culled_blueprint_is_not_barred() -> None:
    run = Run(seed=1, settings=LEARNING)
    germinate(run.grower, SLOT)
    run.epoch(0)
    run.grower.command(order(SLOT, State.CULLED))
    run.epochs(1, 5)
    assert run.path(SLOT)[-3:] == [State.TRAINING, State.CULLED, State.DORMANT]
    assert run.seed(SLOT).barred == set()


def unit_cost(run: Run) -> int:
    slot = run.host.slots[SLOT]
    return 4 * slot.unit_parameters


@pytest.mark.parametrize(("spare", "grows"), [(0, True), (-1, False)])
def test_the_budget_counts_what_the_host_will_have_more_of(spare: int, grows: bool) -> None:
    cost = unit_cost(Run(seed=1))
    assert cost == 4 * (8 + 1 + 8)  # a row of the source, its bias, a column of the sink
    run = Run(seed=1, budget=Budget(parameters=cost + spare))
    germinate(run.grower, SLOT)
    run.epoch(0)
    assert bool(run.events) == grows
    assert bool(run.refused) != grows
    assert grows or "within_budget" in run.refused[0][1]


def test_what_has_grown_counts_against_the_budget() -> None:
    cost = unit_cost(Run(seed=1))
    run = Run(seed=1, budget=Budget(parameters=cost + 10))
    run.epochs(0, 6)
    germinate(run.grower, SLOT)
    number = run.until(State.FOSSILIZED, SLOT, 6)
    germinate(run.grower, SLOT)
    run.epoch(number)
    assert "within_budget" in run.refused[0][1]


def test_what_is_still_learning_counts_against_the_budget() -> None:
    chosen = LEARNING.model_copy(update={"policy": HeuristicSettings(in_flight=2)})
    run = Run(seed=1, budget=Budget(parameters=unit_cost(Run(seed=1)) + 20), settings=chosen)
    germinate(run.grower, SLOT)
    run.epoch(0)
    germinate(run.grower, "0:2")
    run.epoch(1)
    assert run.seed(SLOT).state is State.TRAINING
    assert "within_budget" in run.refused[0][1]


def test_orders_that_cannot_be_obeyed_are_answered_and_the_run_goes_on() -> None:
    run = Run(seed=1)
    kernel = offer(run.grower.source, run.host.slots[SLOT].interface).kernel_id
    wrong = [
        order("no:slot", State.GERMINATED, kernel_id=kernel),
        order(SLOT, State.GERMINATED),
        order(SLOT, State.GERMINATED, kernel_id="kernel-unknown"),
        order(SLOT, State.CULLED),
        order(SLOT, State.ROLLED_BACK),
        *[
            order(SLOT, state, kernel_id=kernel)
            for state in State
            if state not in (State.GERMINATED, State.CULLED, State.ROLLED_BACK)
        ],
    ]
    for command in wrong:
        run.grower.command(command)
    report = run.epoch(0)
    assert [command for command, _ in report.refused] == wrong
    assert all(reason for _, reason in report.refused)
    assert report.events == ()
    germinate(run.grower, SLOT)
    assert moves(run.epoch(1)) == [
        (SLOT, State.DORMANT, State.GERMINATED),
        (SLOT, State.GERMINATED, State.LOADING),
        (SLOT, State.LOADING, State.TRAINING),
    ]


def test_an_order_given_twice_is_obeyed_once() -> None:
    run = Run(seed=1, settings=LEARNING)
    command = germinate(run.grower, SLOT)
    run.grower.command(command)
    run.epoch(0)
    run.grower.command(command)
    run.grower.command(order(SLOT, State.CULLED))
    run.epoch(1)
    run.grower.command(command)
    run.epochs(2, 6)
    assert run.path(SLOT)[-2:] == [State.CULLED, State.DORMANT]
    assert [event.target for event in run.events].count(State.GERMINATED) == 1
    assert run.refused == []


def test_only_one_graft_at_a_time_unless_more_are_allowed() -> None:
    run = Run(seed=1)
    germinate(run.grower, SLOT)
    germinate(run.grower, "0:2")
    run.epoch(0)
    assert "graft_free" in run.refused[0][1]
    wide = Run(seed=1, settings=settings(policy=HeuristicSettings(in_flight=2)))
    for slot in ("0:2", SLOT, "4:6"):
        germinate(wide.grower, slot)
    wide.epoch(0)
    assert [seed.state in IN_FLIGHT for seed in wide.grower.seeds] == [True, True, False]


def test_a_graft_on_its_way_in_is_undone_not_cut_off() -> None:
    run, number = blended()
    run.grower.command(order(SLOT, State.CULLED))
    run.epoch(number)
    assert "ROLLED_BACK" in run.refused[0][1]
