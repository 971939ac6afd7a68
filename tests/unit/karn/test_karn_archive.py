"""Worth, the archive's cells, the surrogate's intervals, and what is proposed from them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from esper_core.blueprint.interface import Layout, SlotInterface
from esper_core.blueprint.widening import units
from esper_core.kernel.record import Lesson
from services.karn.archive import COSTS, EMPTY, LEANINGS, Archive
from services.karn.breed import Breeder, Habits, founders
from services.karn.design import TERMS, Design, Fieldwork, Specimen, level_for, standing
from services.karn.dice import Dice
from services.karn.grammar import sprout
from services.karn.surrogate import Forest, Surrogate
from services.karn.traits import TRAITS, traits

SLOT = SlotInterface(
    layout=Layout.FEATURES, in_width=16, out_width=16, hidden_width=2, activation="relu", foldable=True
)
PLAIN, BEYOND = ("linear", "rectified"), ("product", "periodic")


def lessons(plain: float, beyond: float, level: int = 1) -> tuple[Lesson, ...]:
    shares = dict.fromkeys(PLAIN, plain) | dict.fromkeys(BEYOND, beyond)
    return tuple(Lesson(name=name, level=level, explained=share, steps=1) for name, share in shares.items())


def specimen(design: Design, plain: float, beyond: float, **known: object) -> Specimen:
    return Specimen(design, lessons(plain, beyond), **known)  # type: ignore[arg-type]


def measured(design: Design) -> Specimen:
    """Learns by a rule: what its units and its bends give."""
    capacity = 1 - math.exp(-design.units / 6)
    bent = any(node.op in ("activation", "multiply") for node in design.ir.nodes)
    return specimen(design, capacity, 0.8 * capacity * bent)


def test_cost_is_counted_in_host_units() -> None:
    by_width = {each.ir.symbols["width"]: each for each in founders(SLOT) if each.ir.name == "bottleneck_mlp"}
    for width, design in by_width.items():
        assert design.units == pytest.approx(width, rel=0.15)
        assert units(design.ir, SLOT) == width


def test_worth_is_what_is_learned_less_rent_plus_what_runs_say() -> None:
    design = founders(SLOT)[1]
    plain = specimen(design, 0.9, 0.5)
    assert plain.worth(1) == pytest.approx(0.7 - TERMS.rent * design.units)
    assert plain.leaning(1) == pytest.approx(0.5 / 1.4)
    kept, lost = (specimen(design, 0.9, 0.5, field=Fieldwork(*each)) for each in ((9, 9, 0), (9, 0, 9)))
    assert kept.worth(1) == pytest.approx(plain.worth(1) + TERMS.field * 0.75)
    assert lost.worth(1) == pytest.approx(plain.worth(1) - TERMS.field)
    assert standing(Fieldwork(1, 1, 0)) == 0.25
    assert standing(Fieldwork(4, 2, 0)) == 0


def test_the_level_rises_when_one_is_mastered() -> None:
    design = founders(SLOT)[0]
    assert level_for([]) == 1
    assert level_for([Specimen(design, lessons(0.7, 0.7))]) == 1
    mastered = lessons(0.9, 0.9)
    assert level_for([Specimen(design, mastered + lessons(0.2, 0.2, 2))]) == 2
    assert level_for([Specimen(design, mastered + lessons(0.9, 0.9, 2) + lessons(0.9, 0.9, 3))]) == 3


def test_a_cell_keeps_its_best_and_the_score_is_their_sum() -> None:
    one, other = founders(SLOT)[:2]
    found = Archive([specimen(one, 0.6, 0.3), specimen(other, 0.8, 0.4)], 1)
    assert [elite.specimen.design for elite in found.elites] == [other, one]
    assert found.coverage == pytest.approx(2 / (COSTS * LEANINGS))
    assert found.score == pytest.approx(sum(elite.worth for elite in found.elites))
    assert found.best == found.elites[0].worth == found.incumbent(other.units, 1 / 3)
    assert found.incumbent(40, 0.9) == EMPTY
    again = Archive([specimen(one, 0.6, 0.3), specimen(one, 0.61, 0.31)], 1)
    assert [elite.worth for elite in again.elites] == [pytest.approx(0.46 - TERMS.rent * one.units)]
    empty = Archive([], 1)
    assert (empty.elites, empty.coverage, empty.score, empty.best) == ([], 0.0, 0.0, 0.0)


def test_intervals_hold_nine_in_ten_of_what_was_not_seen() -> None:
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(260, 6))
    figures = np.tanh(rows[:, 0]) + 0.5 * rows[:, 1] * (rows[:, 2] > 0) + 0.2 * draw.normal(size=260)
    guesses = Forest(rows[:120], figures[:120]).guess(rows[120:])
    inside = [low <= y <= high for y, (low, high) in zip(figures[120:], (g.interval for g in guesses), strict=True)]
    assert 0.83 <= np.mean(inside) <= 0.97
    errors = np.abs([guess.mean for guess in guesses] - figures[120:])
    assert errors.mean() < 0.75 * np.abs(figures[120:] - figures[:120].mean()).mean()


def test_a_surrogate_tells_more_capable_designs_from_less() -> None:
    dice = Dice(1)
    known = [measured(Design(sprout(SLOT, dice), SLOT)) for _ in range(60)]
    fresh = [Design(sprout(SLOT, dice), SLOT) for _ in range(40)]
    guesses = [each.learned.mean for each in Surrogate(known, 1).expect(fresh)]
    truth = [measured(design).learned(1) for design in fresh]
    assert np.corrcoef(guesses, truth)[0, 1] > 0.8
    assert Surrogate(known, 1).expect(fresh)[0].log_seconds is None


@pytest.mark.parametrize("layout", ["features", "image"])
def test_traits_are_finite_and_of_order_one(layout: str) -> None:
    dice = Dice(2)
    rows = np.stack([traits(Design(sprout(SLOT, dice), SLOT)) for _ in range(50)])
    assert rows.shape == (50, len(TRAITS))
    assert np.isfinite(rows).all()
    assert np.abs(rows).max() < 30


def test_nothing_known_means_the_catalogue_then_random_designs() -> None:
    found = Breeder(SLOT, []).propose(20, Dice(1), 0)
    operators = [each.operator for each in found]
    assert operators == ["catalogue"] * len(founders(SLOT)) + ["sprout"] * (20 - len(founders(SLOT)))
    assert all(each.expected is None for each in found)


def test_good_designs_of_another_slot_are_tried_first_at_a_new_one() -> None:
    dice = Dice(3)
    other = SLOT.model_copy(update={"in_width": 24})
    good = Design(sprout(other, dice), other)
    first = Breeder(SLOT, [], transplants=[good]).propose(2, Dice(1), 0)
    assert (first[0].operator, first[0].design.ir, first[0].design.interface) == ("transplant", good.ir, SLOT)


def test_proposals_are_new_valid_and_explain_themselves() -> None:
    dice = Dice(4)
    known = [measured(Design(sprout(SLOT, dice), SLOT)) for _ in range(40)]
    barred = {Design(sprout(SLOT, dice), SLOT).form for _ in range(30)}
    breeder = Breeder(SLOT, known, barred=barred)
    found = breeder.propose(12, Dice(5), 3)
    forms = {each.design.form for each in found}
    assert len(forms) == 12
    assert not forms & (barred | {each.design.form for each in known})
    elites = {elite.specimen.design.blueprint_id for elite in breeder.archive.elites}
    for each in found:
        assert each.expected is not None
        assert each.worth is not None
        assert each.design.analysis.parameters > 0
        assert set(each.design.ir.parent_ids) == {parent.blueprint_id for parent in each.parents} <= elites
        assert each.why.startswith(each.operator)
        assert f"{each.worth.mean:.3f} ± {each.worth.half_width:.3f}" in each.why
    assert breeder.propose(12, Dice(5), 3) == found


def test_the_catalogue_s_own_blueprint_is_named_as_parent_not_a_copy_of_it() -> None:
    known = [measured(founder) for founder in founders(SLOT)]
    ids = {founder.ir.id for founder in founders(SLOT)} | {founder.source_id for founder in founders(SLOT)}
    children = [
        each for each in Breeder(SLOT, known, habits=Habits(sprouting=0)).propose(10, Dice(1), 1) if each.parents
    ]
    named = {parent for child in children for parent in child.design.ir.parent_ids}
    assert named <= {founder.source_id for founder in founders(SLOT)} < ids


def test_screening_fills_the_archive_faster_than_taking_children_as_they_come() -> None:
    dice = Dice(6)
    known = [measured(Design(sprout(SLOT, dice), SLOT)) for _ in range(60)]
    gains = []
    for seed in range(3):
        screened, plain = (
            Archive([*known, *(measured(each.design) for each in found)], 1).score - Archive(known, 1).score
            for found in (
                Breeder(SLOT, known, habits=Habits(surrogate=surrogate)).propose(16, Dice(seed), 1)
                for surrogate in (True, False)
            )
        )
        gains.append(screened - plain)
    assert np.mean(gains) > 0.1
