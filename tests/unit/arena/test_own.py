"""One's own network and data in a RUN.yaml: used as they are, and every mistake told with a hint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from esper_core.errors import EsperError, InvalidInput, NotFound
from services.tolaria.arena.own import read_task
from services.tolaria.arena.trial import probe, wrapped

NETWORK = """
from torch import nn

def build(shape, outputs):
    return nn.Sequential(nn.Linear(shape[0], 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, outputs))

def wrong(shape, outputs):
    return None

def failing(shape, outputs):
    raise RuntimeError("no such thing")
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(NETWORK)
    dice = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", inputs=dice.normal(size=(90, 3)), targets=dice.integers(0, 4, 90))
    path = tmp_path / "own.yaml"
    path.write_text(
        f"model: {{host: python, factory: '{tmp_path}/mine.py:build'}}\n"
        f"dataset: {{name: arrays, path: '{tmp_path}/d.npz'}}\noptimization: {{epochs: 3}}\n"
    )
    return path


def test_they_are_used(run_file: Path) -> None:
    task = read_task(str(run_file), ())
    setup = task.make(2)
    assert (task.name, task.epochs) == ("own", 3)
    assert [tuple(p.shape) for p in setup.model().parameters()][::2] == [(7, 3), (5, 7), (4, 5)]
    assert len(setup.data.train) + len(setup.data.validation) + len(setup.data.test) == 90


def test_what_the_run_says_of_growing_holds_here_too(run_file: Path) -> None:
    settings = (
        "morphogenetic.spans=[['0', '2']]",
        "morphogenetic.probe_samples=20",
        "morphogenetic.budget_parameters=9",
    )
    task = read_task(str(run_file), settings)
    setup = task.make(0)
    assert list(wrapped(setup).slots) == ["0:2"]
    assert sum(len(targets) for _, targets in probe(task, setup)) == 20
    assert task.budget == 9
    assert len(wrapped(read_task(str(run_file), ()).make(0)).slots) == 2


@pytest.mark.parametrize(
    ("setting", "error", "words"),
    [
        ("model.factory=nowhere.py:build", NotFound, "no file"),
        ("model.factory={folder}/mine.py:biuld", NotFound, "has no biuld"),
        ("model.factory={folder}/mine.py:wrong", InvalidInput, "NoneType"),
        ("model.factory={folder}/mine.py:failing", InvalidInput, "no such thing"),
        ("model.factory=mine", InvalidInput, "must name a function"),
        ("dataset.path={folder}/none.npz", NotFound, "no file"),
        ("dataset.path={folder}/mine.py", InvalidInput, "cannot be read"),
        ("model.widths=[3]", InvalidInput, "means nothing for"),
    ],
)
def test_mistakes_are_told(run_file: Path, setting: str, error: type[EsperError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        read_task(str(run_file), (setting.format(folder=run_file.parent),)).make(0).model()
    assert caught.value.hint or words in ("NoneType", "no such thing", "means nothing for")


@pytest.mark.parametrize(
    "arrays",
    [
        {"inputs": np.zeros((5, 2))},
        {"inputs": np.zeros((5, 2)), "targets": np.zeros(4)},
        {"inputs": np.zeros(5), "targets": np.zeros(5)},
        {"inputs": np.full((50, 2), np.nan), "targets": np.zeros(50, int)},
        {"inputs": np.zeros((50, 2)), "targets": np.full(50, -1)},
        {"inputs": np.array([{}], dtype=object), "targets": np.zeros(1)},
    ],
    ids=["no targets", "unequal rows", "no features", "not finite", "negative class", "pickled"],
)
def test_arrays_that_cannot_be_data(run_file: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez(run_file.parent / "d.npz", **arrays)
    with pytest.raises(InvalidInput) as caught:
        read_task(str(run_file), ()).make(0)
    assert "numpy.savez" in caught.value.hint


def test_values_make_a_regression(run_file: Path) -> None:
    np.savez(
        run_file.parent / "d.npz", inputs=np.random.default_rng(0).normal(size=(60, 3)), targets=np.linspace(0, 1, 60)
    )
    data = read_task(str(run_file), ()).make(0).data
    assert not data.classification
    assert data.outputs == 1
