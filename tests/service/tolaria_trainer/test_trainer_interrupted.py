"""A training process that is killed anywhere and resumed ends with the bytes of one that never was."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from esper_core.nn import checkpoint

RUN = """
model: {widths: [16, 1, 16]}
dataset: {name: iris, validation_fraction: 0.3}
optimization: {epochs: 30, batch_size: 4, learning_rate: 0.005}
morphogenetic:
  growth: {warmup_epochs: 2, evaluate_every: 1, training_steps: 20, training_epochs: 2, ramp_epochs: 3,
           settle_epochs: 1, fine_tune_epochs: 2, settle_sigmas: 100.0, embargo_epochs: 1}
"""
NEW_IN_EVERY_PROCESS = {"command_id", "applied", "report_id", "decision_id", "reports", "waiting"}


def command(folder: Path, *flags: str) -> list[str]:
    path = folder / "quick.yaml"
    path.write_text(RUN)
    program = [sys.executable, "-m", "services.tolaria", str(path)]
    return [*program, "--offline", "--data-dir", str(folder), "--name", "one", "--no-twin", "-o", "json", *flags]


def outcome(folder: Path) -> tuple[str, list[Any]]:
    """Digest of the last checkpoint's tensors and plain values, and the history without times and ids."""
    run = folder / "runs" / "one"
    digest = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, dict):
            for key in value:
                if key not in NEW_IN_EVERY_PROCESS:
                    digest.update(str(key).encode())
                    feed(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                feed(item)
        elif hasattr(value, "numpy"):
            digest.update(value.numpy().tobytes())
        else:
            digest.update(repr(value).encode())

    feed(checkpoint.load(sorted((run / "checkpoints").glob("*.ckpt"))[-1]))
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    told = [
        (
            line["figures"]["train_loss"],
            line["figures"]["validation_loss"],
            line.get("slots"),
            [(event["source"], event["target"], event["reason"]) for event in line.get("events", [])],
        )
        for line in lines
    ]
    return digest.hexdigest(), told


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Any]]:
    folder = tmp_path_factory.mktemp("whole")
    subprocess.run(command(folder), check=True, capture_output=True, timeout=110)
    found = outcome(folder)
    assert any(target == 5 for *_, events in found[1] for _, target, _ in events), "it never grafted"
    return found


def test_sigkill_at_random_moments_changes_no_bit(whole: tuple[str, list[Any]], tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print(f"schedule: random.Random({seed})")
    chance = random.Random(seed)
    kills = 0
    arguments = command(tmp_path)
    history = tmp_path / "runs" / "one" / "history.jsonl"
    for _ in range(2):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seen = history.read_bytes().count(b"\n") if history.exists() else 0
        target = seen + chance.randint(1, 9)
        while process.poll() is None and (not history.exists() or history.read_bytes().count(b"\n") < target):
            time.sleep(0.002)
        time.sleep(chance.random() * 0.03)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait(60)
        arguments = command(tmp_path, "--resume")
    assert kills, "it ended before it could be killed"
    subprocess.run(arguments, check=True, capture_output=True, timeout=110)
    assert outcome(tmp_path) == whole


def test_sigterm_leaves_a_run_that_goes_on(whole: tuple[str, list[Any]], tmp_path: Path) -> None:
    process = subprocess.Popen(command(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    history = tmp_path / "runs" / "one" / "history.jsonl"
    while process.poll() is None and not (history.exists() and history.stat().st_size):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert out == ""
    assert "--resume --name one" in err
    done = subprocess.run(command(tmp_path, "--resume"), check=True, capture_output=True, text=True, timeout=110)
    assert "going on after" in done.stderr
    assert outcome(tmp_path) == whole
