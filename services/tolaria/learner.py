"""What a trainer trains: a plain network, or one that grows; both are stepped, saved and finished the same way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from services.tolaria.history import Boundary, Figures


@dataclass(frozen=True)
class Finished:
    """A trained network.

    Attributes:
        model: a plain module, grown parts folded in where the algebra allows.
        fossilized, culled, rolled_back: how the grafts ended.
        added_parameters: what growth added.
        folded_max_abs_diff: largest |folded - unfolded| output; None when nothing was folded.
    """

    model: nn.Module
    fossilized: int = 0
    culled: int = 0
    rolled_back: int = 0
    added_parameters: int = 0
    folded_max_abs_diff: float | None = None


class Learner(Protocol):
    """A network with its optimiser, as the trainer sees it."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    def boundary(self, figures: Figures) -> Boundary:
        """Do what is due at an epoch's end."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def finish(self) -> Finished: ...


class Plain:
    """A network that is only trained: the baseline and the ungrown twin."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer

    def boundary(self, figures: Figures) -> Boundary:
        return Boundary(figures=figures)

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def finish(self) -> Finished:
        return Finished(self.model)
