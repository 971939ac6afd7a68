"""The growth bench's verdicts, on rows whose figures can be worked out by hand; every task can be set up."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from services.tolaria.arena.figures import Table
from services.tolaria.arena.task import Task
from services.tolaria.arena.trial import Row
from tests.bench.growth.contest import SUITES, Contest, named
from tests.bench.growth.goals import judged

ALL = [task for tasks in SUITES.values() for task in tasks]


def task(name: str, group: str) -> Task:
    return Task(name, "", lambda _: pytest.fail("not to be set up"), group, torch.optim.Adam)


TASKS = [task("a", "narrow"), task("b", "narrow"), task("c", "healthy"), task("d", "uneven"), task("e", "even")]


def row(name: str, arm: str, seed: int, accuracy: float, slots: Sequence[str] = (), kept: Sequence[str] = ()) -> Row:
    return Row(
        task=name, arm=arm, seed=seed, planted=("right",), accuracy=accuracy, loss=0.0, before=1, slots=tuple(slots),
        kept=tuple(kept), steps=1, flops=100, scoring_flops=7, train_seconds=0.0, evidence=float(len(slots)),
    )  # fmt: skip


def verdicts(*rows: Row) -> dict[str, float | None]:
    found = judged(Contest(Table(rows), TASKS))
    return {name: goal["value"] for name, goal in found.items()}  # type: ignore[misc]


def test_nothing_is_claimed_without_rows() -> None:
    assert set(verdicts().values()) == {None}
    assert all(goal["met"] is None for goal in judged(Contest(Table([]), TASKS)).values())


def test_places_and_false_growth_are_counted() -> None:
    found = verdicts(
        row("a", "esper", 0, 0.9, ["right", "wrong"], ["right"]),
        row("b", "esper", 0, 0.9, ["wrong", "right"], ["right"]),
        row("c", "esper", 0, 0.9, ["wrong"], ["wrong"]),
        row("c", "esper", 1, 0.9),
        row("c", "none", 0, 0.95),
        row("c", "none", 1, 0.9),
    )
    assert found["localise"] == 0.5
    assert found["false growth"] == 0.5
    assert found["do no harm"] == pytest.approx((90 - 95 + 0) / 2)
    assert found["price"] == pytest.approx(0.07)
    assert found["abstain"] == pytest.approx(1.0)
    assert found["gain"] is None, "chance and the best place did not run"


def test_gain_is_pooled_and_parity_is_the_worst_task_s() -> None:
    points = {"a": {"esper": 0.9, "random": 0.5, "planted": 0.8, "static-flops": 0.91},
              "b": {"esper": 0.6, "random": 0.5, "planted": 0.7, "static-flops": 0.5}}  # fmt: skip
    found = verdicts(*(row(name, arm, 0, value) for name, arms in points.items() for arm, value in arms.items()))
    assert found["gain"] == pytest.approx((40 + 10) / (30 + 20))
    assert found["parity"] == pytest.approx(-1.0)
    assert found["superior"] == 0, "one seed is never sure"


def test_rounds_are_held_against_uniform_growth() -> None:
    ours, theirs = (0.6, 0.7, 0.8), (0.5, 0.7, 0.6)
    rows = [row(name, arm, seed, value) for name in ("d", "e") for arm, values in (("esper", ours), ("uniform", theirs))
            for seed, value in enumerate(values)]  # fmt: skip
    found = verdicts(*rows)
    gaps = torch.tensor([10.0, 0.0, 20.0])
    assert found["even rounds"] == pytest.approx(10.0)
    assert found["uneven rounds"] == pytest.approx(float(gaps.mean() / (gaps.std() / 3**0.5)))


@pytest.mark.parametrize("name", [task.name for task in ALL])
def test_every_task_has_equal_networks_of_an_output_per_class(name: str) -> None:
    setup = named(name).make(1)
    one, other = setup.made(), setup.made()
    inputs, targets = setup.data.train.take(torch.arange(8))
    assert torch.equal(one(inputs), other(inputs))
    assert torch.isfinite(setup.data.loss(one(inputs), targets))
    assert one(inputs).shape == (8, setup.data.outputs)
    for span in setup.planted or ():
        for path in span.split(":"):
            one.get_submodule(path)


def test_names_are_told_apart() -> None:
    assert len({task.name for task in ALL}) == len(ALL)
