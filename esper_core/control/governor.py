"""Watches the loss while a graft is blended and says when to throw it out. Pure; knows only numbers."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from esper_core.control.settings import GovernorSettings


class Governor:
    """Remembers calm losses and counts alarming ones in a row."""

    def __init__(self, settings: GovernorSettings) -> None:
        self.settings = settings
        self.calm: deque[float] = deque(maxlen=settings.window)
        self.alarms = 0

    def observe(self, loss: float) -> str:
        """Take in one loss; returns why to roll back, or nothing.

        A non-finite loss is reason enough. Otherwise it must exceed mean + 6σ, 3 × mean and the floor, three times in a row.
        """
        if not math.isfinite(loss):
            return "the loss is not finite"
        if self._alarming(loss):
            self.alarms += 1
            if self.alarms >= self.settings.patience:
                return f"the loss was alarming {self.alarms} times in a row, now {loss:.4g}"
            return ""
        self.alarms = 0
        self.calm.append(loss)
        return ""

    def forgive(self) -> None:
        """Begin counting anew, after a rollback."""
        self.alarms = 0

    def band(self, sigmas: float) -> float:
        """Upper end of the calm band; infinity before there is one."""
        if len(self.calm) < 2:
            return math.inf
        mean = statistics.fmean(self.calm)
        return mean + sigmas * max(statistics.pstdev(self.calm), 0.05 * abs(mean))

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs."""
        return {"calm": list(self.calm), "alarms": self.alarms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self.calm = deque(state["calm"], maxlen=self.settings.window)
        self.alarms = state["alarms"]

    def _alarming(self, loss: float) -> bool:
        if len(self.calm) < 2:
            return False
        mean = statistics.fmean(self.calm)
        limit = max(mean + self.settings.sigmas * statistics.pstdev(self.calm), self.settings.ratio * mean)
        return loss > max(limit, self.settings.floor)
