"""Carving in a run: interrupted equals uninterrupted with units silenced and gone, and what was carved is told and kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from esper_core.bus import subjects
from esper_core.control.carve.papers import Act, CarveOrder, Cut, PlanState
from esper_core.errors import Conflict, EsperError
from services.tolaria import experiment, facts, keepsake
from services.tolaria.config import TolariaConfig
from services.tolaria.learner import Growing
from services.tolaria.live import news
from services.tolaria.plane import Offline
from services.tolaria.report import SeedRun, write
from services.tolaria.result import RunResult, combined
from services.tolaria.trainer import Stop, Trainer
from tests.unit.tolaria.test_trainer_loop import StopAt, equal, final, trainer

MakeConfig = Callable[..., TolariaConfig]
CARVE = {
    "enabled": True,
    "warmup_epochs": 1,
    "measure_every": 2,
    "observe_epochs": 2,
    "plan_share": 0.5,
    "loss_share": 1.0,
    "max_accuracy_drop": 1.0,
}


def carving(quick: MakeConfig, carve: dict[str, Any] | None = None, **sections: Any) -> TolariaConfig:
    """A run that grows and is carved."""
    growth = quick().morphogenetic.growth.model_dump()
    return quick(morphogenetic={"carve": CARVE | (carve or {}), "growth": growth}, **sections)


def states(run: Trainer) -> list[tuple[int, PlanState]]:
    return [(boundary.figures.epoch, event.state) for boundary in run.boundaries for event in boundary.carved]


def learner(run: Trainer) -> Growing:
    assert isinstance(run.learner, Growing)
    return run.learner


def test_interrupted_equals_uninterrupted(quick: MakeConfig, tmp_path: Path) -> None:
    config = carving(quick, optimization={"epochs": 15})
    whole = trainer(config, tmp_path / "whole")
    whole.train(Stop())
    assert {PlanState.SEDATED, PlanState.REMOVED} <= {state for _, state in states(whole)}
    assert any(event.target.name == "FOSSILIZED" for boundary in whole.boundaries for event in boundary.events)
    silenced, gone = (
        next(e for e, state in states(whole) if state is wanted) for wanted in (PlanState.SEDATED, PlanState.REMOVED)
    )
    for at in (silenced + 1, gone + 1, 13):  # with units on trial, with units gone, near the end
        directory = tmp_path / f"cut-{at}"
        first = trainer(config, directory)
        stop = StopAt(at)
        first.watchers = (stop,)
        assert not first.train(stop)
        torch.rand(at)  # the next process begins with another random state
        second = trainer(config, directory)
        assert second.resume()
        assert second.train(Stop())
        assert equal(final(directory), final(tmp_path / "whole")), f"cut at {at}"
        assert [b.carved for b in second.boundaries] == [b.carved for b in whole.boundaries]


def test_nothing_is_carved_between_checkpoints_nor_beside_a_graft(quick: MakeConfig, tmp_path: Path) -> None:
    config = carving(
        quick, {"measure_every": 1, "observe_epochs": 1}, checkpoint={"every_epochs": 3}, optimization={"epochs": 24}
    )
    run = trainer(config, tmp_path / "run")
    run.train(Stop())
    told = states(run)
    assert PlanState.REMOVED in {state for _, state in told}
    assert all((epoch + 1) % 3 == 0 for epoch, _ in told)
    flying = {boundary.figures.epoch for boundary in run.boundaries if any(row.alpha for row in boundary.slots)}
    assert flying
    assert not flying & {epoch for epoch, _ in told}


def test_off_by_default_and_the_same_run_then(quick: MakeConfig, tmp_path: Path) -> None:
    run = trainer(quick(), tmp_path / "run")
    assert learner(run).sculpting is None
    with pytest.raises(EsperError, match=r"carve.*budget"):
        carving(quick, {"budget": 1})


def test_a_run_of_before_there_was_carving_is_gone_on_with(quick: MakeConfig) -> None:
    config = quick()
    experiment.open_run(config, "old", grow=True, resume=False)
    path = experiment.run_directory(config, "old") / "config.json"
    kept = json.loads(path.read_text())
    del kept["morphogenetic"]["carve"]
    path.write_text(json.dumps(kept))
    experiment.open_run(config, "old", grow=True, resume=True)
    with pytest.raises(Conflict, match="other settings: morphogenetic"):
        experiment.open_run(carving(quick), "old", grow=True, resume=True)


def test_what_is_told_and_shown_and_kept(quick: MakeConfig, tmp_path: Path) -> None:
    config = carving(quick, optimization={"epochs": 16})
    run = trainer(config, tmp_path)
    run.train(Stop())
    removed = [event for boundary in run.boundaries for event in boundary.carved if event.state is PlanState.REMOVED]
    assert removed
    finished = run.learner.finish()
    assert finished.carved_parameters == sum(event.parameters for event in removed)
    initial = sum(parameter.numel() for parameter in experiment.build_model(config, run.data).parameters())
    left = sum(parameter.numel() for parameter in finished.model.parameters())
    assert left == initial + finished.added_parameters - finished.carved_parameters
    spoken = [message for boundary in run.boundaries for message in facts.of_epoch("quick", boundary)]
    carved = [message for subject, message in spoken if subject is subjects.CARVE_EVENTS]
    assert len(carved) == sum(len(b.carved) + (b.units is not None) for b in run.boundaries)
    assert {message.DESCRIPTOR.full_name for message in carved} == set(subjects.CARVE_EVENTS.types)
    lines = [line for boundary in run.boundaries for line in news(boundary)]
    assert any("REMOVED" in line and f"{removed[0].parameters} parameters freed" in line for line in lines)
    keepsake.keep(tmp_path, config.model, run.data, finished.model)
    recalled = keepsake.recall(tmp_path).model
    assert sum(parameter.numel() for parameter in recalled.parameters()) == left
    result = RunResult(run="quick", seed=0, grown=True, carved_parameters=finished.carved_parameters)
    write(tmp_path / "r.html", "quick", config, [SeedRun(result, run.boundaries, [])], combined([result], ""))
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<h2>Carving</h2>" in page
    assert f"−{removed[0].parameters}<" in page


class Ordering(Offline):
    """A plane that brings the orders it is given."""

    def __init__(self, *orders: CarveOrder) -> None:
        self.sculpted = True
        self._orders = list(orders)

    def carve_orders(self) -> list[CarveOrder]:
        taken, self._orders = self._orders, []
        return taken


def test_a_run_that_is_sculpted_from_outside_waits_for_orders(quick: MakeConfig, tmp_path: Path) -> None:
    config = carving(quick, {"loss_share": 100.0}, optimization={"epochs": 5})
    for orders in (
        [],
        [CarveOrder(order_id="o", run_id="quick", plan_id="p", act=Act.SEDATE, cuts=(Cut(cluster="fc3", units=(1,)),))],
    ):
        data = experiment.load_data(config)
        host = experiment.build_host(config, data)
        made = experiment.growing(config, data, host, Ordering(*orders), "quick")
        run = Trainer(config, data, made, tmp_path / str(len(orders)))
        run.train(Stop())
        assert any(boundary.units for boundary in run.boundaries)
        expected = [("p", PlanState.SEDATED), ("p", PlanState.REMOVED)] if orders else []
        assert [(e.plan_id, e.state) for boundary in run.boundaries for e in boundary.carved] == expected
