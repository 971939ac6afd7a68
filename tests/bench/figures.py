"""Samples and what they say: medians, quartiles, paired ratios taken side by side, intervals of means.

Times are never asserted. Two works are compared by running them in turn, one short block each per round and the order
turned round every time, so that whatever else the machine does falls on both alike; the figure is the ratio within a
round, not the quotient of two averages. Pure computation on one thread is timed in processor seconds of this process,
because a neighbour's work is not ours, and on a GPU by events in its stream; everything that waits for somebody is timed
by the wall clock.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from services.tolaria.result import interval

Work = Callable[[], object]
Row = dict[str, object]
Clock = Callable[[Work, int], float]
"""Seconds of one call, over so many calls in a row."""
BLOCK_SECONDS = 0.02
"""A block is repeated until it lasts about this long, so that the clock and the call cost nothing."""
ENOUGH_FOR_P99 = 50
"""Below this the 99th percentile is only the maximum by another name."""


@dataclass(frozen=True)
class Sample:
    """Values of one quantity, at least one."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("a sample needs at least one value")

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def quantile(self, share: float) -> float:
        """The value below which ``share`` of the sample lies, linearly between its order statistics."""
        ordered = sorted(self.values)
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    def row(self, what: str, unit: str, scale: float = 1.0) -> Row:
        """The sample as a line of a table, every value times ``scale``."""
        return {
            "what": what,
            "unit": unit,
            "n": len(self.values),
            "median": self.median * scale,
            "q1": self.quantile(0.25) * scale,
            "q3": self.quantile(0.75) * scale,
            "p99": self.quantile(0.99) * scale if len(self.values) >= ENOUGH_FOR_P99 else None,
            "min": min(self.values) * scale,
            "max": max(self.values) * scale,
        }


def ratio_row(what: str, over: Sequence[float], under: Sequence[float]) -> Row:
    """Paired ratios ``over`` / ``under``, with both medians in milliseconds; equal indices belong to one round."""
    ratios = Sample(tuple(a / b for a, b in zip(over, under, strict=True)))
    return {
        "what": what,
        "n": len(ratios.values),
        "ratio": ratios.median,
        "q1": ratios.quantile(0.25),
        "q3": ratios.quantile(0.75),
        "min": min(ratios.values),
        "max": max(ratios.values),
        "ms": statistics.median(over) * 1e3,
        "base ms": statistics.median(under) * 1e3,
    }


def mean_row(what: str, values: Sequence[float]) -> Row:
    """Mean, standard deviation and the half width of the mean's 95 % t-interval; blank where one value says nothing."""
    many = len(values) > 1
    return {
        "what": what,
        "n": len(values),
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if many else None,
        "± 95 %": interval(values),
        "min": min(values),
        "max": max(values),
    }


def block(step: Work, clock: Clock | None = None, seconds: float = BLOCK_SECONDS) -> int:
    """How often ``step`` fits into a block; the calls made to find out warm it up."""
    for _ in range(3):
        step()
    return max(1, round(seconds / max((clock or timed)(step, 1), 1e-9)))


def timed(work: Work, times: int = 1) -> float:
    """Processor seconds of one call, over ``times`` calls in a row."""
    began = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - began) / times


def interleaved(works: Mapping[str, Work], *, rounds: int, clock: Clock | None = None) -> dict[str, list[float]]:
    """Seconds per call of every work in every round, by ``clock``; processor seconds when None.

    All works get blocks of equal length in calls, chosen so that the first one's block lasts ``BLOCK_SECONDS``.
    """
    clock = clock or timed
    names = list(works)
    times = block(works[names[0]], clock)
    for name in names[1:]:
        block(works[name], clock)
    found: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            turned = names[number % len(names) :] + names[: number % len(names)]
            for name in turned if number % 2 else reversed(turned):
                found[name].append(clock(works[name], times))
    finally:
        if collecting:
            gc.enable()
    return found
