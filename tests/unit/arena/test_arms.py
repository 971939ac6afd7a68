"""Every arm on a small contest, in this process: what is trained, where it grows, and that arms share what they must."""

from __future__ import annotations

import pytest

from esper_core.errors import InvalidInput
from services.tolaria.arena.arms import ARMS, chosen
from services.tolaria.arena.trial import Row
from tests.unit.arena.contests import contest

TASK = contest()
SETUP = TASK.make(3)


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    found: dict[str, Row] = {}
    for name in chosen(",".join(ARMS)):
        row = ARMS[name].run(TASK, SETUP, name, 3, found)
        if row is not None:
            found[name] = row
    return found


def test_every_arm_applies_to_a_planted_network(rows: dict[str, Row]) -> None:
    assert set(rows) == set(ARMS)


def test_growing_finds_the_narrow_layer_and_pays(rows: dict[str, Row]) -> None:
    assert rows["esper"].slots[0] == "2:4"
    assert rows["esper"].kept
    assert (rows["esper"].accuracy or 0) > (rows["none"].accuracy or 0)
    assert rows["esper"].insertion_change == 0
    assert (rows["esper"].fold_change or 0) <= 1e-5
    assert rows["esper"].scoring_flops > 0


def test_the_planted_arm_grows_there_and_nowhere_else(rows: dict[str, Row]) -> None:
    assert rows["planted"].slots == ("2:4",)


def test_turns_go_round_all_slots(rows: dict[str, Row]) -> None:
    assert len(set(rows["uniform"].slots)) > 1
    assert len(rows["uniform"].slots) >= len(rows["schedule"].slots)


def test_the_static_arms_have_the_final_shape(rows: dict[str, Row]) -> None:
    grown = rows["esper"].before + rows["esper"].added
    assert rows["static"].before == rows["static-flops"].before == grown
    assert rows["static"].steps == rows["esper"].steps
    per_step = rows["static-flops"].flops // rows["static-flops"].steps
    epoch = per_step * rows["static"].steps // TASK.epochs
    assert abs(rows["static-flops"].flops - rows["esper"].flops) <= epoch


def test_kernels_are_taught_as_the_arm_says(rows: dict[str, Row]) -> None:
    ends = {name: rows[name].loss for name in ("esper", "reconstruction", "silent")}
    assert len(set(ends.values())) == len(ends)
    assert all(rows[name].kept for name in ends)


def test_none_is_plain_training(rows: dict[str, Row]) -> None:
    again = ARMS["none"].run(TASK, SETUP, "none", 3, {})
    assert again is not None
    assert (again.accuracy, again.loss) == (rows["none"].accuracy, rows["none"].loss)


def test_an_unknown_arm_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InvalidInput) as caught:
        chosen("none,gradmx")
    assert "gradmax" in caught.value.hint


def test_arms_bring_those_they_need() -> None:
    assert chosen("static") == ["esper", "static"]
