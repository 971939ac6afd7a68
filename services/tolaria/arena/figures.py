"""What rows say together: paired differences with intervals, and how well evidence tells who needs growth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

from services.tolaria.arena.trial import Row


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % t-interval.

    Attributes:
        value: the mean.
        half: half the interval's width; infinite with one value.
        n: values.
    """

    value: float
    half: float
    n: int

    @property
    def lower(self) -> float:
        """Lower end of the interval."""
        return self.value - self.half

    @property
    def error(self) -> float:
        """Standard error."""
        return self.half / float(stdtrit(self.n - 1, 0.975)) if self.n > 1 else math.inf

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.half:.2f}" if math.isfinite(self.half) else f"{self.value:.2f}"


def mean(values: Iterable[float]) -> Mean:
    """Of one value or more."""
    known = list(values)
    if len(known) < 2:
        return Mean(known[0], math.inf, 1)
    half = float(stdtrit(len(known) - 1, 0.975)) * statistics.stdev(known) / math.sqrt(len(known))
    return Mean(statistics.fmean(known), half, len(known))


class Table:
    """Rows by task, arm and seed."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows: dict[tuple[str, str], dict[int, Row]] = {}
        for row in rows:
            self._rows.setdefault((row.task, row.arm), {})[row.seed] = row

    @property
    def tasks(self) -> list[str]:
        """In the order of rows."""
        return list(dict.fromkeys(task for task, _ in self._rows))

    def arms(self, task: str) -> list[str]:
        """That have rows on the task."""
        return [arm for other, arm in self._rows if other == task]

    def of(self, task: str, arm: str) -> list[Row]:
        """In order of seeds."""
        return [row for _, row in sorted(self._rows.get((task, arm), {}).items())]

    def points(self, task: str, arm: str) -> list[float]:
        """What is compared, higher is better: test accuracy in per cent, or minus the loss of a regression."""
        return [points(row) for row in self.of(task, arm)]

    def gap(self, task: str, arm: str, other: str) -> Mean | None:
        """``arm`` minus ``other`` on the seeds both have."""
        left, right = self._rows.get((task, arm), {}), self._rows.get((task, other), {})
        both = [points(left[seed]) - points(right[seed]) for seed in left if seed in right]
        return mean(both) if both else None


def points(row: Row) -> float:
    """Test accuracy in per cent, or minus the loss of a regression."""
    return 100 * row.accuracy if row.accuracy is not None else -row.loss


def auroc(positives: Sequence[float], negatives: Sequence[float]) -> float | None:
    """Chance that a positive outranks a negative, ties counting half (Mann and Whitney, 1947); None when one side is empty."""
    if not positives or not negatives:
        return None
    wins = sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives)
    return wins / (len(positives) * len(negatives))
