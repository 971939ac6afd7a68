"""Figures from rows: intervals, paired gaps, ranking, and the reports made of them."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from scipy import stats

from services.tolaria.arena import report
from services.tolaria.arena.figures import Table, auroc, mean
from services.tolaria.arena.trial import Row


def row(arm: str, seed: int, accuracy: float, task: str = "t", **changes: object) -> Row:
    values = {"loss": 1.0, "before": 10, "steps": 5, "flops": 100, "train_seconds": 1.0} | changes
    return Row.model_validate({"task": task, "arm": arm, "seed": seed, "accuracy": accuracy} | values)


def test_a_mean_has_its_t_interval() -> None:
    values = [1.0, 4.0, 2.0, 8.0]
    found = mean(values)
    low, high = stats.t.interval(0.95, 3, loc=statistics.fmean(values), scale=stats.sem(values))  # type: ignore[attr-defined]
    assert (found.lower, found.value + found.half) == pytest.approx((low, high))
    assert found.error == pytest.approx(stats.sem(values))
    assert math.isinf(mean([3.0]).half)


def test_gaps_are_paired_by_seed() -> None:
    table = Table([row("a", 0, 0.5), row("a", 1, 0.7), row("a", 2, 0.9), row("b", 1, 0.6), row("b", 0, 0.2)])
    gap = table.gap("t", "a", "b")
    assert gap is not None
    assert (gap.n, gap.value) == (2, pytest.approx(20.0))
    assert table.gap("t", "a", "c") is None


def test_auroc_is_the_chance_to_outrank() -> None:
    dice = random.Random(1)
    positives, negatives = ([dice.randint(0, 5) + shift for _ in range(30)] for shift in (1, 0))
    expected = stats.mannwhitneyu(positives, negatives).statistic / 900
    assert auroc(positives, negatives) == pytest.approx(expected)
    assert auroc([1.0], []) is None


def test_reports_name_every_arm_and_goal() -> None:
    table = Table([row("none", 0, 0.5), row("none", 1, 0.5), row("esper", 0, 0.75), row("esper", 1, 0.75)])
    goals = [["goal", "value"], ["gain & <more>", "25"]]
    verdicts = {"gain": {"value": 25.0, "target": ">= 1", "met": True}}
    written = report.Report("title", "opening", table, {"t": "about it"}, goals, verdicts)
    text = written.markdown()
    assert "| esper | 2 | 75.00 | 0.00 | 25.00 ± 0.00 | – | – |" in text
    assert "about it" in text
    page = written.page()
    assert "gain &amp; &lt;more&gt;" in page
    assert "Plotly.newPlot('plot0'" in page
    document = written.document()
    assert document["goals"]["gain"]["met"] is True
    accuracies = {entry["arm"]: entry["metrics"]["accuracy"] for entry in document["rows"]}
    assert accuracies == {"none": 0.5, "esper": 0.75}
    assert [entry["seed"] for entry in document["rows"]] == [0, 1, 0, 1]
