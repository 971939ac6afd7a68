"""An epoch boundary: what the stages may ask at it, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from esper_core.control.governor import Governor
from esper_core.control.packet import AdaptationSignal, Command, FieldReport, HealthSignal, SeedEvent
from esper_core.control.plot import Plot
from esper_core.control.roles import KernelSource
from esper_core.control.seed import Seed


@dataclass(frozen=True)
class Boundary:
    """What the stages may ask at one epoch boundary."""

    plot: Plot
    source: KernelSource
    governor: Governor
    epoch: int
    train_loss: float
    keep_snapshot: Callable[[Seed], None]
    left: Callable[[Seed], int | None]
    """Parameters that the seed's own kernel may add; None = no limit."""
    alone: Callable[[Seed], bool]
    """Whether no other graft is blended: what is done to the host then concerns nobody else's way back."""


@dataclass(frozen=True)
class BoundaryReport:
    """What one ``step`` did.

    Attributes:
        events: every state change, in order.
        signal: the controller's answer; None when it was not asked or did not answer.
        health: vital signs per slot.
        reports: of the grafts that ended.
        refused: commands that could not be obeyed, with the reason.
        seconds: wall seconds per part: measure, decide, stages.
        rolled_back: whether host and optimiser went back to an earlier epoch's values.
    """

    events: tuple[SeedEvent, ...]
    signal: AdaptationSignal | None
    health: tuple[HealthSignal, ...]
    reports: tuple[FieldReport, ...]
    refused: tuple[tuple[Command, str], ...]
    seconds: dict[str, float]
    rolled_back: bool
