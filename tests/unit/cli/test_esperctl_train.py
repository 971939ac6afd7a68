"""What the trainer is told, and what is refused before it starts."""

import json
import os
import sys

import pytest

from esper_core import presets
from esper_core.cli import train as train_module
from esper_core.local.services import import_path


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {host: mlp}\n")
    return path


def arguments(call: list[str]) -> list[str]:
    """What follows `python -P -m services.tolaria`."""
    assert call[:5] == [sys.executable, sys.executable, "-P", "-m", "services.tolaria"]
    return call[5:]


def test_the_least(told, esperctl, run_file):
    assert esperctl("train", str(run_file)).exit_code == 0
    assert arguments(told[0]) == [str(run_file), "-o", "text"]


def test_everything(told, esperctl, run_file, tmp_path):
    esperctl(
        "train", str(run_file), "--baseline", "--no-twin", "--resume", "--offline", "--name", "r-1", "--seed", "0", "--repeat", "3",
        "--set", "optimization.epochs=4", "--set", "model.widths=[8, 8]", "--data-dir", str(tmp_path), "-o", "json",
    )  # fmt: skip
    assert arguments(told[0]) == [
        str(run_file), "--baseline", "--no-twin", "--resume", "--offline", "--name", "r-1", "--seed", "0", "--repeat", "3",
        "--set", "optimization.epochs=4", "--set", "model.widths=[8, 8]", "--data-dir", str(tmp_path), "-o", "json",
    ]  # fmt: skip


def test_the_variable_counts_like_the_option(told, esperctl, run_file, tmp_path, monkeypatch):
    monkeypatch.setenv("ESPER_DATA_DIR", str(tmp_path))
    esperctl("train", str(run_file))
    assert arguments(told[0]) == [str(run_file), "--data-dir", str(tmp_path), "-o", "text"]


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        ([], 2, "what to train"),
        (["nowhere.yaml"], 3, "nowhere.yaml"),
        (["no/such/file"], 3, "no/such/file"),
        (["nonsense"], 3, "nonsense"),
        (["RUN", "--name", "Bad Name"], 2, "Bad Name"),
        (["RUN", "--set", "epochs"], 2, "SECTION.KEY=VALUE"),
        (["RUN", "--set", "epochs=3"], 2, "SECTION.KEY=VALUE"),
        (["RUN", "--seed", "-1"], 2, "--seed"),
        (["RUN", "--repeat", "0"], 2, "--repeat"),
    ],
)
def test_refused_before_anything_starts(told, esperctl, run_file, given, code, words):
    done = esperctl("train", *(str(run_file) if word == "RUN" else word for word in given))
    assert done.exit_code == code
    assert words in done.stderr
    assert told == []


def test_presets_are_listed_and_taken_by_name(told, esperctl, monkeypatch, tmp_path):
    (tmp_path / "tiny-digits.yaml").write_text("# Digits with one narrow layer.\nmodel: {host: mlp}\n")
    monkeypatch.setattr(presets, "_FOLDER", tmp_path)
    listed = json.loads(esperctl("train", "--list", "-o", "json").stdout)
    assert listed == [{"name": "tiny-digits", "summary": "Digits with one narrow layer."}]
    assert "Digits with one narrow layer." in esperctl("train", "--list").stdout
    assert told == []
    esperctl("train", "tiny-digits")
    assert arguments(told[0])[0] == "tiny-digits"
    assert "'tiny-digits'" in esperctl("train", "tiny-digit").stderr


def test_exit_code_and_streams_are_the_trainer_s_own(tmp_path, run_file):
    """The process really is replaced: a stand-in for the trainer answers with its own code on its own streams."""
    import subprocess

    stand_in = tmp_path / "standin.py"
    stand_in.write_text("import sys; print(*sys.argv[1:]); print('told', file=sys.stderr); sys.exit(5)\n")
    script = (
        "import sys; from esper_core.cli import train; train.TRAINER = 'standin'; "
        "from esper_core.cli.app import main; sys.argv[0] = 'esperctl'; main()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ESPER_DATA_DIR"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), import_path()])
    done = subprocess.run(
        [sys.executable, "-c", script, "train", str(run_file)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (5, f"{run_file} -o text\n", "told\n")
    assert train_module.TRAINER == "services.tolaria"
