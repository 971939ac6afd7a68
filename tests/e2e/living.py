"""A whole platform under test: its own servers and services, ``esperctl``, training processes, the API dialled.

Everything is a real process in a temporary data directory on free ports; ``living`` leaves none behind, whatever
happened in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from esper_core.bus.envelope import Event, unwrap
from esper_core.bus.framing import decode
from esper_core.config import Endpoints, PlatformConfig
from esper_core.lifecycle import State
from esper_core.local import stack as local_stack
from esper_core.local.services import import_path

T = TypeVar("T")
ESPERCTL = "import sys; sys.argv[0] = 'esperctl'; from esper_core.cli.app import main; main()"
NARROW, AFTER = "fc2:fc3", "fc3:head"
RUN: dict[str, Any] = {
    "model": {"host": "mlp", "widths": [64, 2, 64]},
    "dataset": {"name": "digits"},
    "optimization": {"epochs": 22, "batch_size": 32, "learning_rate": 0.002},
    "morphogenetic": {
        "spans": [NARROW.split(":"), AFTER.split(":")],
        "prepare_seconds": 90,
        "decision_wait_seconds": 5,
        "growth": {
            "warmup_epochs": 3,
            "evaluate_every": 1,
            "training_epochs": 1,
            "ramp_epochs": 2,
            "settle_epochs": 1,
            "fine_tune_epochs": 2,
        },
    },
}
"""A run whose narrow layer is found and grown past within a dozen epochs."""


class Training:
    """A training process, and what it leaves in its directory."""

    def __init__(self, name: str, directory: Path, process: subprocess.Popen[bytes]) -> None:
        self.name = name
        self.directory = directory
        self.process = process

    @property
    def stdout(self) -> str:
        return (self.directory.parent / f"{self.name}.out").read_text()

    @property
    def stderr(self) -> str:
        return (self.directory.parent / f"{self.name}.err").read_text()

    @property
    def lives(self) -> bool:
        return self.process.poll() is None

    def boundaries(self) -> list[dict[str, Any]]:
        """The whole lines of its history so far."""
        path = self.directory / "history.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    async def reaches(self, epochs: int, seconds: float = 120) -> None:
        """Wait until so many epochs are over."""

        async def there() -> bool:
            done = len(self.boundaries())
            assert self.lives or done >= epochs, f"ended with {self.process.returncode}: {self.stderr}"
            return done >= epochs

        await until(there, seconds)

    async def becomes(self, state: State, seconds: float = 120) -> None:
        """Wait until one of its seeds has gone to ``state``."""

        async def there() -> bool:
            events = [event for line in self.boundaries() for event in line.get("events", ())]
            assert self.lives, f"ended with {self.process.returncode}: {self.stderr}"
            return any(event["target"] == state for event in events)

        await until(there, seconds)

    async def ends(self, seconds: float = 240) -> int:
        """Wait for its end; the exit code."""

        async def over() -> bool:
            return not self.lives

        await until(over, seconds)
        return int(self.process.returncode)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing of it moves meanwhile, so that however slow the machine is, it is not over before the test is."""
        self.process.send_signal(signal.SIGSTOP)
        yield
        self.process.send_signal(signal.SIGCONT)

    def told(self) -> list[Event]:
        """Every fact in its spool, in the order told."""
        files = sorted((self.directory / "spool").glob("*.log"))
        return [unwrap(record.data, record.subject) for file in files for record in decode(file.read_bytes())]

    def delivered(self) -> int:
        """How many of them the platform has acknowledged."""
        return int(json.loads((self.directory / "spool" / "cursor.json").read_text())["drained"])


@dataclass
class Living:
    """A running platform.

    Attributes:
        trainings: processes that were started on it.
    """

    config: PlatformConfig
    endpoints: Endpoints
    trainings: list[Training] = field(default_factory=list)

    @property
    def data_dir(self) -> Path:
        return self.config.data_dir

    def esperctl(self, *arguments: str, seconds: float = 110) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        return subprocess.run(
            [sys.executable, "-c", ESPERCTL, *arguments],
            env=environment(self.data_dir),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )

    async def read(self, *arguments: str) -> Any:
        """The JSON of a command that succeeds."""
        done = await asyncio.to_thread(self.esperctl, *arguments, "-o", "json")
        assert done.returncode == 0, (arguments, done.stderr)
        return json.loads(done.stdout)

    def train(self, name: str, *arguments: str, settings: dict[str, Any] | None = None) -> Training:
        """Start ``RUN`` with ``settings`` laid over it; ``esperctl train`` would become the same process."""
        runs = self.data_dir / "runs"
        runs.mkdir(exist_ok=True)
        file = runs / f"{name}.yaml"
        file.write_text(yaml.safe_dump(laid(RUN, settings or {})))
        with (runs / f"{name}.out").open("wb") as out, (runs / f"{name}.err").open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "services.tolaria", str(file), "--name", name, *arguments, "-o", "json"],
                env=environment(self.data_dir),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
        self.trainings.append(Training(name, runs / name, process))
        return self.trainings[-1]

    def status(self) -> local_stack.StackStatus:
        return local_stack.status(self.config)

    def pid(self, child: str) -> int | None:
        """The process of ``nats``, ``postgres``, ``s3`` or ``services``; None while it has none."""
        return next(found.pid for found in self.status().children if found.name == child)

    async def healed(self, seconds: float = 60) -> None:
        """Wait until every part is healthy."""

        async def healthy() -> bool:
            return self.status().healthy

        await until(healthy, seconds)


@dataclass(frozen=True)
class Grown:
    """A finished run: what it printed, and the story of the seed that was kept, as `esperctl seed show` tells it."""

    training: Training
    figures: dict[str, Any]
    seed: dict[str, Any]

    @property
    def history(self) -> list[dict[str, Any]]:
        story: list[dict[str, Any]] = self.seed["history"]
        return story

    def epoch_of(self, state: State) -> int:
        return next(int(event["epoch"]) for event in self.history if event["target"] == state.name)


@contextlib.contextmanager
def living() -> Iterator[Living]:
    """Bring a platform up; afterwards everything that was started is stopped and the data are removed."""
    folder = Path(tempfile.mkdtemp(prefix="esper-test-"))  # not pytest's own: closed to the account of PostgreSQL
    config = PlatformConfig(data_dir=folder)
    platform: Living | None = None
    try:
        platform = Living(config, local_stack.up(config))
        yield platform
    finally:
        for training in platform.trainings if platform else ():
            if training.lives:
                training.process.send_signal(signal.SIGKILL)
            training.process.wait()
        local_stack.down(config)
        shutil.rmtree(folder)


def environment(data_dir: Path) -> dict[str, str]:
    """The caller's environment without its own ``ESPER_`` variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ESPER_")}
    return {**kept, "PYTHONPATH": import_path(), "ESPER_DATA_DIR": str(data_dir)}


def laid(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """``high`` over ``low``, section by section."""
    out = dict(low)
    for key, value in high.items():
        below = out.get(key)
        out[key] = laid(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return out


async def until(condition: Callable[[], Awaitable[T]], seconds: float = 60.0) -> T:
    """Wait until ``condition`` is true and return what it said."""
    deadline = time.monotonic() + seconds
    while not (said := await condition()):
        assert time.monotonic() < deadline, f"not so after {seconds:g} s: {condition.__qualname__}"
        await asyncio.sleep(0.1)
    return said
