"""What a trainer trains: a plain network, or one that grows; both are stepped, saved and finished the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from esper_core.control.carve.papers import CarveReport, PlanState
from esper_core.control.grower import Grower
from esper_core.control.packet import Command
from esper_core.lifecycle import BLENDED
from esper_core.log import get
from esper_core.nn.host import Host
from services.tolaria.history import Boundary, Figures, SlotRow
from services.tolaria.sculpting import Sculpting

log = get(__name__)


@dataclass(frozen=True)
class Finished:
    """A trained network.

    Attributes:
        model: a plain module, grown parts folded in where the algebra allows.
        fossilized, culled, rolled_back: how the grafts ended.
        added_parameters: what growth added.
        carved_parameters: what carving took out.
        folded_max_abs_diff: largest |folded - unfolded| output; None when nothing was folded.
    """

    model: nn.Module
    fossilized: int = 0
    culled: int = 0
    rolled_back: int = 0
    added_parameters: int = 0
    carved_parameters: int = 0
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


class Growing:
    """A network that may grow.

    Args:
        host: the wrapped network.
        optimizer: over its parameters.
        grower: over both.
        orders: gives the orders that came since it was last called.
        sculpting: carves the host too; None: it is not carved.
    """

    def __init__(
        self,
        host: Host,
        optimizer: torch.optim.Optimizer,
        grower: Grower,
        orders: Callable[[], Iterable[Command]],
        sculpting: Sculpting | None = None,
    ) -> None:
        self.model = host
        self.optimizer = optimizer
        self.grower = grower
        self.sculpting = sculpting
        self._orders = orders

    def boundary(self, figures: Figures) -> Boundary:
        for command in self._orders():
            self.grower.command(command)
        step = self.grower.step(
            figures.epoch,
            train_loss=figures.train_loss,
            validation_loss=figures.validation_loss,
            validation_accuracy=figures.validation_accuracy,
        )
        for command, reason in step.refused:
            log.warning("order.refused", command_id=command.command_id, slot=command.slot, reason=reason)
        health = {signal.slot: signal for signal in step.health}
        slots = tuple(
            SlotRow(
                slot=seed.slot,
                state=seed.state,
                generation=seed.generation,
                alpha=self.grower.alpha(seed.slot),
                health=health[seed.slot].health if seed.slot in health else None,
                blueprint_name=seed.blueprint_name,
                age=figures.epoch - seed.since,
            )
            for seed in self.grower.seeds
        )
        carved = self._carve(figures)
        grafted = sum(seed.parameters for seed in self.grower.seeds if seed.state in BLENDED)
        return Boundary(
            figures=figures.model_copy(update={"parameters": self.model.parameter_count + grafted}),
            events=step.events,
            signal=step.signal,
            health=step.health,
            reports=step.reports,
            slots=slots,
            refused=tuple(f"{command.target.name} {command.slot}: {reason}" for command, reason in step.refused),
            rolled_back=step.rolled_back,
            carved=carved.events,
            units=carved.survey,
        )

    def _carve(self, figures: Figures) -> CarveReport:
        if self.sculpting is None:
            return CarveReport()
        report = self.sculpting.boundary(figures, busy=self.grower.busy)
        if any(event.state is PlanState.REMOVED for event in report.events):
            self.grower.survey.forget()  # what was measured was another network
        return report

    def state_dict(self) -> dict[str, Any]:
        state = self.grower.state_dict()
        return state if self.sculpting is None else {**state, "carver": self.sculpting.carver.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.grower.load_state_dict(state)
        if self.sculpting is not None:
            self.sculpting.carver.load_state_dict(state["carver"])

    def finish(self) -> Finished:
        model, report = self.grower.finish()
        carved = 0 if self.sculpting is None else self.sculpting.carver.freed
        return Finished(
            model,
            fossilized=report.fossilized,
            culled=report.culled,
            rolled_back=report.rolled_back,
            added_parameters=report.added_parameters + carved,
            carved_parameters=carved,
            folded_max_abs_diff=report.folded_max_abs_diff,
        )
