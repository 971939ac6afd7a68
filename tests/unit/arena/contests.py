"""A contest that takes a second: a small network, too narrow in its middle, on generated data."""

from __future__ import annotations

import functools

import torch
from torch import nn

from esper_core.control.settings import GrowthSettings
from services.tolaria.arena.task import Setup, Task
from services.tolaria.datasets import Data, Part
from services.tolaria.order import generator


def narrow(seed: int) -> Setup:
    """Labels from a random wide network; the student passes through one unit."""
    source = generator(seed, "contest")
    inputs = torch.randn(600, 8, generator=source)
    hidden = (inputs @ torch.randn(8, 24, generator=source)).relu()
    targets = (hidden @ torch.randn(24, 4, generator=source)).argmax(1)
    still, one = torch.zeros(()), torch.ones(())
    parts = [Part(inputs[rows], targets[rows], still, one) for rows in torch.arange(600).split([360, 120, 120])]

    def model() -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1), nn.ReLU(), nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 4)
        )

    return Setup(model, Data("contest", *parts, 4), ("2:4",))  # type: ignore[call-arg]


def contest(epochs: int = 14) -> Task:
    """The task; picklable by name."""
    settings = GrowthSettings(warmup_epochs=2, evaluate_every=1, ramp_epochs=1, training_steps=20, widths=(4,))
    optimizer = functools.partial(torch.optim.Adam, lr=1e-2)
    return Task("contest", "a layer of one unit", narrow, "narrow", optimizer, epochs, 32, settings=settings)
