"""Which units stand together, and what keeps them from being carved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from esper_core.errors import InvalidInput
from esper_core.nn.carve.anatomy import dissect
from esper_core.nn.host import wrap
from tests.unit.carve.carved import Encoder, Residual, chain
from tests.unit.nn.hosts import perceptron


class Permuted(nn.Module):
    """Flattens its channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).permute(0, 2, 3, 1).flatten(1))


class Loose(nn.Module):
    """Adds a parameter of its own to its units."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.offset, self.second = nn.Linear(4, 5), nn.Parameter(torch.zeros(5)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) + self.offset)


class Twice(nn.Module):
    """Runs a layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.loop, self.leave = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.loop(torch.tanh(self.loop(torch.tanh(self.enter(x))))))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


@pytest.mark.parametrize(
    ("model", "inputs", "cluster", "obstacle"),
    [
        (nn.Sequential(nn.Linear(4, 5), nn.Softmax(-1), nn.Linear(5, 3)), torch.randn(3, 4), "0", "mixes its units"),
        (Permuted(), torch.randn(3, 1, 4, 4), "conv", "mixes its units"),
        (nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)), torch.randn(3, 4), "0", "LayerNorm"),
        (
            nn.Sequential(nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 1, 1)),
            torch.randn(2, 2, 4, 4),
            "0",
            "GroupNorm",
        ),
        (nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1, groups=4)), torch.randn(2, 2, 4, 4), "0", "grouped"),
        (Encoder(2, 6), torch.randn(3, 5, 4), "embed", "which cannot be cut unit by unit"),
        (Loose(), torch.randn(3, 4), "first", "a parameter outside of any layer"),
        (Twice(), torch.randn(3, 4), "enter", "loop runs more than once"),
        (Tied(), torch.randn(3, 4), "first", "shares its parameters"),
        (nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 3)), torch.randn(3, 4), "0", "one unit only"),
        (perceptron(4, 5, 3), torch.randn(3, 4), "2", "its output is the network's"),
    ],
)
def test_obstacles_are_named(model: nn.Module, inputs: Tensor, cluster: str, obstacle: str) -> None:
    assert obstacle in dissect(model, (inputs,)).clusters[cluster].obstacle


def test_a_residual_stream_stands_together() -> None:
    model = Residual(channels=4, inner=3, blocks=2, norm=True, flat=True)
    anatomy = dissect(model, (torch.randn(2, 2, 4, 4),))
    stream = anatomy.clusters["stem"]
    assert {part.path for part in stream.parts if part.role == "writes"} == {"stem", "outer.0", "outer.1"}
    assert {part.path for part in stream.readers} == {"inner.0", "inner.1", "head"}
    (head,) = (part for part in stream.readers if part.path == "head")
    assert head.of(frozenset({1})) == list(range(16, 32))
    assert set(anatomy.clusters) == {"stem", "inner.0", "inner.1", "head"}


def test_dissecting_leaves_no_trace() -> None:
    model = chain([5, 6], nn.ReLU, norm=True, bias=True)
    model[3].requires_grad_(False)
    model[4].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanting = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    assert not dissect(model, (torch.randn(4, 4, generator=torch.Generator()),)).clusters["0"].obstacle
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == wanting
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_wrapped_host_with_hooks_and_a_frozen_part_is_understood() -> None:
    model = perceptron(4, 5, 6, 3)
    model[0].requires_grad_(False)
    model[2].register_forward_hook(lambda *_: None)
    host = wrap(model, torch.randn(2, 4))
    found = dissect(host.model, (torch.randn(2, 4),)).clusters
    assert {name for name, cluster in found.items() if not cluster.obstacle} == {"0", "2"}


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidInput, match="do not fit Sequential"):
        dissect(perceptron(4, 5, 3), (torch.randn(2, 7),))
