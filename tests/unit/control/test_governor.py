"""When a loss is alarming: beyond mean + 6σ, beyond three times the mean and above the floor, three times in a row; or not finite."""

from __future__ import annotations

import math
import statistics

import hypothesis.strategies as st
import pytest
from hypothesis import given

from esper_core.control.governor import Governor
from esper_core.control.settings import GovernorSettings

SETTINGS = GovernorSettings()
losses = st.floats(0.0, 1e6)


def calm(values: list[float], settings: GovernorSettings = SETTINGS) -> Governor:
    governor = Governor(settings)
    for value in values:
        assert governor.observe(value) == ""
    return governor


def test_three_explosions_in_a_row_are_reason_enough() -> None:
    governor = calm([1.0, 1.1, 0.9, 1.0])
    assert [bool(governor.observe(10.0)) for _ in range(3)] == [False, False, True]


def test_a_calm_loss_between_breaks_the_row() -> None:
    governor = calm([1.0, 1.1, 0.9, 1.0])
    assert [bool(governor.observe(loss)) for loss in (10.0, 10.0, 1.0, 10.0, 10.0)] == [False] * 5


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_counts_at_once_and_is_not_remembered(loss: float) -> None:
    governor = calm([1.0, 1.1])
    assert governor.observe(loss)
    assert list(governor.calm) == [1.0, 1.1]
    assert Governor(SETTINGS).observe(loss)


@pytest.mark.parametrize(
    ("history", "loss", "alarming"),
    [
        ([1.0, 1.0], 2.9, False),  # σ = 0: the ratio decides
        ([1.0, 1.0], 3.1, True),
        ([0.0, 2.0], 6.9, False),  # mean 1, σ 1: mean + 6σ = 7 decides
        ([0.0, 2.0], 7.1, True),
        ([0.01, 0.01], 0.09, False),  # under the floor
        ([0.01, 0.01], 0.11, True),
        ([1.0], 100.0, False),  # one loss is no history
    ],
)
def test_all_three_limits_must_be_passed(history: list[float], loss: float, alarming: bool) -> None:
    governor = calm(history)
    governor.observe(loss)
    assert governor.alarms == int(alarming)


@given(st.lists(losses, min_size=2, max_size=30), losses)
def test_the_limit_is_the_formula(history: list[float], loss: float) -> None:
    governor = Governor(SETTINGS)
    governor.calm.extend(history)
    window = history[-SETTINGS.window :]
    mean = sum(window) / len(window)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in window) / len(window))
    limit = max(mean + 6 * deviation, 3 * mean, 0.1)
    if not math.isclose(loss, limit, rel_tol=1e-6):
        governor.observe(loss)
        assert (governor.alarms == 1) == (loss > limit)


@given(st.lists(losses, max_size=60))
def test_only_calm_losses_are_remembered_and_no_more_than_the_window(history: list[float]) -> None:
    governor = Governor(SETTINGS)
    remembered: list[float] = []
    for loss in history:
        before = governor.alarms
        governor.observe(loss)
        if governor.alarms <= before:
            remembered.append(loss)
    assert list(governor.calm) == remembered[-SETTINGS.window :]


def test_after_a_rollback_the_count_begins_anew() -> None:
    governor = calm([1.0, 1.0])
    governor.observe(10.0)
    governor.observe(10.0)
    governor.forgive()
    assert governor.observe(10.0) == ""


@given(st.lists(losses, min_size=2, max_size=20), st.floats(0, 6))
def test_the_band_is_above_the_mean_and_widens_with_sigmas(history: list[float], sigmas: float) -> None:
    governor = Governor(SETTINGS)
    governor.calm.extend(history)
    assert statistics.fmean(history) <= governor.band(sigmas) <= governor.band(sigmas + 1)


def test_without_history_everything_is_inside_the_band() -> None:
    assert calm([1.0]).band(3) == math.inf


@given(st.lists(losses, max_size=30), st.lists(losses, min_size=1, max_size=10))
def test_resumed_it_judges_as_before(history: list[float], future: list[float]) -> None:
    first, second = Governor(SETTINGS), Governor(SETTINGS)
    for loss in history:
        first.observe(loss)
    second.load_state_dict(first.state_dict())
    assert [first.observe(loss) for loss in future] == [second.observe(loss) for loss in future]
