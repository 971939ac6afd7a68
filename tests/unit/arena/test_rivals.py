"""Signals of rivals against what they are by definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esper_core.nn.host import wrap
from esper_core.nn.probe import Batch
from services.tolaria.arena import rivals

LOSS = nn.functional.cross_entropy


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def probe(*sizes: int) -> list[Batch]:
    return [(torch.randn(size, 4), torch.randint(3, (size,))) for size in sizes]


def test_fisher_is_that_of_the_weights_by_autograd() -> None:
    """One sample at a time, the gradient of a weight is g·h; over independent g and h its mean square is E[g²] E[h²]."""
    model, batches = network(), probe(1)
    host = wrap(model, batches[0][0])
    found = rivals.fisher(host, batches, LOSS)(None)  # type: ignore[arg-type]
    for name, layer in (("0:2", model[2]), ("2:4", model[4])):
        assert isinstance(layer, nn.Linear)
        ((inputs, targets),) = batches
        by_weights = torch.autograd.grad(LOSS(model(inputs), targets), [layer.weight, layer.bias])
        squares = torch.cat([gradient.flatten() for gradient in by_weights]).square()
        assert found[name] == pytest.approx(float(squares.mean()), rel=1e-4)


def test_fisher_is_a_mean_over_batches() -> None:
    batches = probe(8, 8)
    host = wrap(network(), batches[0][0])
    one, other, both = (rivals.fisher(host, part, LOSS)(None) for part in (batches[:1], batches[1:], batches))  # type: ignore[arg-type]
    for name in host.slots:
        assert both[name] == pytest.approx((one[name] + other[name]) / 2)
