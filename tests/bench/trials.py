"""Real training runs as a user starts them, `python -m services.tolaria`, and the figures they leave behind.

Several processes side by side, one thread each, at most as many as there are cores: accuracy does not depend on how busy
the machine is.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from services.tolaria.result import RunResult
from tests.bench.figures import Row, mean_row
from tests.bench.ground import folder, python_environment
from tests.bench.machine import cores

PATIENCE = 1200.0


@dataclass(frozen=True)
class Trial:
    """A configuration to train.

    Attributes:
        name: for tables.
        preset: of `python -m services.tolaria`.
        seeds: which.
        settings: ``--set`` arguments.
        flags: further arguments.
    """

    name: str
    preset: str
    seeds: tuple[int, ...]
    settings: tuple[str, ...] = ()
    flags: tuple[str, ...] = field(default=("--offline",))

    def parts(self, size: int) -> list[Trial]:
        """The same trial in pieces of at most ``size`` seeds, in a row."""
        return [
            Trial(self.name, self.preset, self.seeds[start : start + size], self.settings, self.flags)
            for start in range(0, len(self.seeds), size)
        ]


def train(trials: Sequence[Trial], per_process: int) -> dict[str, list[RunResult]]:
    """Results by trial name, in order of seeds.

    Raises:
        RuntimeError: a run failed; with its last words.
    """
    pieces = [piece for trial in trials for piece in trial.parts(per_process)]
    crew: set[subprocess.Popen[str]] = set()
    with ThreadPoolExecutor(cores()) as pool:
        try:
            done = list(pool.map(partial(_trained, crew), pieces))
        except BaseException:  # whatever ends this must not leave others training
            pool.shutdown(wait=False, cancel_futures=True)
            for process in tuple(crew):
                process.terminate()
            raise
    found: dict[str, list[RunResult]] = {trial.name: [] for trial in trials}
    for piece, results in zip(pieces, done, strict=True):
        found[piece.name] += results
    return found


def train_at(trial: Trial, data_dir: Path, crew: set[subprocess.Popen[str]] | None = None) -> list[RunResult]:
    """Train with ``data_dir`` as the platform's directory, one seed after the other; ``crew`` has the process meanwhile."""
    command = [sys.executable, "-m", "services.tolaria", trial.preset, "--name", "bench", "-o", "json"]
    command += ["--seed", str(trial.seeds[0]), "--repeat", str(len(trial.seeds)), "--data-dir", str(data_dir)]
    command += [*trial.flags, *(part for setting in trial.settings for part in ("--set", setting))]
    code, words = _ended(command, set() if crew is None else crew)
    if code:
        raise RuntimeError(f"{trial.preset} ended with {code}: {words.strip()[-500:]}")
    kept = [path.read_text(encoding="utf-8") for path in (data_dir / "runs").glob("bench*/result.json")]
    results = sorted((RunResult.model_validate_json(text) for text in kept), key=lambda result: result.seed)
    if [result.seed for result in results] != list(trial.seeds):
        raise RuntimeError(f"{trial.preset}: results of seeds {[result.seed for result in results]}")
    return results


def _ended(command: Sequence[str], crew: set[subprocess.Popen[str]]) -> tuple[int, str]:
    """Exit code and last words of a process; it is killed when it takes too long or waiting for it is broken off."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=pipe, text=True, env=python_environment()
    ) as process:
        crew.add(process)
        try:
            _, words = process.communicate(timeout=PATIENCE)
        except BaseException:
            process.kill()
            raise
        finally:
            crew.discard(process)
    return process.returncode, words


def _trained(crew: set[subprocess.Popen[str]], trial: Trial) -> list[RunResult]:
    with folder("runs") as path:
        return train_at(trial, path, crew)


def seed_row(result: RunResult) -> Row:
    """One seed as a line."""
    return {
        "what": f"seed {result.seed}",
        "ungrown": result.ungrown_accuracy,
        "grown": result.grown_accuracy,
        "points": _points(result),
        "kept": result.fossilized,
        "culled": result.culled,
        "rolled back": result.rolled_back,
        "added parameters": result.added_parameters,
        "of parameters": result.parameters,
        "fold diff": result.folded_max_abs_diff,
        "boundary / training": result.boundary_seconds / result.train_seconds,
    }


def summary_row(name: str, results: Iterable[RunResult]) -> Row:
    """All seeds of a trial as a line; accuracies in per cent, gains in points."""
    found = list(results)
    gain = mean_row(name, [_points(result) for result in found])
    return {
        "what": name,
        "n": len(found),
        "ungrown %": _mean(100 * (result.ungrown_accuracy or 0.0) for result in found),
        "grown %": _mean(100 * (result.grown_accuracy or 0.0) for result in found),
        "gain": gain["mean"],
        "sd": gain["sd"],
        "± 95 %": gain["± 95 %"],
        "worst": gain["min"],
        "grew": sum(result.fossilized > 0 for result in found),
        "kept": sum(result.fossilized for result in found),
        "culled": sum(result.culled for result in found),
        "rolled back": sum(result.rolled_back for result in found),
        "added": _mean(result.added_parameters for result in found),
        "boundary / training": _mean(result.boundary_seconds / result.train_seconds for result in found),
    }


def _points(result: RunResult) -> float:
    return 100 * (result.gain or 0.0)


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known)
