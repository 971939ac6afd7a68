"""A network that needs to grow does so by itself, gets better and is plain again; one that does not is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from esper_core.control.grower import Grower
from tests.unit.nn.hosts import LOSS, perceptron, train, wrapped_perceptron

SLOT = "2:4"


def glyphs(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten classes of noisy 5×5 glyphs, shifted in brightness: digits' little cousin."""
    shapes = (torch.rand(10, 25, generator=torch.Generator().manual_seed(77)) > 0.5).float()
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(10, (count,), generator=generator)
    noise = 0.35 * torch.randn(count, 25, generator=generator) + 0.5 * torch.randn(count, 1, generator=generator)
    return shapes[targets] - 0.5 + noise, targets


def live(widths: tuple[int, ...], seed: int, epochs: int, grow: bool) -> tuple[float, list[Any], nn.Module]:
    """Train on glyphs; (loss on unseen data, events, the plain network)."""
    torch.manual_seed(seed)
    model: nn.Module = perceptron(*widths)
    inputs, targets = glyphs(1024, seed)
    data = list(zip(inputs.split(64), targets.split(64), strict=True))
    host = wrapped_perceptron(model, *widths)
    optimizer = torch.optim.Adam(host.parameters(), 3e-3)
    subject = Grower(host, optimizer, LOSS, probe=data, validation=[glyphs(300, seed + 100)], seed=seed)
    events: list[Any] = []
    for epoch in range(epochs):
        train(host.train(), optimizer, data)
        if grow:
            events += subject.step(epoch).events
    if grow:
        model, _ = subject.finish()
    with torch.no_grad():
        unseen = glyphs(1000, seed + 200)
        return LOSS(model.eval()(unseen[0]), unseen[1]).item(), events, model


@pytest.mark.parametrize("seed", [0, 1])
def test_a_narrow_network_grows_at_its_bottleneck_and_gets_better(seed: int) -> None:
    grown, events, model = live((25, 32, 2, 32, 10), seed, 40, grow=True)
    bare, _, _ = live((25, 32, 2, 32, 10), seed, 40, grow=False)
    first = [event for event in events if event.seed_id == events[0].seed_id]
    assert [int(event.target) for event in first] == [2, 3, 4, 5, 6, 7, 8, 9]
    assert first[0].slot == SLOT
    assert grown < 0.8 * bare
    assert type(model) is nn.Sequential
    assert all(not module._forward_hooks for module in model.modules())
    middle = model[2]
    assert isinstance(middle, nn.Linear)
    assert middle.out_features > 2


@pytest.mark.parametrize("seed", [0, 1])
def test_a_healthy_network_is_left_alone(seed: int) -> None:
    _, events, _ = live((25, 32, 32, 32, 10), seed, 30, grow=True)
    assert events == []
