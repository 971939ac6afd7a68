"""A smaller copy of a finished run: the run as it was, the copy recalled and exported like any other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from esper_core.errors import Conflict
from esper_core.nn.carve.anatomy import dissect
from esper_core.nn.export.plain import grafts
from services.tolaria import experiment, export, keepsake
from services.tolaria.carve import main
from services.tolaria.carving import settings_of
from services.tolaria.config import TolariaConfig
from services.tolaria.order import batches
from services.tolaria.trainer import train_rows
from tests.unit.tolaria.test_export import kept as grown

MakeConfig = Callable[..., TolariaConfig]
MODELS = {
    "mlp": {"host": "mlp", "widths": [48, 48]},
    "cnn": {"host": "cnn", "channels": [12, 16]},
    "resnet": {"host": "resnet", "channels": [8, 16], "blocks": 1},
}


def finished(quick: MakeConfig, folder: Path, model: dict[str, Any], epochs: int = 8) -> Path:
    """A trained network, kept as a finished run keeps it."""
    config = quick(model=model, dataset={"name": "digits"}, optimization={"learning_rate": 0.004, "batch_size": 32})
    data = experiment.load_data(config)
    learner = experiment.plain(config, data)
    for epoch in range(epochs):
        train_rows(learner.model, learner.optimizer, data, batches(len(data.train), 32, 0, epoch))
    directory = folder / "runs" / "one"
    experiment.open_run(config, "one", grow=True, resume=False)
    assert directory.is_dir()
    keepsake.keep(directory, config.model, data, learner.model)
    return directory


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", MODELS)
def test_a_smaller_copy_stands_beside_an_untouched_run(
    quick: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    directory = finished(quick, tmp_path, MODELS[name])
    before = digests(directory)
    assert main(["one", "--data-dir", str(tmp_path), "-o", "json", "--fine-tune", "1", "--max-drop", "0.05"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert digests(directory) == before
    copy = keepsake.recall(tmp_path / "runs" / document["carved"])
    whole = keepsake.recall(directory)
    sizes = [sum(parameter.numel() for parameter in each.model.parameters()) for each in (whole, copy)]
    assert sizes == [document["before"]["parameters"], document["after"]["parameters"]]
    assert 0 < document["freed_parameters"] == sizes[0] - sizes[1] <= sizes[0] / 2
    assert document["freed_flops"] > 0
    assert document["after"]["validation_accuracy"] >= document["before"]["validation_accuracy"] - 0.05
    assert document == json.loads((tmp_path / "runs" / document["carved"] / "carve.json").read_text())
    assert {event["state"] for event in document["events"]} >= {3, 4}
    assert export.main(["one-carved", "--format", "safetensors", "--data-dir", str(tmp_path)]) == 0
    assert main(["one", "--data-dir", str(tmp_path)]) == 4  # its name is taken now


def test_a_dry_run_writes_nothing(quick: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(quick, tmp_path, MODELS["mlp"])
    flags = ["--data-dir", str(tmp_path), "--dry-run", "--share", "0.1", "--max-drop", "0.3"]
    assert main(["one", *flags]) == 0
    assert "nothing: --dry-run" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["one"]
    assert main(["one", *flags, "-o", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["carved"] is None
    assert document["freed_parameters"] <= 0.1 * document["before"]["parameters"]


def test_where_nothing_may_go_it_is_said(quick: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(quick, tmp_path, MODELS["mlp"], epochs=1)
    assert main(["one", "--data-dir", str(tmp_path), "--share", "0"]) == 5
    assert "nothing of one can go" in capsys.readouterr().err
    assert main(["other", "--data-dir", str(tmp_path)]) == 3
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["one"]


def test_data_that_have_changed_are_noticed(
    quick: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = finished(quick, tmp_path, MODELS["mlp"])
    kept = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(kept | {"seed": 7}))
    assert main(["one", "--data-dir", str(tmp_path)]) == 5
    assert "are not what it was trained on" in capsys.readouterr().err


def test_the_copy_is_no_run_to_go_on_with(quick: MakeConfig, tmp_path: Path) -> None:
    directory = finished(quick, tmp_path, MODELS["mlp"])
    assert main(["one", "--data-dir", str(tmp_path), "--max-drop", "0.3"]) == 0
    assert settings_of(directory) == settings_of(tmp_path / "runs" / "one-carved")
    config = settings_of(directory)
    with pytest.raises(Conflict, match="carved_from"):
        experiment.open_run(config, "one-carved", grow=True, resume=True)


def test_a_kernel_beside_the_host_keeps_what_it_relies_on(quick: MakeConfig, tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "one"
    grown(quick, directory, "mlp", folded=False)
    recalled = keepsake.recall(directory)
    (graft,) = grafts(recalled.model)
    expected = recalled.model(recalled.inputs)
    clusters = dissect(recalled.model, (recalled.inputs[:2],)).clusters
    (kernel,) = recalled.morphology.beside
    assert set(clusters) == {"fc1", "fc2", "fc3", "head"}  # none of the kernel's own layers
    held = {name for name, cluster in clusters.items() if "relies on its width" in cluster.obstacle}
    assert held == {name for name, cluster in clusters.items() if cluster.paths & {kernel.source, kernel.sink}} - {
        "head"
    }
    assert len(held) >= 2
    assert graft.errors == 0
    assert torch.equal(recalled.model(recalled.inputs), expected)
