"""What a run remembers of its growing besides tensors in the host: seeds, orders, ways back, and how grafts ended."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from esper_core.control.packet import Command, FieldReport
from esper_core.control.seed import Seed

REMEMBERED_COMMANDS = 1024


@dataclass
class Ledger:
    """Attributes:
    seeds: the present seed of every slot.
    initial_parameters: of the host before it grew.
    waiting: orders for the next boundary.
    applied: ids of orders already obeyed or refused, so that a repeated one has no effect.
    snapshots: host and optimiser as they were before each blended graft, by slot.
    reports: of the grafts that have ended.
    fold_differences: largest output change of each fold so far.
    """

    seeds: dict[str, Seed]
    initial_parameters: int
    waiting: deque[Command] = field(default_factory=deque)
    applied: deque[str] = field(default_factory=lambda: deque(maxlen=REMEMBERED_COMMANDS))
    snapshots: dict[str, dict[str, Any]] = field(default_factory=dict)
    reports: list[FieldReport] = field(default_factory=list)
    fold_differences: list[float] = field(default_factory=list)
