"""A design at a slot, and what became known of it: what it learned, what it costs, and how it fared in real runs.

Worth = mean share of the exercises learned − rent for cost + what the field says. Cost is counted in units of the host's own spanned
layer, so that it means the same at every slot. Free of torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from pydantic import BaseModel, ConfigDict, Field

from esper_core.blueprint.analyse import Analysis, analyse
from esper_core.blueprint.interface import Layout, SlotInterface
from esper_core.blueprint.ir import BlueprintIR
from esper_core.kernel.record import Lesson
from services.karn.draft import form, unit

BEYOND: Mapping[Layout, frozenset[str]] = {
    Layout.FEATURES: frozenset({"product", "periodic"}),
    Layout.TOKENS: frozenset({"earlier"}),
    Layout.IMAGE: frozenset({"gated"}),
}
"""Exercises that ask for more than one bent layer at one place: products of features, other tokens, the whole image."""
LEVELS = (1, 2, 3)
"""Of the exercises, as Urabrask gives them."""
MASTERED = 0.75
"""An archive whose best design learns this share of a level's exercises is asked for the next level as well."""


class Terms(BaseModel):
    """What a design's worth is made of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rent: float = Field(0.004, ge=0)
    """Share of the exercises that must be learned for each host unit's worth of parameters or time."""
    field: float = Field(0.1, ge=0)
    """Most that being grafted in real runs can add or take."""


TERMS = Terms()


@dataclass(frozen=True)
class Design:
    """A blueprint at an interface, its symbols at their defaults."""

    ir: BlueprintIR
    interface: SlotInterface
    source_id: str = ""
    """The library's blueprint when that has other defaults; empty when it is ``ir`` itself."""

    @property
    def blueprint_id(self) -> str:
        """As the library knows it."""
        return self.source_id or self.ir.id

    @cached_property
    def form(self) -> str:
        """Names what it computes."""
        return form(self.ir)

    @cached_property
    def analysis(self) -> Analysis:
        """Raises: InvalidInput: it does not fit its interface."""
        return analyse(self.ir, self.interface)

    @cached_property
    def units(self) -> float:
        """Its cost: host units whose parameters, or whose arithmetic, it takes, whichever is more."""
        parameters, flops = unit(self.interface)
        return max(self.analysis.parameters / parameters, self.analysis.flops / flops)


@dataclass(frozen=True)
class Fieldwork:
    """How a design fared where it was really grafted."""

    grafts: int = 0
    kept: int = 0
    rolled_back: int = 0


UNTRIED = Fieldwork()


@dataclass(frozen=True)
class Specimen:
    """A design that Urabrask has measured and found fit.

    Attributes:
        lessons: what it learned.
        forward_seconds: measured time of one sample; None where nobody timed it.
        field: what came of it in runs.
    """

    design: Design
    lessons: tuple[Lesson, ...]
    forward_seconds: float | None = None
    field: Fieldwork = UNTRIED

    def learned(self, level: int) -> float:
        """Mean share of the exercises up to ``level`` that it learned; 0 when it was given none."""
        return _mean([lesson.explained for lesson in self.lessons if lesson.level <= level])

    def leaning(self, level: int) -> float:
        """0 … 1: how much of what it learned lies beyond what one bent layer does; its behaviour in the archive."""
        beyond = BEYOND[self.design.interface.layout]
        parts = [
            _mean(
                [
                    max(0.0, lesson.explained)
                    for lesson in self.lessons
                    if lesson.level <= level and (lesson.name in beyond) is side
                ]
            )
            for side in (True, False)
        ]
        return parts[0] / total if (total := sum(parts)) > 0 else 0.0

    def worth(self, level: int, terms: Terms = TERMS) -> float:
        """What the archive ranks by."""
        return self.learned(level) - terms.rent * self.design.units + terms.field * standing(self.field)


def standing(found: Fieldwork) -> float:
    """-1 … 1: grafts kept against grafts lost, a rollback counting twice; a few grafts say little."""
    lost = found.grafts - found.kept + found.rolled_back
    return max(-1.0, (found.kept - lost) / (found.grafts + 3)) if found.grafts else 0.0


def level_for(specimens: Sequence[Specimen]) -> int:
    """The highest level whose predecessors are all mastered."""
    for level in LEVELS:
        best = max((_at(specimen, level) for specimen in specimens), default=0.0)
        if best < MASTERED:
            return level
    return LEVELS[-1]


def _at(specimen: Specimen, level: int) -> float:
    return _mean([lesson.explained for lesson in specimen.lessons if lesson.level == level])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
