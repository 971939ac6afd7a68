"""The archive: of every kind of design the best one, in a grid of cost × behaviour (MAP-Elites, Mouret and Clune 2015; by ribs).

A cell's coordinates are the logarithm of a design's cost in host units and its leaning (see ``services.karn.design``). Derived: it is
filled again from what is known whenever that is read, so that a rise of level or news from the field re-ranks everything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ribs.archives import GridArchive

from services.karn.design import TERMS, Specimen, Terms

COSTS, LEANINGS = 12, 10
"""Cells along each axis."""
COST_RANGE = (-2.0, 6.5)
"""log2 of the cost in host units, a quarter of one to ninety."""
LEANING_RANGE = (0.0, 1.0)
EMPTY = 0.0
"""What an empty cell is worth: adding nothing."""


@dataclass(frozen=True)
class Elite:
    """The best known design of a cell."""

    specimen: Specimen
    worth: float
    cell: tuple[int, int]
    """Position along cost and leaning."""


class Archive:
    """The elites of one interface at one level of exercises."""

    def __init__(self, specimens: Sequence[Specimen], level: int, terms: Terms = TERMS) -> None:
        self.level = level
        self._specimens = list(specimens)
        self._grid = GridArchive(
            solution_dim=1,
            dims=(COSTS, LEANINGS),
            ranges=(COST_RANGE, LEANING_RANGE),
            qd_score_offset=EMPTY,
            seed=0,
        )
        if specimens:
            worths = [specimen.worth(level, terms) for specimen in specimens]
            places = [place(specimen.design.units, specimen.leaning(level)) for specimen in specimens]
            self._grid.add(np.arange(len(specimens))[:, None], np.array(worths), np.array(places))

    @property
    def elites(self) -> list[Elite]:
        """One per filled cell, best first."""
        data = self._grid.data(("solution", "objective", "index"))
        cells = list(self._grid.int_to_grid_index(data["index"])) if len(data["index"]) else []
        found = [
            Elite(self._specimens[int(solution[0])], float(worth), (int(cell[0]), int(cell[1])))
            for solution, worth, cell in zip(data["solution"], data["objective"], cells, strict=True)
        ]
        return sorted(found, key=lambda elite: (-elite.worth, elite.specimen.design.form))

    @property
    def coverage(self) -> float:
        """Share of the cells that are filled."""
        return float(self._grid.stats.coverage)

    @property
    def score(self) -> float:
        """QD-score: worth of all elites above ``EMPTY`` together; those below count as nothing."""
        return sum(max(0.0, elite.worth - EMPTY) for elite in self.elites)

    @property
    def best(self) -> float:
        """Worth of the best; 0 when there is none."""
        return max((elite.worth for elite in self.elites), default=0.0)

    def incumbent(self, units: float, leaning: float) -> float:
        """Worth of the best known design of the kind; ``EMPTY`` where there is none, or a worse one."""
        occupied, data = self._grid.retrieve_single(np.array(place(units, leaning)))
        return max(EMPTY, float(data["objective"])) if occupied else EMPTY


def place(units: float, leaning: float) -> tuple[float, float]:
    """Where a design of that cost and leaning belongs."""
    return math.log2(max(units, 1e-9)), leaning
