"""The loop: twins train alike until a graft, and an interrupted run equals one that was never interrupted."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from esper_core.lifecycle import BLENDED, State
from esper_core.nn import checkpoint
from services.tolaria import experiment
from services.tolaria.config import OptimizationConfig, TolariaConfig
from services.tolaria.datasets import prepare
from services.tolaria.history import Boundary
from services.tolaria.optimization import learning_rate
from services.tolaria.plane import Offline
from services.tolaria.trainer import Stop, Trainer, score

MakeConfig = Callable[..., TolariaConfig]


def trainer(config: TolariaConfig, directory: Path, *, grow: bool = True) -> Trainer:
    data = experiment.load_data(config)
    if not grow:
        return Trainer(config, data, experiment.plain(config, data), directory)
    host = experiment.build_host(config, data)
    learner = experiment.growing(config, data, host, Offline(), "quick")
    return Trainer(config, data, learner, directory)


class StopAt(Stop):
    """Wishes to stop at some epoch."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self._epoch = epoch

    def epoch(self, boundary: Boundary) -> None:
        if boundary.figures.epoch + 1 >= self._epoch:
            self.signal = signal.SIGTERM


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right) or (left != left and right != right)


def final(directory: Path) -> Any:
    """The last checkpoint, without the ids that are new in every process."""
    state = checkpoint.load(sorted((directory / "checkpoints").glob("*.ckpt"))[-1])

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                k: strip(v) for k, v in value.items() if k not in ("command_id", "report_id", "applied", "decision_id")
            }
        return [strip(item) for item in value] if isinstance(value, (list, tuple)) else value

    return strip(state)


def test_a_run_grows_and_tells_it(quick: MakeConfig, tmp_path: Path) -> None:
    run = trainer(quick(), tmp_path / "grown")
    assert run.train(Stop())
    targets = [event.target for boundary in run.boundaries for event in boundary.events]
    assert State.GRAFTING in targets
    assert [boundary.figures.epoch for boundary in run.boundaries] == list(range(14))


def test_the_twin_is_bitwise_equal_until_the_first_graft(quick: MakeConfig, tmp_path: Path) -> None:
    grown, twin = trainer(quick(), tmp_path / "grown"), trainer(quick(), tmp_path / "twin", grow=False)
    grown.train(Stop())
    twin.train(Stop())
    states = [{row.state for row in boundary.slots} for boundary in grown.boundaries]
    first = next(epoch for epoch, present in enumerate(states) if present & BLENDED)
    assert State.TRAINING in states[first - 1]
    for epoch in range(first + 1):
        mine, theirs = grown.boundaries[epoch].figures, twin.boundaries[epoch].figures
        assert (mine.train_loss, mine.validation_loss) == (theirs.train_loss, theirs.validation_loss)
    assert grown.boundaries[-1].figures.train_loss != twin.boundaries[-1].figures.train_loss


@pytest.mark.parametrize("host", ["grown", "plain", "sgd-cnn"])
def test_interrupted_equals_uninterrupted(quick: MakeConfig, tmp_path: Path, host: str) -> None:
    config = quick(optimization={"schedule": "cosine", "warmup_epochs": 2})
    if host == "sgd-cnn":
        config = quick(
            dataset={"name": "digits", "validation_fraction": 0.6, "test_fraction": 0.2},
            model={"host": "cnn", "channels": [4, 1, 8]},
            optimization={"optimizer": "sgd", "epochs": 10},
        )
    whole = trainer(config, tmp_path / "whole", grow=host != "plain")
    whole.train(Stop())
    for at in range(1, config.optimization.epochs, 2 if host == "grown" else 4):
        directory = tmp_path / f"cut-{at}"
        first = trainer(config, directory, grow=host != "plain")
        stop = StopAt(at)
        first.watchers = (stop,)
        assert not first.train(stop)
        torch.rand(at)  # the next process begins with another random state
        second = trainer(config, directory, grow=host != "plain")
        assert second.resume()
        assert second.epoch == at
        assert second.train(Stop())
        assert equal(final(directory), final(tmp_path / "whole")), f"cut at {at}"
        for mine, theirs in zip(second.boundaries, whole.boundaries, strict=True):
            assert mine.figures.train_loss == theirs.figures.train_loss
            assert mine.slots == theirs.slots


def test_a_damaged_newest_checkpoint_costs_epochs_but_no_bit(quick: MakeConfig, tmp_path: Path) -> None:
    config = quick()
    whole = trainer(config, tmp_path / "whole")
    whole.train(Stop())
    first = trainer(config, tmp_path / "cut")
    stop = StopAt(9)
    first.watchers = (stop,)
    first.train(stop)
    first.checkpoints.paths()[-1].write_bytes(b"half a checkpo")
    second = trainer(config, tmp_path / "cut")
    assert second.resume()
    assert second.epoch == 8
    second.train(Stop())
    assert equal(final(tmp_path / "cut"), final(tmp_path / "whole"))


def test_a_signal_stops_at_the_next_boundary_and_the_handlers_come_back(quick: MakeConfig, tmp_path: Path) -> None:
    class Interrupting:
        def epoch(self, boundary: Boundary) -> None:
            if boundary.figures.epoch == 2:
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    run = trainer(quick(), tmp_path / "run", grow=False)
    run.watchers = (Interrupting(),)
    with Stop().on_signals() as stop:
        assert not run.train(stop)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before
    assert run.epoch == 3


def test_the_learning_rate_rises_then_falls() -> None:
    config = OptimizationConfig(epochs=11, learning_rate=1.0, schedule="cosine", warmup_epochs=2, final_fraction=0.1)
    rates = [learning_rate(config, epoch) for epoch in range(11)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[6] == pytest.approx(0.55)  # half way down, between 1 and 0.1
    assert rates[10] == pytest.approx(0.1)


def test_scores_are_means_over_rows_whatever_the_batches(quick: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = quick()
    data = prepare(config.dataset, 0, image=False)
    model = experiment.plain(config, data).model
    outputs = model(data.test.inputs).detach()
    monkeypatch.setattr("services.tolaria.trainer.SCORE_BATCH", 7)
    found = score(model, data, data.test)
    assert found.loss == pytest.approx(float(torch.nn.functional.cross_entropy(outputs, data.test.targets)), rel=1e-6)
    assert found.accuracy == pytest.approx(float((outputs.argmax(1) == data.test.targets).float().mean()))
    assert model.training
