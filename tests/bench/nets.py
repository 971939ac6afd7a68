"""Host networks to time, one per family, each with a batch to step on and the slot that gets the kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from services.tolaria import hosts
from tests.bench.device import clock_of
from tests.bench.figures import Clock

Make = Callable[[int], nn.Module]
CLASSES = 10


@dataclass(frozen=True)
class Family:
    """A kind of host.

    Attributes:
        name: for tables.
        make: the network with so many further units in the layer that ``slot`` spans.
        shape: of one input; token numbers when ``tokens``.
        batch: rows of a training step.
        slot: source and sink of the span that is grown.
        tokens: size of the vocabulary, 0 for real-valued inputs.
        device: where the network and its rows live.
    """

    name: str
    make: Make
    shape: tuple[int, ...]
    batch: int
    slot: tuple[str, str]
    tokens: int = 0
    device: str = "cpu"

    def rows(self, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """``count`` random inputs with targets."""
        generator = torch.Generator().manual_seed(seed)
        targets = torch.randint(CLASSES, (count,), generator=generator)
        shape = (count, *self.shape)
        drawn = torch.randint(self.tokens, shape, generator=generator) if self.tokens else None
        inputs = torch.randn(shape, generator=generator) if drawn is None else drawn
        return inputs.to(self.device), targets.to(self.device)

    def on(self, device: str) -> Family:
        """The same on another device."""
        return replace(self, device=device)

    @property
    def clock(self) -> Clock:
        """How time is taken where it lives."""
        return clock_of(self.device)

    @property
    def slot_name(self) -> str:
        return ":".join(self.slot)


def _mlp(width: int) -> Make:
    return lambda more: hosts.mlp((64,), (width, width + more, width), CLASSES, "relu")


def _resnet(more: int) -> nn.Module:
    model = hosts.ResNet(3, (16, 32), 1, CLASSES)
    block = model.stages.get_submodule("0.0")
    block.conv1, block.bn1 = nn.Conv2d(16, 16 + more, 3, padding=1, bias=False), nn.BatchNorm2d(16 + more)
    block.conv2 = nn.Conv2d(16 + more, 16, 3, padding=1, bias=False)
    return model


FAMILIES = (
    Family("MLP 64-128-128-128", _mlp(128), (64,), 64, ("fc2", "fc3")),
    Family(
        "CNN 16-32-32, 16×16",
        lambda more: hosts.cnn((3, 16, 16), (16, 32 + more, 32), CLASSES, "relu"),
        (3, 16, 16),
        32,
        ("conv2", "conv3"),
    ),
    Family("ResNet 16-32, 16×16", _resnet, (3, 16, 16), 16, ("stages.0.0.conv1", "stages.0.0.conv2")),
    Family(
        "transformer 2×64, 16 tokens",
        lambda more: hosts.Transformer(16, 32, 64, 4, (128 + more, 128), CLASSES, "gelu"),
        (16,),
        32,
        ("blocks.0.fc1", "blocks.0.fc2"),
        tokens=32,
    ),
)
SIZES = (
    Family("MLP 64-32-32-32", _mlp(32), (64,), 32, ("fc2", "fc3")),
    Family("MLP 64-512-512-512", _mlp(512), (64,), 64, ("fc2", "fc3")),
    FAMILIES[1],
    FAMILIES[3],
)


def fresh(family: Family, more: int = 0) -> nn.Module:
    """The network with its usual initial weights."""
    torch.manual_seed(0)
    return family.make(more).to(family.device)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of every step here. So slow that nothing saturates while it is timed."""
    return torch.optim.Adam(model.parameters(), lr=1e-6)


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, rows: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """One training step as a call."""
    inputs, targets = rows

    def step() -> None:
        loss = nn.functional.cross_entropy(model(inputs), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step
