"""Figures of one run and of several, their report, and what is shown on the way."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from esper_core.control.packet import (
    AdaptationAction,
    AdaptationSignal,
    Command,
    Reason,
    ReasonCode,
    SeedEvent,
)
from esper_core.lifecycle import State
from services.tolaria import charts, report
from services.tolaria.config import TolariaConfig
from services.tolaria.history import Boundary, Figures, SlotRow
from services.tolaria.live import LiveView, PlainView, sparkline
from services.tolaria.report import SeedRun
from services.tolaria.result import RunResult, combined, interval


def result(seed: int, ungrown: float, grown: float) -> RunResult:
    return RunResult(
        run=f"r-{seed}",
        seed=seed,
        grown=True,
        ungrown_accuracy=ungrown,
        grown_accuracy=grown,
        fossilized=1,
        folded_max_abs_diff=10.0**-seed,
    )


def boundary(epoch: int, state: State, loss: float = 0.5) -> Boundary:
    figures = Figures(
        epoch=epoch,
        step=epoch,
        train_loss=loss,
        validation_loss=loss,
        validation_accuracy=0.5,
        learning_rate=0.1,
        train_seconds=1,
        boundary_seconds=1,
        parameters=3,
    )
    command = Command(command_id="c", run_id="r", slot="a:<b>", target=State.GERMINATED, issued_by="tamiyo")
    reasons = (Reason(code=ReasonCode.UNHEALTHY, detail="asks </script> for growth"),)
    action = AdaptationAction(command=command, confidence=0.9, reasons=reasons)
    signal = AdaptationSignal(decision_id="d", run_id="r", policy_version="p1", actions=(action,))
    event = SeedEvent(
        seed_id="s", run_id="r", slot="a:<b>", source=State.DORMANT, target=State.GERMINATED, reason="it wants"
    )
    row = SlotRow(slot="a:<b>", state=state, alpha=0.25, health=0.2)
    return Boundary(figures=figures, slots=(row,), signal=signal, events=(event,))


def test_a_paired_interval_is_students() -> None:
    # mean 2, standard deviation 1, n 3: t(2; .975) = 4.302653
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert interval([1.0]) is None


def test_figures_of_several_seeds_are_means_sums_and_the_worst() -> None:
    figures = combined([result(1, 0.7, 0.8), result(2, 0.8, 1.0)], "here")
    assert figures["ungrown_accuracy"] == pytest.approx(0.75)
    assert figures["grown_accuracy"] == pytest.approx(0.9)
    assert figures["gain_mean"] == pytest.approx(0.15)
    assert figures["gain_std"] == pytest.approx(0.1 / 2**0.5)
    assert (figures["fossilized"], figures["folded_max_abs_diff"], len(figures["seeds"])) == (2, 0.1, 2)


def test_a_single_run_has_the_figures_scripts_read() -> None:
    figures = combined([result(1, 0.7, 0.8)], "here")
    wanted = {"run", "ungrown_accuracy", "grown_accuracy", "fossilized", "folded_max_abs_diff", "report"}
    assert wanted <= figures.keys()
    assert json.loads(json.dumps(figures, allow_nan=False))["run"] == "r-1"


def test_figures_that_are_not_finite_become_null() -> None:
    ruined = result(1, 0.1, 0.1).model_copy(update={"grown_loss": float("nan"), "ungrown_loss": 1.0})
    assert combined([ruined], "")["grown_loss"] is None


def test_the_report_is_whole_escaped_and_asks_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    lived = [boundary(0, State.DORMANT, float("nan")), boundary(1, State.TRAINING), boundary(2, State.TRAINING)]
    runs = [SeedRun(result(1, 0.7, 0.8), lived, lived), SeedRun(result(2, 0.7, 0.9), lived, lived)]
    report.write(path, "a <run>", TolariaConfig(), runs, combined([run.result for run in runs], str(path)))
    page = path.read_text(encoding="utf-8")
    ours = page[: page.index("<script>")] + page[page.rindex("<script>") :]
    assert "<run>" not in ours
    assert "a:<b>" not in ours
    assert "+15.0 ± " in ours
    assert not re.search(r"""(src|href)\s*=""", ours)
    plots = json.loads(re.search(r"const CHARTS = (.*?);\n", ours, re.DOTALL).group(1))  # type: ignore[union-attr]
    assert {"loss", "accuracy", "lanes-0", "alpha-0", "health-0", "lanes-1"} <= plots.keys()


def test_lanes_join_epochs_of_the_same_state() -> None:
    chart = charts.lanes([boundary(0, State.DORMANT), boundary(1, State.TRAINING), boundary(2, State.TRAINING)])
    bars = {bar["name"]: (bar["base"], bar["x"]) for bar in chart["data"]}
    assert bars == {"DORMANT": ([1], [1]), "TRAINING": ([2], [2])}


def test_plain_lines_tell_decisions_and_changes_with_reasons() -> None:
    out = io.StringIO()
    view = PlainView(Console(file=out, width=40), 10)
    view.begin("run", 20, 3)
    view.epoch(boundary(4, State.GERMINATED))
    text = out.getvalue()
    assert "going on after 3" in text
    assert "GERMINATED a:<b>, confidence 0.90, because asks </script> for growth" in text
    assert "a:<b> DORMANT → GERMINATED: it wants" in text
    assert "loss" not in text


def test_the_live_picture_shows_slots_and_news() -> None:
    out = io.StringIO()
    view = LiveView(Console(file=out, width=100, force_terminal=True))
    view.begin("run", 20)
    view.waiting("kernels", 1, 3)
    view.epoch(boundary(4, State.GRAFTING))
    view.close()
    assert "GRAFTING" in out.getvalue()
    assert "epoch 5/20" in out.getvalue()
    assert "0.25" in out.getvalue()


def test_a_sparkline_has_a_bar_per_value_and_a_gap_where_there_is_none() -> None:
    assert sparkline([0.0, float("nan"), 1.0]) == "▁ █"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([float("inf")]) == ""
