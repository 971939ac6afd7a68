"""Weights shrink as far as a loss allows, and are left bit for bit as they were where it does not."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from esper_core.nn.shrink import STEPS, shrink


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@given(st.floats(0.01, 0.99), st.floats(0, 1), st.floats(0, 2))
def test_the_smallest_factor_up_to_which_the_loss_has_risen_by_no_more_than_it_may(
    smallest: float, lowest: float, rise: float
) -> None:
    weight = torch.ones(2, 2, dtype=torch.float64)
    factor = shrink([weight], lambda: abs(float(weight[0, 0]) - lowest), smallest, rise)
    assert torch.equal(weight, torch.full((2, 2), factor, dtype=torch.float64))
    tried = [1 - (1 - smallest) * step / STEPS for step in range(STEPS + 1)]
    most = (1 - lowest) + rise * (1 - lowest)  # a V: what is allowed is a stretch from 1 down
    allowed = [value for value in tried if abs(value - lowest) <= most]
    assert factor == min(allowed)


@pytest.mark.parametrize("grown", [1.0, math.nan, math.inf])
def test_where_the_loss_rises_every_bit_stays(grown: float) -> None:
    model = network(0)
    before = copied(model)
    losses = iter([0.5, grown])
    assert shrink(model.parameters(), lambda: next(losses), 0.5) == 1.0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_nothing_is_asked_where_nothing_may_shrink() -> None:
    def never() -> float:
        raise AssertionError("asked")

    assert shrink(network(0).parameters(), never, 1.0) == 1.0


@given(st.integers(0, 50))
def test_a_network_that_is_too_sure_is_softened_and_biases_stay(seed: int) -> None:
    model = network(seed)
    source = torch.Generator().manual_seed(seed)
    inputs, labels = torch.randn(64, 4, generator=source), torch.randint(3, (64,), generator=source)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    before = copied(model)

    def loss() -> float:
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model(inputs), labels))

    first = loss()
    factor = shrink(model.parameters(), loss, 0.5)
    assert factor < 1  # labels are chance: the less a network says about them, the better
    assert loss() <= first
    for name, value in model.state_dict().items():
        wanted = before[name] * factor if value.dim() > 1 else before[name]
        assert torch.equal(value, wanted)
