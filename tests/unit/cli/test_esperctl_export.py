"""What the exporter is told, and what is refused before torch is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from esper_core.local.services import import_path


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Three runs: the one that finished last is digits-a, wine-c has not."""
    for age, name in enumerate(("digits-a", "digits-b", "wine-c")):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        if name != "wine-c":
            (folder / "model.safetensors").write_bytes(b"")
            os.utime(folder / "model.safetensors", (1000 - age, 1000 - age))
    (tmp_path / "runs" / "digits").mkdir()  # of a repeated run: a report only
    return tmp_path


@pytest.mark.parametrize(("given", "name"), [("digits-b", "digits-b"), ("wine", "wine-c"), ("latest", "digits-a")])
def test_a_run_is_found_by_name_prefix_or_age(told, esperctl, data_dir, given, name):
    assert esperctl("export", given, "--data-dir", str(data_dir)).exit_code == 0
    assert told[0][1:] == [
        sys.executable, "-P", "-m", "services.tolaria.export", name, "--format", "all", "--data-dir", str(data_dir), "-o", "text",
    ]  # fmt: skip


def test_everything_is_handed_on(told, esperctl, data_dir):
    esperctl("export", "digits-a", "--format", "onnx", "--out", "net", "--data-dir", str(data_dir), "-o", "json")
    assert told[0][5:] == [
        "digits-a", "--format", "onnx", "--out", "net", "--data-dir", str(data_dir), "-o", "json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        (["digist-a"], 3, "'digits-a'"),
        (["digits"], 2, "ambiguous"),
        (["digits-a", "--format", "onyx"], 2, "onyx"),
    ],
)
def test_refused_before_anything_starts(told, esperctl, data_dir, given, code, words):
    done = esperctl("export", *given, "--data-dir", str(data_dir))
    assert done.exit_code == code
    assert words in done.stderr
    assert told == []


def test_without_runs_it_says_how_to_get_one(told, esperctl, tmp_path):
    done = esperctl("export", "--data-dir", str(tmp_path))
    assert done.exit_code == 3
    assert "esperctl train" in done.stderr
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "config.json").write_text("{}")
    done = esperctl("export", "--data-dir", str(tmp_path))
    assert (done.exit_code, "finished" in done.stderr) == (3, True)
    assert told == []


def test_the_exporter_answers_with_its_own_code(data_dir):
    """The process really is replaced, and says what a run lacks."""
    done = subprocess.run(
        [
            sys.executable, "-c", "from esper_core.cli.app import main; main()",
            "export", "wine-c", "--data-dir", str(data_dir),
        ],
        env={**os.environ, "PYTHONPATH": import_path()},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (5, "")
    assert "not finished" in done.stderr
