"""What happened in a run, epoch by epoch: an append-only file of JSON lines that reports and resumed runs read.

A line is on disk before the checkpoint that counts it; on resume, lines past the checkpoint are dropped, because those
epochs are trained again.
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from esper_core.control.carve.papers import CarveEvent, CarveSurvey
from esper_core.control.packet import AdaptationSignal, FieldReport, HealthSignal, SeedEvent
from esper_core.errors import Corrupt
from esper_core.lifecycle import State


class Figures(BaseModel):
    """The figures of one epoch; field names equal those of ``esper.core.v1.EpochMetrics``. Losses may be NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    epoch: int
    step: int
    train_loss: float
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    learning_rate: float
    train_seconds: float
    boundary_seconds: float
    parameters: int


class SlotRow(BaseModel):
    """A slot as the live view and the report show it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    slot: str
    state: State
    generation: int = 0
    alpha: float = 0.0
    health: float | None = None
    blueprint_name: str = ""
    age: int = 0


class Boundary(BaseModel):
    """An epoch and what its boundary brought."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    figures: Figures
    events: tuple[SeedEvent, ...] = ()
    signal: AdaptationSignal | None = None
    health: tuple[HealthSignal, ...] = ()
    reports: tuple[FieldReport, ...] = ()
    slots: tuple[SlotRow, ...] = ()
    refused: tuple[str, ...] = ()
    rolled_back: bool = False
    carved: tuple[CarveEvent, ...] = ()
    units: CarveSurvey | None = None


class History:
    """The lines of one run.

    Args:
        path: the file; made when absent.
        epochs: how many lines count; the rest is cut off.

    Raises:
        Corrupt: a line that counts is missing or malformed.
    """

    def __init__(self, path: Path, epochs: int) -> None:
        self.boundaries: list[Boundary] = []
        kept = path.read_bytes().splitlines(keepends=True)[:epochs] if path.exists() else []
        if len(kept) < epochs:
            raise Corrupt(f"{path} has {len(kept)} of {epochs} epochs", hint="start the run anew under another name")
        for number, line in enumerate(kept, 1):
            try:
                self.boundaries.append(Boundary.model_validate_json(line))
            except ValidationError:
                raise Corrupt(
                    f"{path}, line {number} is damaged", hint="start the run anew under another name"
                ) from None
        self._file = path.open("ab")
        self._file.truncate(sum(map(len, kept)))

    def append(self, boundary: Boundary) -> None:
        """Add an epoch; on disk when this returns."""
        self.boundaries.append(boundary)
        self._file.write(boundary.model_dump_json(exclude_defaults=True).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
