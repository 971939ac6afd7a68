"""What goes bad is thrown out, and the host is what it was before the graft."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from esper_core.control.grower import Grower
from esper_core.lifecycle import State
from tests.unit.control.growing import (
    Run,
    blended,
    germinate,
    held,
    order,
    owned,
    settings,
)
from tests.unit.nn.hosts import equal

SLOT = "2:4"


def before_graft(run: Run) -> dict[str, Any]:
    """Host and optimiser as the boundary found them that grafted."""
    return copy.deepcopy(run.grower.plot.snapshot())


@pytest.mark.parametrize("state", [State.GRAFTING, State.STABILIZATION, State.EVALUATING, State.FINE_TUNING])
def test_a_kernel_that_goes_bad_is_thrown_out_and_the_host_is_as_before(state: State) -> None:
    run = Run(seed=1)
    run.epochs(0, 6)
    germinate(run.grower, SLOT)
    number = 6
    seen = before_graft(run)
    while run.seed(SLOT).state not in (State.GRAFTING, State.CULLED):
        run.grower.step = remember(run.grower, seen)  # type: ignore[method-assign]
        run.epoch(number)
        number += 1
    if run.seed(SLOT).state is not state:
        number = run.until(state, SLOT, number)
    snapshot = copy.deepcopy(seen)
    graft = run.host.slots[SLOT].graft
    assert graft is not None
    with torch.no_grad():
        next(graft.kernel.parameters()).fill_(math.nan)
    run.epoch(number)
    assert moves_of(run)[-1] == (SLOT, state, State.ROLLED_BACK)
    assert "kernel failed" in run.events[-1].reason
    assert number in run.rolled_back
    assert equal(run.grower.plot.snapshot(), snapshot)
    assert held(run.optimizer) == owned(run.host)
    assert all(parameter.requires_grad for parameter in run.host.parameters())
    assert run.host.slots[SLOT].graft is None


def moves_of(run: Run) -> list[tuple[str, State, State]]:
    return [(event.slot, event.source, event.target) for event in run.events]


def remember(subject: Grower, seen: dict[str, Any]) -> Any:
    """The grower's step, keeping what the host was when it began."""
    step = type(subject).step

    def recording(*args: Any, **options: Any) -> Any:
        if subject.seeds[1].state is State.TRAINING:
            seen.clear()
            seen.update(copy.deepcopy(subject.plot.snapshot()))
        return step(subject, *args, **options)

    return recording


def test_an_exploding_loss_is_a_rollback_after_three_epochs() -> None:
    run, number = blended(settings=settings(settle_epochs=20, settle_patience=30))
    for epoch in range(number, number + 3):
        assert run.rolled_back == []
        run.epoch(epoch, loss=1e3)
    assert run.rolled_back == [number + 2]
    assert "3 times in a row" in run.events[-1].reason


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize("due", [True, False])
def test_a_loss_that_is_not_finite_is_a_rollback_at_once_and_the_run_goes_on(loss: float, due: bool) -> None:
    run, number = blended(settings=settings(evaluate_every=1 if due else 50), controller=None)
    run.epoch(number, loss=loss)
    assert run.rolled_back == [number]
    run.epochs(number + 1, number + 6)
    assert all(bool(parameter.isfinite().all()) for parameter in run.host.parameters())


def test_a_loss_that_is_not_finite_without_a_graft_is_told_as_measured() -> None:
    seen: list[Any] = []

    class Listener:
        def decide(self, packet: Any) -> None:
            seen.append(packet)

    run = Run(seed=1, controller=Listener(), settings=settings(evaluate_every=1))
    run.epoch(0, loss=math.nan)
    assert math.isfinite(seen[-1].train_loss)
    assert run.events == []


def test_a_host_that_is_not_finite_is_a_rollback_even_if_the_loss_does_not_tell() -> None:
    run, number = blended()
    with torch.no_grad():
        next(run.host.parameters()).fill_(math.nan)
    report = run.grower.step(number, train_loss=1.0)
    assert report.rolled_back
    assert "not finite" in report.events[0].reason
    assert all(bool(parameter.isfinite().all()) for parameter in run.host.parameters())


def test_a_rollback_keeps_the_schedule_where_it_is() -> None:
    run, number = blended()
    run.optimizer.param_groups[0]["lr"] = 0.0042
    run.grower.command(order(SLOT, State.ROLLED_BACK))
    run.epoch(number)
    assert run.rolled_back == [number]
    assert run.optimizer.param_groups[0]["lr"] == 0.0042
