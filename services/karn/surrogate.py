"""The surrogate: guesses from a design's traits what it will learn, and says how far off it may be.

Bagged extremely randomised trees (Geurts et al. 2006). What trees that did not see a design say of it is held against what came of it;
the spread among trees is then stretched until nine in ten of those errors lie inside the interval (jackknife+-after-bootstrap, Kim et
al. 2020, as a scale). Whether that holds for designs not yet measured, only measuring them shows: the bench reports it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.ensemble import ExtraTreesRegressor

from services.karn.design import Design, Specimen
from services.karn.traits import Vector, traits

TREES = 60
FEWEST = 12
"""Measured designs without which nothing is guessed."""
COVERED = 0.9
"""Share of outcomes that an interval shall hold."""
NORMAL = 1.6449
"""Half width of a normal distribution's 90 % interval, in standard deviations."""
LEAST_SPREAD = 0.01


@dataclass(frozen=True)
class Guess:
    """What is expected, with a standard deviation so scaled that mean ± ``NORMAL`` of them holds nine in ten."""

    mean: float
    deviation: float

    @property
    def half_width(self) -> float:
        """Of the 90 % interval."""
        return NORMAL * self.deviation

    @property
    def interval(self) -> tuple[float, float]:
        """The 90 % interval."""
        return self.mean - self.half_width, self.mean + self.half_width


class Forest:
    """Guesses one figure."""

    def __init__(self, rows: Vector, figures: Vector) -> None:
        self._trees = ExtraTreesRegressor(TREES, bootstrap=True, min_samples_leaf=2, random_state=0)  # type: ignore[no-untyped-call]
        self._trees.fit(rows, figures)
        everyone = self._each(rows)  # (trees, rows)
        unseen = np.ones_like(everyone, dtype=bool)
        for tree, seen in enumerate(self._trees.estimators_samples_):
            unseen[tree, seen] = False
        judged = unseen.sum(0) >= 2
        told = np.where(unseen, everyone, np.nan)[:, judged]
        errors = np.abs(np.nanmean(told, 0) - figures[judged]) / _spread(np.nanstd(told, 0))
        rank = math.ceil(COVERED * (len(errors) + 1)) - 1
        worst = float(np.sort(errors)[min(rank, len(errors) - 1)]) if len(errors) else NORMAL
        self._stretch = worst / NORMAL

    def guess(self, rows: Vector) -> list[Guess]:
        """One per row."""
        each = self._each(rows)
        spread = _spread(each.std(0)) * self._stretch
        return [Guess(float(mean), float(sd)) for mean, sd in zip(each.mean(0), spread, strict=True)]

    def _each(self, rows: Vector) -> Vector:
        return np.stack([tree.predict(rows.astype(np.float32)) for tree in self._trees.estimators_])


@dataclass(frozen=True)
class Expected:
    """Guesses about one design."""

    learned: Guess
    leaning: Guess
    log_seconds: Guess | None
    """Of the time one sample takes; None where too few were timed."""


class Surrogate:
    """What is learnt from every design measured at one interface, at one level."""

    def __init__(self, specimens: Sequence[Specimen], level: int) -> None:
        rows = np.stack([traits(specimen.design) for specimen in specimens])
        self._learned = Forest(rows, np.array([specimen.learned(level) for specimen in specimens]))
        self._leaning = Forest(rows, np.array([specimen.leaning(level) for specimen in specimens]))
        timed = [(row, each.forward_seconds) for row, each in zip(rows, specimens, strict=True) if each.forward_seconds]
        self._seconds = (
            Forest(np.stack([row for row, _ in timed]), np.log([seconds for _, seconds in timed]))
            if len(timed) >= FEWEST
            else None
        )

    def expect(self, designs: Sequence[Design]) -> list[Expected]:
        """One per design."""
        rows = np.stack([traits(design) for design in designs])
        seconds = self._seconds.guess(rows) if self._seconds else [None] * len(designs)
        return [
            Expected(*each) for each in zip(self._learned.guess(rows), self._leaning.guess(rows), seconds, strict=True)
        ]


def _spread(deviations: Vector) -> Vector:
    return np.sqrt(deviations**2 + LEAST_SPREAD**2)
