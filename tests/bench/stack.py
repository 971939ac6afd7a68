"""The laptop stack: how long `up` takes from nothing and from data, and how long a killed child is away."""

from __future__ import annotations

import os
import signal
import time

from esper_core.config import PlatformConfig
from esper_core.local import stack
from tests.bench.bench import Pace, Table
from tests.bench.figures import Sample
from tests.bench.ground import folder

CHILDREN = ("nats", "postgres", "s3", "services")
PATIENCE = 60.0
Found = dict[str, list[float]]


def run(pace: Pace) -> list[Table]:
    cold: Found = {}
    warm: Found = {}
    heal: Found = {name: [] for name in CHILDREN}
    for _ in range(pace.rounds(2, 1)):
        with folder("stack") as path:
            config = PlatformConfig(data_dir=path)
            try:
                pace.say("up from nothing")
                _up(config, cold)
                stack.down(config)
                pace.say("up again on the same data")
                _up(config, warm)
                for name in CHILDREN:
                    pace.say(f"kill -9 {name}")
                    heal[name].append(_healed(config, name))
            finally:
                stack.down(config)
    starts = [
        Sample(tuple(found[name])).row(f"{name}, {kind}", "s")
        for kind, found in (("from nothing", cold), ("with data", warm))
        for name in (*CHILDREN, "the whole")
    ]
    healed = [Sample(tuple(found)).row(f"kill -9 {name}", "s") for name, found in heal.items()]
    return [
        Table(
            "`up`",
            starts,
            (
                "A child's seconds are from its own start to ready; the whole is what the caller waits, secrets and "
                "certificates included.",
            ),
        ),
        Table(
            "From kill -9 to healthy again",
            healed,
            ("Until the supervisor has seen the new process do its work. It asks every 0.1 s.",),
        ),
    ]


def _up(config: PlatformConfig, found: Found) -> None:
    began = time.perf_counter()
    stack.up(config)
    found.setdefault("the whole", []).append(time.perf_counter() - began)
    for child in stack.status(config).children:
        found.setdefault(child.name, []).append(child.seconds or 0.0)


def _healed(config: PlatformConfig, name: str) -> float:
    pid = next(child.pid for child in stack.status(config).children if child.name == name)
    if pid is None:
        raise RuntimeError(f"{name} does not run")
    os.kill(pid, signal.SIGKILL)
    began = time.perf_counter()
    while time.perf_counter() - began < PATIENCE:
        child = next(child for child in stack.status(config).children if child.name == name)
        if child.healthy and child.pid != pid:
            seconds = time.perf_counter() - began
            _settle(config)
            return seconds
        time.sleep(0.02)
    raise RuntimeError(f"{name} was not healed within {PATIENCE:.0f} s")


def _settle(config: PlatformConfig) -> None:
    """Wait until everything is healthy: the next kill must not meet somebody who is still recovering from this one."""
    began = time.perf_counter()
    while not stack.status(config).healthy:
        if time.perf_counter() - began > PATIENCE:
            raise RuntimeError(f"not healthy within {PATIENCE:.0f} s: {stack.status(config).children}")
        time.sleep(0.05)
    time.sleep(2.5)  # ready children are asked every two seconds: let each be asked once more
