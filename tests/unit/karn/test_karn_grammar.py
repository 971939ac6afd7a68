"""Invented designs are valid, silent at first, affordable and buildable, whatever they were bred from."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_core.blueprint.build import build, example_input
from esper_core.blueprint.catalogue import WIDTHS, candidates
from esper_core.blueprint.interface import Layout, SlotInterface
from esper_core.blueprint.ir import BlueprintIR
from esper_core.blueprint.widening import units
from esper_core.errors import InvalidInput, Unsupported
from services.karn.breed import founders
from services.karn.cross import cross
from services.karn.dice import Dice
from services.karn.draft import Draft, allowance, fits, form
from services.karn.grammar import sprout
from services.karn.mutate import OPERATORS, attempt, mutate
from tests.unit.blueprint.conftest import INTERFACES

SLOTS = st.sampled_from(sorted(INTERFACES))
SEEDS = st.integers(0, 2**32 - 1)


def bred(slot: SlotInterface, seed: int, generations: int) -> list[BlueprintIR]:
    """A line of descendants, of one parent and of two in turn."""
    dice = Dice(seed)
    line = [sprout(slot, dice), dice.pick(founders(slot)).ir]
    for generation in range(generations):
        if generation % 3 == 2 and (child := cross(dice.pick(line), dice.pick(line), slot, dice, generation)):
            line.append(child)
        else:
            line.append(mutate(line[-1], slot, dice, generation)[0])
    return line


@settings(max_examples=60, deadline=None)
@given(name=SLOTS, seed=SEEDS)
def test_whatever_is_bred_adds_nothing_at_first_and_learns(name: str, seed: int) -> None:
    slot = INTERFACES[name]
    for ir in bred(slot, seed, 6)[2:]:
        kernel = build(ir, slot)
        found = kernel(example_input(slot, 3, seed=1))
        assert found.shape[1:] == (slot.out_shape if slot.in_size or slot.layout is not Layout.TOKENS else (16, 10))
        assert torch.count_nonzero(found) == 0
        found.square().sum().add(found.sum()).backward()
        gradients = [parameter.grad for parameter in kernel.parameters() if parameter.grad is not None]
        assert any(bool(gradient.any()) for gradient in gradients), ir.model_dump_json()
        assert kernel.analysis.parameters <= allowance(slot).parameters


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS)
def test_over_tokens_nothing_looks_ahead(seed: int) -> None:
    slot = INTERFACES["tokens"]
    for ir in bred(slot, seed, 4):
        kernel = build(ir, slot)
        with torch.no_grad():
            for parameter in kernel.parameters():
                parameter.add_(0.1)
        x = example_input(slot, 2, seed=1)
        changed = x.clone()
        changed[:, 5:] += 1.0
        assert torch.allclose(kernel(x)[:, :5], kernel(changed)[:, :5], atol=1e-5), ir.model_dump_json()


def test_all_but_a_few_offspring_are_valid_over_thousands() -> None:
    born, valid = 0, 0
    for name, slot in INTERFACES.items():
        dice = Dice(7, name)
        pool = [sprout(slot, dice) for _ in range(20)] + [founder.ir for founder in founders(slot)]
        for generation in range(90):
            mother, father = dice.pick(pool), dice.pick(pool)
            for child in (_mutated(mother, slot, dice, generation), cross(mother, father, slot, dice, generation)):
                born += 1
                if child is not None and fits(child, slot):
                    valid += 1
                    pool.append(child)
    assert born == 2 * 90 * len(INTERFACES) > 2000
    assert valid >= 0.95 * born  # crossing twins, or two without a cut in common, gives no child
    assert _mutants_valid() == 1.0


def _mutated(parent: BlueprintIR, slot: SlotInterface, dice: Dice, generation: int) -> BlueprintIR | None:
    try:
        return mutate(parent, slot, dice, generation)[0]
    except Unsupported:
        return None


def _mutants_valid() -> float:
    """Share of mutants that are valid, over a long unselected line at every slot."""
    found = []
    for name, slot in INTERFACES.items():
        dice = Dice(9, name)
        child = sprout(slot, dice)
        for generation in range(60):
            child = mutate(child, slot, dice, generation)[0]
            found.append(fits(child, slot) is not None)
    return sum(found) / len(found)


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_finds_something_to_change(operator: str) -> None:
    done = Counter[bool]()
    for name, slot in INTERFACES.items():
        dice = Dice(3, name, operator)
        for _ in range(12):
            parent = mutate(sprout(slot, dice), slot, dice)[0]
            child = attempt(operator, parent, slot, dice)
            done[child is not None] += 1
            if child is not None:
                assert child.parent_ids == (parent.id,)
                assert form(child) != form(parent)
    assert done[True] >= 5


def test_names_are_readable_unique_and_say_the_generation() -> None:
    slot = INTERFACES["features"]
    dice, line = Dice(1), [founders(slot)[0].ir]
    for generation in range(30):
        line.append(mutate(line[-1], slot, dice, generation)[0])
    assert len({ir.name for ir in line}) == len({form(ir) for ir in line})
    assert all(ir.name.startswith("bottleneck_mlp-g") for ir in line[1:])
    assert len(line[-1].name) < 80


@pytest.mark.parametrize("name", ["features", "tokens", "image", "features-norm", "image-norm"])
def test_mutation_reaches_wideners_in_widths_that_the_catalogue_lacks(name: str) -> None:
    slot = INTERFACES[name]
    known = {units(ir, slot, symbols) for _, ir, symbols in candidates(slot)}
    assert known >= set(WIDTHS)
    dice, found = Dice(2, name), set[int]()
    for _ in range(300):
        found.add(units(mutate(founders(slot)[0].ir, slot, dice)[0], slot))
    assert len(found - known - {0}) >= 3


def test_equal_designs_have_one_form_whatever_they_are_called() -> None:
    slot = INTERFACES["features"]
    one = founders(slot)[0].ir
    renamed = Draft.of(one, slot).finished(3)
    assert renamed.name != one.name
    assert form(renamed) == form(one)
    assert form(one.model_copy(update={"symbols": {"width": 5}})) != form(one)


def test_a_parent_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidInput):
        mutate(founders(INTERFACES["image"])[0].ir, INTERFACES["features"], Dice(1))


def test_equal_seeds_breed_equal_designs() -> None:
    slot = INTERFACES["image"]
    assert bred(slot, 5, 6) == bred(slot, 5, 6)
    assert bred(slot, 5, 6) != bred(slot, 6, 6)


def test_children_of_two_carry_parts_of_both() -> None:
    slot = INTERFACES["image"]
    squeeze = next(each.ir for each in founders(slot) if each.ir.name == "squeeze_excite")
    filters = next(each.ir for each in founders(slot) if each.ir.name == "conv_bypass_3x3")
    children = [cross(squeeze, filters, slot, Dice(seed)) for seed in range(40)]
    born = [child for child in children if child is not None]
    assert len(born) >= 35
    assert all(child.parent_ids == (squeeze.id, filters.id) for child in born)
    both = [child for child in born if {"global_average_pool", "source_conv"} <= {node.op for node in child.nodes}]
    assert len(both) >= 10
