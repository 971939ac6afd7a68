"""Counting operations: right by hand, and without a trace in what is counted."""

from __future__ import annotations

import copy

import torch
from torch import nn

from services.tolaria.arena.effort import counted, step_flops


def test_a_step_s_operations_are_those_of_its_products() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    inputs, targets = torch.randn(11, 5), torch.randint(3, (11,))
    forward = 2 * 11 * (5 * 7 + 7 * 3)
    # A product per weight, and one for what the first layer gives; none for the inputs.
    backward = forward + 2 * 11 * 7 * 3
    assert step_flops(model, inputs, targets, nn.functional.cross_entropy) == forward + backward


def test_counting_leaves_the_network_and_chance_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(), nn.ReLU(), nn.Linear(7, 3))
    before, chance = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    step_flops(
        model,
        torch.randn(11, 5, generator=torch.Generator()),
        torch.zeros(11, dtype=torch.long),
        nn.functional.cross_entropy,
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), chance)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_factorisations_count() -> None:
    moment = torch.eye(6, dtype=torch.float64)
    with counted() as effort:
        factor, _ = torch.linalg.cholesky_ex(moment)
    assert effort.flops == 6**3 // 3
    with counted() as effort:
        torch.linalg.solve_triangular(factor, torch.ones(6, 2, dtype=torch.float64), upper=False)
    assert effort.flops == 6 * 6 * 2
    with counted() as effort:
        torch.cholesky_solve(torch.ones(6, 2, dtype=torch.float64), factor)
    assert effort.flops == 2 * 6 * 6 * 2
    with counted() as effort:
        torch.linalg.eigvalsh(moment)
    assert effort.flops == 4 * 6**3 // 3
