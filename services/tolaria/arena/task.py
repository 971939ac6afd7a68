"""What arms compete on: a network, data and a training recipe, all pure functions of the seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from esper_core.control.settings import GrowthSettings
from services.tolaria.datasets import Data


def _none(_network: nn.Module) -> None:
    """Nothing is wrong with it."""


@dataclass(frozen=True)
class Setup:
    """One seed of a task.

    Attributes:
        model: makes the network, freshly initialised; equal networks at every call.
        data: its parts.
        planted: slots where the network was made too small on purpose; empty when nowhere, None when nobody knows.
        spans: slots as pairs of module paths; every span found when None.
        flaw: what is done to a freshly initialised network to spoil it; rivals that begin with other widths have it too.
    """

    model: Callable[[], nn.Module]
    data: Data
    planted: tuple[str, ...] | None = None
    spans: tuple[tuple[str, str], ...] | None = None
    flaw: Callable[[nn.Module], None] = _none

    def made(self) -> nn.Module:
        """The network as training gets it."""
        network = self.model()
        self.flaw(network)
        return network


@dataclass(frozen=True)
class Task:
    """A contest.

    Attributes:
        name: short, unique.
        about: one line for people.
        make: the setup of a seed.
        group: tasks that share a goal are in one group.
        optimizer: makes the optimiser.
        epochs, batch_size: of training.
        rate: learning rate by epoch; None = what the optimiser was made with.
        settings: of growing.
        budget: parameters that may be added in all; None = no limit.
        probe_rows: training rows that growth signals are measured on.
    """

    name: str
    about: str
    make: Callable[[int], Setup]
    group: str
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    epochs: int = 50
    batch_size: int = 64
    rate: Callable[[int], float] | None = None
    settings: GrowthSettings = field(default_factory=GrowthSettings)
    budget: int | None = None
    probe_rows: int = 1024
