"""The command: results on stdout, everything else on stderr, mistakes in a line with a hint and an exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.tolaria.command import main

QUICK = """
model: {widths: [16, 1, 16]}
dataset: {name: iris, validation_fraction: 0.3}
optimization: {epochs: 12, batch_size: 16, learning_rate: 0.01}
morphogenetic:
  growth: {warmup_epochs: 2, evaluate_every: 1, training_steps: 20, training_epochs: 1, ramp_epochs: 2,
           settle_epochs: 1, fine_tune_epochs: 1, settle_sigmas: 100.0, embargo_epochs: 1}
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "quick.yaml"
    path.write_text(QUICK)
    return path


def test_a_run_gives_figures_report_and_files(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--offline", "--data-dir", str(tmp_path), "--name", "one", "-o", "json"]
    assert main([str(run_file), *flags]) == 0
    out, err = capsys.readouterr()
    figures = json.loads(out)
    assert figures["run"] == "one"
    assert 0 <= figures["ungrown_accuracy"] <= 1
    assert 0 <= figures["grown_accuracy"] <= 1
    assert Path(figures["report"]).read_text().startswith("<!doctype html>")
    assert "DORMANT → GERMINATED" in err
    assert main([str(run_file), *flags]) == 4
    assert "--resume" in capsys.readouterr().err
    assert main([str(run_file), *flags, "--resume"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["grown_accuracy"] == figures["grown_accuracy"]
    assert main([str(run_file), *flags, "--resume", "--set", "optimization.epochs=13"]) == 5
    assert "optimization" in capsys.readouterr().err


def test_repeats_report_each_seed_and_the_spread(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--offline", "--data-dir", str(tmp_path), "--name", "many", "--set", "optimization.epochs=4"]
    assert main([str(run_file), *flags, "-o", "json", "--repeat", "2", "--seed", "5"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert [seed["seed"] for seed in figures["seeds"]] == [5, 6]
    assert [seed["run"] for seed in figures["seeds"]] == ["many-1", "many-2"]
    assert figures["gain_std"] is not None
    assert Path(figures["report"]).is_file()


def test_a_baseline_has_no_twin(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run_file), "--baseline", "--data-dir", str(tmp_path), "--name", "plain", "-o", "json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["grown_accuracy"] is None
    assert figures["ungrown_accuracy"] is not None
    assert not (tmp_path / "runs" / "plain" / "twin").exists()


def test_check_names_the_slots_and_trains_nothing(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run_file), "--check", "-o", "json", "--data-dir", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [slot["slot"] for slot in found["slots"]] == ["fc1:fc2", "fc2:fc3", "fc3:head"]
    assert [(slot["foldable"], slot["obstacle"]) for slot in found["slots"]] == [(True, "")] * 3
    assert not (tmp_path / "runs").exists()


def test_a_regression_is_compared_by_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "regression.yaml"
    path.write_text("model: {widths: [8]}\ndataset: {name: diabetes}\noptimization: {epochs: 3}\n")
    assert main([str(path), "--offline", "--data-dir", str(tmp_path), "-o", "json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["grown_accuracy"] is None
    assert figures["gain_mean"] == pytest.approx(figures["ungrown_loss"] - figures["grown_loss"])
    assert main([str(path), "--offline", "--data-dir", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["no-such-thing"], 3, "known"),
        (["nowhere.yaml"], 3, "preset"),
        (["digits", "--set", "model.host=transformer"], 2, "transformer"),
        (["digits", "--set", "model.hots=mlp"], 2, "host"),
        (["digits", "--set", "model={host: resnet}", "--set", "dataset.name=wine", "--check"], 2, "mlp"),
        (["digits", "--set", "dataset={name: cifar10, path: /nowhere}", "--check"], 3, "binary version"),
        (["digits", "--set", "morphogenetic.spans=[[fc1, fc9]]", "--check"], 2, ""),
        (["digits", "--set", "device=cuda:99", "--check"], 2, "cpu"),
        (["digits", "--name", "No Good", "--offline"], 2, "a-z"),
        (["digits", "--repeat", "0"], 2, "1 or more"),
        (["digits", "--seed", "-1"], 2, "2^63"),
        (["digits", "--resume", "--offline"], 3, "--resume"),
        (["digits"], 3, "--offline"),
    ],
)
def test_a_mistake_is_a_line_with_a_hint(
    arguments: list[str], code: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--data-dir", str(tmp_path)]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "hint: " in err
    assert says in err
    assert "Traceback" not in err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "digits-narrow" in text
    assert "--resume" in text
