"""Several grafts at once: each keeps its own way back."""

from __future__ import annotations

import copy
import math

import pytest

from esper_core.control.settings import HeuristicSettings
from esper_core.lifecycle import State
from tests.unit.control.growing import (
    Run,
    held,
    order,
    owned,
    settings,
)
from tests.unit.nn.hosts import equal, moved

SLOT = "2:4"


def pair() -> tuple[Run, int]:
    """Two grafts at rest, blended one epoch after the other, ``0:2`` first; and the next epoch."""
    chosen = settings(policy=HeuristicSettings(in_flight=2), settle_epochs=20, settle_patience=30)
    run = Run(seed=1, settings=chosen)
    run.epochs(0, 6)
    for number, slot in enumerate(("0:2", "4:6"), start=6):
        seed, place = run.seed(slot), run.host.slots[slot]
        moved(place, 4)
        assert place.graft is not None
        run.grower._keep_snapshot(seed)
        run.grower.plot.blend(place)
        place.graft.alpha.fill_(1)
        seed.state, seed.since, seed.parameters = State.STABILIZATION, number, 1
        run.epoch(number)
    return run, 8


@pytest.mark.parametrize("first", ["0:2", "4:6"])
def test_one_of_two_grafts_can_be_undone(first: str) -> None:
    run, number = pair()
    other = {"0:2": "4:6", "4:6": "0:2"}[first]
    run.grower.command(order(first, State.ROLLED_BACK))
    run.epoch(number)
    assert run.host.slots[first].graft is None
    assert run.host.slots[other].graft is not None
    kept = run.host.slots[other].graft
    assert kept is not None
    assert set(held(run.optimizer)) == {*owned(run.host), *owned(kept.kernel)}
    run.grower.command(order(other, State.ROLLED_BACK))
    run.epoch(number + 1)
    assert held(run.optimizer) == owned(run.host)
    assert all(parameter.requires_grad for parameter in run.host.parameters())


def test_an_explosion_undoes_both() -> None:
    run, number = pair()
    oldest = copy.deepcopy(run.grower.state_dict()["snapshots"]["0:2"])
    run.epoch(number, loss=math.nan)
    assert [event.slot for event in run.events if event.target is State.ROLLED_BACK] == ["0:2", "4:6"]
    assert equal(run.grower.plot.snapshot(), oldest)
    assert held(run.optimizer) == owned(run.host)


def test_what_one_graft_holds_still_is_not_let_go_by_another() -> None:
    chosen = settings(policy=HeuristicSettings(in_flight=2), frozen="host", settle_epochs=20, settle_patience=30)
    run = Run(seed=2, settings=chosen)
    for slot in ("0:2", "4:6"):
        name = run.host.slots[slot]
        run.grower.plot.hold_still(name)
    run.grower.plot.let_go(run.host.slots["0:2"])
    assert not any(parameter.requires_grad for parameter in run.host.parameters())
    run.grower.plot.let_go(run.host.slots["4:6"])
    assert all(parameter.requires_grad for parameter in run.host.parameters())


def test_a_fold_beside_another_graft_moves_that_ones_way_back() -> None:
    run, number = pair()
    shapes = [list(parameter.shape) for parameter in run.host.parameters()]
    seed = run.seed("0:2")
    run.grower.plot.let_go(run.host.slots["0:2"])
    seed.state, seed.since = State.FINE_TUNING, 0
    run.epoch(number)
    assert (run.events[-1].slot, run.events[-1].target) == ("0:2", State.FOSSILIZED)
    grown = [list(parameter.shape) for parameter in run.host.parameters()]
    assert grown != shapes
    run.grower.command(order("4:6", State.ROLLED_BACK))
    run.epoch(number + 1)
    assert [list(parameter.shape) for parameter in run.host.parameters()] == grown  # what was kept stays kept
    assert held(run.optimizer) == owned(run.host)


def test_nothing_is_shrunk_beside_another_graft() -> None:
    run, number = pair()
    seed = run.seed("0:2")
    seed.state, seed.since = State.EVALUATING, 0
    report = run.grower.step(number, 1.0)
    (event,) = (event for event in report.events if event.slot == "0:2")
    assert event.target is State.FINE_TUNING
    assert "shrunk" not in event.measurements


def test_two_grafts_are_resumed_with_their_ways_back() -> None:
    run, number = pair()
    again = Run(seed=1, settings=run.grower.settings)
    again.grower.load_state_dict(copy.deepcopy(run.grower.state_dict()))
    for each in (run, again):
        each.grower.command(order("4:6", State.ROLLED_BACK))
        each.epochs(number, number + 3)
    assert equal(again.grower.state_dict()["plot"], run.grower.state_dict()["plot"])
    assert equal(again.grower.state_dict()["snapshots"], run.grower.state_dict()["snapshots"])
