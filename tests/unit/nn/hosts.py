"""Families of small hosts with data, and hosts wrapped without tracing the same architecture twice."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esper_core.blueprint.build import KernelModule, build
from esper_core.blueprint.catalogue import catalogue
from esper_core.nn.host import Host, Slot
from esper_core.nn.probe import Batch
from esper_core.nn.trace import HostGraph, trace

LOSS = nn.functional.cross_entropy
CLASSES = 6


class Block(nn.Module):
    """A residual block with batch statistics."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(inner)) + x)


class ResNet(nn.Module):
    """Stem, two blocks, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.layer = nn.Sequential(Block(4), Block(4))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(torch.relu(self.stem(x))).mean((2, 3)))


class Transformer(nn.Module):
    """One encoder layer with dropout over embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)).mean(1))


def perceptron(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with an activation between them."""
    layers: list[nn.Module] = []
    for enters, leaves in itertools.pairwise(widths):
        layers += [nn.Linear(enters, leaves), activation()]
    return nn.Sequential(*layers[:-1])


def convolutional() -> nn.Sequential:
    """Two spans with stride and padding, dropout behind them."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 2, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(2, 4, 3),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(4, CLASSES),
    )


def normalised() -> nn.Sequential:
    """Two spans with batch statistics between their layers; neither ends in a bias."""
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 2, bias=False),
        nn.BatchNorm1d(2, affine=False, momentum=0.2),
        nn.Tanh(),
        nn.Linear(2, CLASSES, bias=False),
    )


@dataclass(frozen=True)
class Family:
    """How to make a host and what it eats."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


FAMILIES = {
    "mlp": Family(lambda: perceptron(6, 8, 2, 8, CLASSES), (6,)),
    "tanh": Family(lambda: perceptron(6, 8, 2, 8, CLASSES, activation=nn.Tanh), (6,)),
    "cnn": Family(convolutional, (2, 6, 6)),
    "resnet": Family(ResNet, (2, 6, 6)),
    "normed": Family(normalised, (6,)),
    "transformer": Family(Transformer, (5, 6)),
}


def make(family: str, seed: int = 0) -> nn.Module:
    """A family's model with weights from ``seed``."""
    torch.manual_seed(seed)
    return FAMILIES[family].make()


def batches(family: str, count: int, size: int = 32, seed: int = 1) -> list[Batch]:
    """Samples around one centre per class; the centres are the same for every seed."""
    generator = torch.Generator().manual_seed(seed)
    shape = FAMILIES[family].shape
    centres = torch.randn(CLASSES, *shape, generator=torch.Generator().manual_seed(42))
    found = []
    for _ in range(count):
        targets = torch.randint(CLASSES, (size,), generator=generator)
        found.append((centres[targets] + 0.4 * torch.randn(size, *shape, generator=generator), targets))
    return found


@functools.cache
def _graph(family: str) -> HostGraph:
    return trace(make(family), (batches(family, 1, size=4)[0][0],))


def wrapped(family: str, model: nn.Module) -> Host:
    """What ``esper.wrap`` gives for a model of the family."""
    graph = _graph(family)
    return Host(model, graph, graph.spans)


@functools.cache
def _perceptron_graph(widths: tuple[int, ...], activation: type[nn.Module]) -> HostGraph:
    return trace(perceptron(*widths, activation=activation), (torch.zeros(4, widths[0]),))


def wrapped_perceptron(model: nn.Module, *widths: int, activation: type[nn.Module] = nn.ReLU) -> Host:
    """What ``esper.wrap`` gives for ``perceptron(*widths)``."""
    graph = _perceptron_graph(widths, activation)
    return Host(model, graph, graph.spans)


def planted(slot: Slot, blueprint: str, seed: int = 3, **symbols: int) -> KernelModule:
    """A catalogue kernel bound to the slot with random weights and statistics: one that has learnt something."""
    kernel = build(catalogue()[blueprint], slot.interface, symbols)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in kernel.parameters():
            parameter.uniform_(-0.4, 0.4, generator=generator)
        for name, buffer in kernel.named_buffers():
            if buffer.ndim:
                buffer.uniform_(0.5 if name.endswith("var") else -0.4, 1.2, generator=generator)
    slot.bind(kernel)
    return kernel


def moved(slot: Slot, units: int) -> KernelModule:
    """The slot's first units moved out of the host into a kernel: at alpha 1 the network is what it was, without it much is lost."""
    kernel = planted(slot, "bottleneck_mlp", width=units)
    assert slot.layers is not None
    source, sink = slot.layers
    own = dict(kernel.named_parameters())
    with torch.no_grad():
        own["A.weight"].copy_(source.weight[:units])
        own["A.bias"].copy_(source.bias[:units])  # type: ignore[index]
        own["B.weight"].copy_(sink.weight[:, :units])
        own["B.bias"].zero_()
        sink.weight[:, :units] = 0
    return kernel


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    """Copies of all gradients by parameter name."""
    return {
        name: None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in module.named_parameters()
    }


def equal(left: Any, right: Any) -> bool:
    """Whether two trees of tensors and plain values are the same, bit for bit."""
    if isinstance(left, Tensor):
        return (
            isinstance(right, Tensor)
            and left.shape == right.shape
            and left.dtype == right.dtype
            and torch.equal(left.isnan(), right.isnan())
            and torch.equal(left.nan_to_num(), right.nan_to_num())
        )
    if isinstance(left, dict):
        return (
            isinstance(right, dict) and list(left) == list(right) and all(equal(left[key], right[key]) for key in left)
        )
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Iterable[Batch]) -> list[float]:
    """One pass of plain training; the loss of every batch."""
    losses = []
    for inputs, targets in data:
        optimizer.zero_grad()
        loss = LOSS(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def copied(model: nn.Module) -> nn.Module:
    """A deep copy."""
    return copy.deepcopy(model)
