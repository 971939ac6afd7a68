"""Networks to carve: of drawn geometries, with dead and idle units, and a task on which a wide network has units to spare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from esper_core.control.carve.carver import Carver
from esper_core.control.carve.settings import CarveSettings
from esper_core.nn.host import Host, wrap
from esper_core.nn.probe import Batch

LOSS = nn.functional.cross_entropy
CLASSES = 3
HELD_ROWS = torch.randn(64, 4, generator=torch.Generator().manual_seed(9))
QUICK = CarveSettings(enabled=True, warmup_epochs=2, measure_every=2, observe_epochs=2, plan_share=0.3)


class Residual(nn.Module):
    """A stem, blocks around which the stem's channels pass, a head over all positions or their mean."""

    def __init__(self, channels: int, inner: int, blocks: int, norm: bool, flat: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, channels, 3, padding=1)
        self.inner = nn.ModuleList(nn.Conv2d(channels, inner, 3, padding=1, bias=not norm) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.BatchNorm2d(inner) if norm else nn.Identity() for _ in range(blocks))
        self.outer = nn.ModuleList(nn.Conv2d(inner, channels, 1) for _ in range(blocks))
        self.flat = flat
        self.head = nn.Linear(channels * (16 if flat else 1), CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.stem(x))
        for inner, norm, outer in zip(self.inner, self.norms, self.outer, strict=True):
            x = x + outer(torch.tanh(norm(inner(x))))
        return self.head(x.flatten(1) if self.flat else x.mean((2, 3)))


class Encoder(nn.Module):
    """A transformer layer over embedded features."""

    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 2 * width)
        self.layer = nn.TransformerEncoderLayer(2 * width, 2, ffn, dropout=0.0, batch_first=True)
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)).mean(1))


class Both(nn.Module):
    """Two branches side by side into one head."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, left), nn.Linear(4, right)
        self.head = nn.Linear(left + right, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([torch.sigmoid(self.left(x)), torch.cos(self.right(x))], -1))


def chain(widths: list[int], activation: Callable[[], nn.Module], norm: bool, bias: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    before = 4
    for width in widths:
        layers += [nn.Linear(before, width, bias=bias), *([nn.BatchNorm1d(width)] if norm else []), activation()]
        before = width
    return nn.Sequential(*layers, nn.Linear(before, CLASSES))


def convolutional(channels: list[int], kernel: int, stride: int, norm: bool) -> nn.Sequential:
    """Convolutions, pooled, flattened in channel order into a linear layer."""
    layers: list[nn.Module] = []
    before = 2
    for units in channels:
        layers += [nn.Conv2d(before, units, kernel, stride, padding=kernel // 2)]
        layers += [nn.BatchNorm2d(units)] if norm else []
        layers += [nn.GELU()]
        before = units
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(before * 4, CLASSES))


def batches(shape: tuple[int, ...], count: int = 4, rows: int = 32, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rows, *shape, generator=generator), torch.randint(CLASSES, (rows,), generator=generator))
        for _ in range(count)
    ]


def task(rows: int = 512, seed: int = 0) -> list[Batch]:
    """Three classes by the angle of the first two of four features, in batches of 64."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, 4, generator=generator)
    angle = torch.atan2(inputs[:, 0], inputs[:, 1])
    targets = ((angle + torch.pi) / (2 * torch.pi) * CLASSES).long().clamp(max=CLASSES - 1)
    return list(zip(inputs.split(64), targets.split(64), strict=True))


def run_in(model: nn.Module, steps: int = 3, shape: tuple[int, ...] = (4,), seed: int = 0) -> torch.optim.Optimizer:
    """An optimiser with a memory and batch norms with statistics, from a few steps on noise."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for inputs, targets in batches(shape, steps, seed=seed):
        optimizer.zero_grad()
        LOSS(model(inputs), targets).backward()
        optimizer.step()
    return optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[Batch], epochs: int = 1) -> None:
    for _ in range(epochs):
        for inputs, targets in data:
            optimizer.zero_grad()
            LOSS(model(inputs), targets).backward()
            optimizer.step()


def wide(width: int = 32, seed: int = 0) -> tuple[Host, torch.optim.Optimizer]:
    """A perceptron far wider than ``task`` needs, wrapped, with its optimiser."""
    torch.manual_seed(seed)
    host = wrap(chain([width, width], nn.ReLU, norm=False, bias=True), torch.randn(4, 4))
    return host, torch.optim.Adam(host.parameters(), lr=5e-3)


def carver(host: Host, optimizer: torch.optim.Optimizer, **options: Any) -> Carver:
    chosen: dict[str, Any] = {"probe": task(256, 1), "validation": task(256, 2), "settings": QUICK} | options
    return Carver(host, optimizer, LOSS, **chosen)


def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    was = model.training
    model.eval()
    with torch.no_grad():
        found: Tensor = model(inputs)
    model.train(was)
    return found


def remembered(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The optimiser's memory by parameter name, copied."""
    return {
        name: {key: value.clone() for key, value in optimizer.state[parameter].items()}
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }
