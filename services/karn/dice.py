"""Seeded chance: equal seeds breed equal designs."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Dice:
    """Draws from a seed; ``words`` tell draws of one seed apart, for example search, generation and interface."""

    def __init__(self, seed: int, *words: object) -> None:
        self._draw = np.random.default_rng([seed, *(zlib.crc32(str(word).encode()) for word in words)])

    def pick(self, choices: Sequence[T], weights: Sequence[float] | None = None) -> T:
        """One of ``choices``, more often where ``weights`` (not all 0) are larger."""
        if weights is None:
            return choices[int(self._draw.integers(len(choices)))]
        bounds = np.cumsum(weights)
        return choices[min(int(np.searchsorted(bounds, self._draw.random() * bounds[-1], "right")), len(choices) - 1)]

    def below(self, bound: int) -> int:
        """A whole number from 0 to ``bound - 1``."""
        return int(self._draw.integers(bound))

    def chance(self, probability: float) -> bool:
        """True with that probability."""
        return bool(self._draw.random() < probability)
