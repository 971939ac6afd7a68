"""What runs, as the supervisor last wrote it down; read by ``status`` and by the next supervisor to clear up."""

from __future__ import annotations

import contextlib
import os
import time
from enum import StrEnum
from pathlib import Path

import psutil
from pydantic import ValidationError

from esper_core.config import Section
from esper_core.errors import Forbidden
from esper_core.local.layout import write_private


class Phase(StrEnum):
    """Where a child stands."""

    WAITING = "waiting"  # for the children it needs
    STARTING = "starting"  # running, not ready yet
    READY = "ready"  # did its work when last asked
    UNHEALTHY = "unhealthy"  # running, was ready, does not answer
    RESTARTING = "restarting"  # it ended; the next start is near
    FAILED = "failed"  # it ended several times without ever being ready; still being tried
    STOPPED = "stopped"


class ChildState(Section):
    """One child.

    Attributes:
        born: when the process was made, in the system's own count (seconds since 1970): tells it from a later
            process with the same number.
        started: when this life began (seconds since 1970); ``seconds``: how long it took from there to ready.
        restarts: how many times it was healed since the stack came up.
        external: it runs elsewhere and is only watched.
    """

    name: str
    phase: Phase = Phase.WAITING
    healthy: bool = False
    pid: int | None = None
    born: float | None = None
    port: int | None = None
    started: float | None = None
    seconds: float | None = None
    restarts: int = 0
    external: bool = False
    message: str = ""


class StackState(Section):
    """The supervisor and its children, in starting order."""

    pid: int
    born: float
    children: tuple[ChildState, ...] = ()


def read(path: Path) -> StackState | None:
    """The last state, or ``None`` when there is none or it is damaged.

    Raises:
        Forbidden: it is another user's.
    """
    try:
        return StackState.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    except PermissionError:
        raise Forbidden(f"{path} may not be read by this user", hint="use the account that ran `esperctl up`") from None


def write(path: Path, state: StackState) -> None:
    """Replace the state in one step."""
    write_private(path, state.model_dump_json(indent=1).encode(), durable=False)


def born(pid: int) -> float | None:
    """When process ``pid`` was made, or ``None`` when there is no such living process."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            return process.create_time()
    return None


def alive(pid: int | None, when: float | None) -> bool:
    """Whether the very process that was noted still lives; a reused number does not count."""
    now = born(pid) if pid else None
    return now is not None and when is not None and abs(now - when) < 1.0


def ends(pid: int, when: float | None, seconds: float) -> bool:
    """Wait until that process is gone, at most ``seconds``. It need not be a child of ours; a zombie is gone."""
    deadline = time.monotonic() + seconds
    while alive(pid, when):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def own() -> tuple[int, float]:
    """This process's number and birth."""
    return os.getpid(), psutil.Process().create_time()
