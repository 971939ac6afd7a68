"""Breeding: from what is known at one interface to the designs most worth measuring next, each with its reasons.

Parents come from the archive. Many more children are bred than can be measured; the surrogate guesses what each would learn, and those
are proposed from which most improvement is to be expected: over the elite of their own cell (an empty cell counts as nothing), and
over the best of all. Something is added for being unlike all that was measured, and a share is drawn blindly, which keeps the
surrogate honest. Without enough measurements, and without surrogate, children are proposed as they come.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from esper_core.blueprint.catalogue import candidates
from esper_core.blueprint.interface import SlotInterface
from esper_core.blueprint.ir import BlueprintIR
from esper_core.errors import Unsupported
from services.karn.archive import Archive, Elite
from services.karn.cross import cross
from services.karn.design import TERMS, Design, Specimen, Terms
from services.karn.dice import Dice
from services.karn.draft import fits
from services.karn.grammar import sprout
from services.karn.mutate import mutate
from services.karn.surrogate import FEWEST, Expected, Guess, Surrogate
from services.karn.traits import Vector, traits

MAX_TRIES = 20
"""Failed draws per wished child before fewer children are accepted."""


class Habits(BaseModel):
    """How Karn breeds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pool: int = Field(12, ge=1, le=100)
    """Children bred for each that is proposed."""
    crossing: float = Field(0.3, ge=0, le=1)
    """Share of children with two parents."""
    sprouting: float = Field(0.1, ge=0, le=1)
    """Share of children without any."""
    blind: float = Field(0.125, ge=0, le=1)
    """Share of proposals drawn without asking the surrogate."""
    novelty: float = Field(0.02, ge=0)
    """Worth of being wholly unlike everything measured."""
    ambition: float = Field(2.0, ge=0)
    """How much more improving on the best of all counts than improving on one's cell."""
    surrogate: bool = True
    """Whether children are screened at all."""


HABITS = Habits()


@dataclass(frozen=True)
class Proposal:
    """A design worth measuring, and why."""

    design: Design
    parents: tuple[Design, ...]
    operator: str
    expected: Expected | None
    """None where there was too little to guess from."""
    worth: Guess | None
    novelty: float | None
    why: str


@dataclass(frozen=True)
class _Child:
    design: Design
    parents: tuple[Elite, ...]
    operator: str


def founders(interface: SlotInterface) -> list[Design]:
    """The built-in designs and widths that fit the slot."""
    return [
        Design(ir.model_copy(update={"symbols": ir.bind(symbols)}), interface, ir.id)
        for _, ir, symbols in candidates(interface)
    ]


class Breeder:
    """Breeds for one interface.

    Args:
        interface: the slot's.
        specimens: everything measured and found fit there.
        barred: forms not to be proposed: measured, rejected, or under way.
        level: of the exercises.
        transplants: good designs of other interfaces, tried first where nothing is known yet.
    """

    def __init__(
        self,
        interface: SlotInterface,
        specimens: Sequence[Specimen],
        *,
        barred: Collection[str] = (),
        level: int = 1,
        habits: Habits = HABITS,
        terms: Terms = TERMS,
        transplants: Sequence[Design] = (),
    ) -> None:
        self._interface, self._habits, self._terms, self._level = interface, habits, terms, level
        self._transplants = transplants
        self.archive = Archive(specimens, level, terms)
        self._barred = {*barred, *(specimen.design.form for specimen in specimens)}
        self._elites = self.archive.elites
        self._rows = np.stack([traits(each.design) for each in specimens]) if specimens else None
        guessing = habits.surrogate and len(specimens) >= FEWEST
        self.surrogate = Surrogate(specimens, level) if guessing else None

    def propose(self, count: int, dice: Dice, generation: int) -> list[Proposal]:
        """Up to ``count`` new designs; fewer when nothing new could be bred."""
        if not self._elites:
            return [self._plain(child) for child in self._first(count, dice)]
        children = self._children(count * (self._habits.pool if self.surrogate else 1), dice, generation)
        if self.surrogate is None or not children:
            return [self._plain(child) for child in children[:count]]
        return self._screened(children, count, dice)

    def _first(self, count: int, dice: Dice) -> list[_Child]:
        """What did well elsewhere, the catalogue, then random designs."""
        found: dict[str, _Child] = {}
        for other in self._transplants:
            if fits(other.ir, self._interface):
                self._take(found, _Child(Design(other.ir, self._interface, other.source_id), (), "transplant"))
        for founder in founders(self._interface):
            self._take(found, _Child(founder, (), "catalogue"))
        for _ in range(count * MAX_TRIES):
            if len(found) >= count:
                break
            self._take(found, self._sprouted(dice))
        return list(found.values())[:count]

    def _children(self, count: int, dice: Dice, generation: int) -> list[_Child]:
        found: dict[str, _Child] = {}
        for _ in range(count * MAX_TRIES):
            if len(found) >= count:
                break
            self._take(found, self._child(dice, generation))
        return list(found.values())

    def _take(self, found: dict[str, _Child], child: _Child | None) -> None:
        if child is not None and child.design.form not in self._barred:
            found.setdefault(child.design.form, child)

    def _child(self, dice: Dice, generation: int) -> _Child | None:
        if dice.chance(self._habits.sprouting):
            return self._sprouted(dice)
        mother = self._parent(dice)
        if dice.chance(self._habits.crossing) and len(self._elites) > 1:
            father = self._parent(dice)
            ir = cross(mother.specimen.design.ir, father.specimen.design.ir, self._interface, dice, generation)
            return self._born(ir, (mother, father), "cross") if ir is not None else None
        try:
            ir, operator = mutate(mother.specimen.design.ir, self._interface, dice, generation)
        except Unsupported:
            return None
        return self._born(ir, (mother,), operator)

    def _born(self, ir: BlueprintIR, parents: tuple[Elite, ...], operator: str) -> _Child:
        ids = tuple(dict.fromkeys(parent.specimen.design.blueprint_id for parent in parents))
        return _Child(Design(ir.model_copy(update={"parent_ids": ids}), self._interface), parents, operator)

    def _sprouted(self, dice: Dice) -> _Child | None:
        try:
            return _Child(Design(sprout(self._interface, dice), self._interface), (), "sprout")
        except Unsupported:
            return None

    def _parent(self, dice: Dice) -> Elite:
        """Any elite, and as often the better of two."""
        one, other = dice.pick(self._elites), dice.pick(self._elites)
        return max((one, other), key=lambda elite: elite.worth) if dice.chance(0.5) else one

    def _screened(self, children: list[_Child], count: int, dice: Dice) -> list[Proposal]:
        assert self.surrogate is not None  # noqa: S101 - the caller saw to it
        expected = self.surrogate.expect([child.design for child in children])
        novelties = self._novelties(children)
        gains = [self._gain(child, guess) for child, guess in zip(children, expected, strict=True)]
        left = set(range(len(children)))
        crowd: dict[tuple[int, int], int] = {}
        chosen: list[Proposal] = []
        while left and len(chosen) < count:
            blind = dice.chance(self._habits.blind)
            score = {
                index: gains[index] * 0.5 ** crowd.get(_spot(children[index], expected[index]), 0)
                + self._habits.novelty * novelties[index]
                for index in left
            }
            index = dice.pick(sorted(left)) if blind else max(sorted(left), key=lambda each: score[each])
            left.discard(index)
            spot = _spot(children[index], expected[index])
            crowd[spot] = crowd.get(spot, 0) + 1
            how = (
                f"drawn blindly from {len(children)} children"
                if blind
                else f"expected improvement {gains[index]:.3f}, novelty {novelties[index]:.2f}: "
                f"choice {len(chosen) + 1} of {count} among {len(children)} children"
            )
            chosen.append(self._explained(children[index], expected[index], novelties[index], how))
        return chosen

    def _worth(self, child: _Child, guess: Expected) -> Guess:
        return Guess(guess.learned.mean - self._terms.rent * child.design.units, guess.learned.deviation)

    def _gain(self, child: _Child, guess: Expected) -> float:
        """Improvement to be expected over the cell's elite, wherever it may fall, and over the best of all."""
        worth = self._worth(child, guess)
        spots = [min(1.0, max(0.0, guess.leaning.mean + shift * guess.leaning.deviation)) for shift in (-1, 0, 1)]
        cell = [_improvement(worth, self.archive.incumbent(child.design.units, spot)) for spot in spots]
        return sum(cell) / len(cell) + self._habits.ambition * _improvement(worth, self.archive.best)

    def _novelties(self, children: list[_Child]) -> list[float]:
        """0 … 1: distance to the three most similar of what was measured, by what is usual among those."""
        assert self._rows is not None  # noqa: S101 - there is a surrogate
        scale = self._rows.std(0) + 0.1
        known = self._rows / scale
        usual = float(np.median([_nearest(row, known, skip=1) for row in known])) + 1e-9
        return [1 - math.exp(-_nearest(traits(child.design) / scale, known) / (2 * usual)) for child in children]

    def _plain(self, child: _Child) -> Proposal:
        return Proposal(
            child.design,
            _designs(child),
            child.operator,
            None,
            None,
            None,
            f"{_descent(child)}; nothing to guess from yet",
        )

    def _explained(self, child: _Child, guess: Expected, novelty: float, how: str) -> Proposal:
        worth = self._worth(child, guess)
        held = self.archive.incumbent(child.design.units, guess.leaning.mean)
        why = (
            f"{_descent(child)}; expected worth {worth.mean:.3f} ± {worth.half_width:.3f} for {child.design.units:.1f} "
            f"host units, its cell holds {held:.3f}, the best {self.archive.best:.3f}; {how}"
        )
        return Proposal(child.design, _designs(child), child.operator, guess, worth, novelty, why)


def _designs(child: _Child) -> tuple[Design, ...]:
    return tuple(parent.specimen.design for parent in child.parents)


def _descent(child: _Child) -> str:
    names = " × ".join(f"{parent.specimen.design.ir.name} ({parent.worth:.3f})" for parent in child.parents)
    return f"{child.operator} of {names}" if names else child.operator


def _spot(child: _Child, guess: Expected) -> tuple[int, int]:
    return round(math.log2(child.design.units)), round(10 * guess.leaning.mean)


def _nearest(row: Vector, known: Vector, skip: int = 0) -> float:
    distances = np.sort(np.sqrt(((known - row) ** 2).sum(1)))[skip : skip + 3]
    return float(distances.mean()) if len(distances) else 0.0


def _improvement(guess: Guess, over: float) -> float:
    """Mean of max(0, x - over) for a normal x (expected improvement, Mockus 1978)."""
    z = (guess.mean - over) / guess.deviation
    density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return guess.deviation * (z * 0.5 * math.erfc(-z / math.sqrt(2)) + density)
