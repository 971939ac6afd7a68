"""Crossover: a part of one design takes the place of a part of another where both have the same type.

A part is a value with all it is computed from. Cut at the slot's way in it is a beginning, what stays of the receiver is the end; drawn
the other way round, beginnings and ends change hands. Two whole designs may also be laid side by side.
"""

from __future__ import annotations

from esper_core.blueprint.interface import SlotInterface
from esper_core.blueprint.ir import INPUT, BlueprintIR
from esper_core.errors import InvalidInput
from services.karn.dice import Dice
from services.karn.draft import Draft, form

TRIES = 12
SIDE_BY_SIDE = 0.2
"""How often whole designs are added rather than parts exchanged."""


def cross(
    receiver: BlueprintIR, donor: BlueprintIR, interface: SlotInterface, dice: Dice, generation: int = 0
) -> BlueprintIR | None:
    """A child of both, valid at ``interface`` and equal to neither; None when no cut of theirs gives one.

    Raises:
        InvalidInput: one of them does not fit ``interface``.
    """
    known = {form(receiver), form(donor)}
    for _ in range(TRIES):
        draft, other = Draft.of(receiver, interface), Draft.of(donor, interface)
        try:
            if dice.chance(SIDE_BY_SIDE):
                draft.output = draft.add("add", draft.output, draft.adopt(other, other.output))
            elif not _exchange(draft, other, dice):
                continue
            child = draft.finished(generation, (receiver.id, donor.id))
        except InvalidInput:
            continue
        if form(child) not in known:
            return child
    return None


def _exchange(draft: Draft, other: Draft, dice: Dice) -> bool:
    """Whether there was a cut of the same type in both."""
    cuts = [
        (here, there)
        for here in draft.nodes
        if here != draft.output
        for there in other.nodes
        if there != other.output and draft.shapes[here] == other.shapes[there] and _rank(draft, here) and there != INPUT
    ]
    if not cuts:
        return False
    here, there = dice.pick(cuts)
    before = frozenset(draft.nodes)
    new = draft.adopt(other, there)
    draft.redirect(here, new, frozenset(draft.nodes) - before)
    return True


def _rank(draft: Draft, name: str) -> bool:
    """Pooled values are not cut at: a gate without its reading says nothing."""
    return len(draft.shapes[name]) == len(draft.interface.in_shape)
