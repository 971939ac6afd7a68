"""What a run remembers of its growing besides tensors in the host: seeds, orders, ways back, and how grafts ended."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from esper_core.control.packet import Command, FieldReport, SeedEvent
from esper_core.control.seed import Seed
from esper_core.ids import new_id
from esper_core.lifecycle import State

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

    def close(self, event: SeedEvent) -> FieldReport:
        """Write the report of a seed that has just ended; where it was folded, the slot gets its next seed."""
        seed = self.seeds[event.slot]
        report = FieldReport(
            report_id=new_id(),
            run_id=event.run_id,
            seed_id=event.seed_id,
            slot=event.slot,
            kernel_id=event.kernel_id or "none",
            blueprint_id=seed.blueprint_id,
            command_id=seed.command_id,
            outcome=event.target,
            germinated_epoch=seed.germinated_epoch,
            finished_epoch=event.epoch,
            contribution=seed.contribution,
            contribution_lower=seed.contribution_lower,
            rent=seed.rent,
            parameters=seed.parameters,
            reconstruction=seed.reconstruction,
            reason=event.reason,
            folded=seed.folded,
        )
        self.reports.append(report)
        if event.target is State.FOSSILIZED and seed.folded:
            self.seeds[event.slot] = seed.reborn()
        return report
