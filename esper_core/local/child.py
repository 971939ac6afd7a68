"""One child of the stack: what to run, when it is ready, how to end it; and the running process itself."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from esper_core.errors import Unsupported
from esper_core.local.account import Account

LOG_LIMIT = 8 * 1024 * 1024  # bytes; a log that has grown past it at a start becomes NAME.log.1


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Child:
    """What the supervisor needs to know about one server.

    Attributes:
        ready: returns when the server does its work at this moment; raises ``Unavailable`` when it does not.
        command: the program and its arguments; empty when the server runs elsewhere and is only watched.
        environment: the whole environment of the process; secrets go here, not into the command that ``ps`` shows.
        account: whom to run it as; ``None`` for this user.
        prepare: what to do before every start, blocking; may raise an ``EsperError``.
        needs: names of the children that must be ready before.
        stop_signal, stop_seconds: how to ask it to end, and how long to wait before SIGKILL.
    """

    name: str
    ready: Callable[[], Awaitable[None]]
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    account: Account | None = None
    prepare: Callable[[], None] = _nothing
    needs: tuple[str, ...] = ()
    port: int | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    stop_seconds: float = 8.0


async def spawn(child: Child, log: Path) -> asyncio.subprocess.Process:
    """Start ``child`` in its own process group with its output appended to ``log``."""
    who = child.account
    with log.open("ab") as output:
        return await asyncio.create_subprocess_exec(
            *child.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=dict(child.environment),
            process_group=0,
            umask=0o077,
            user=who.uid if who else None,
            group=who.gid if who else None,
            extra_groups=[] if who else None,
        )


async def stop(child: Child, process: asyncio.subprocess.Process) -> bool:
    """End ``process`` and what is left of its group; ``False`` when it had to be killed."""
    graceful = True
    if process.returncode is None:
        process.send_signal(child.stop_signal)
        try:
            await asyncio.wait_for(process.wait(), child.stop_seconds)
        except TimeoutError:
            graceful = False
            process.kill()
            await process.wait()
    sweep(process.pid)
    return graceful


def sweep(group: int) -> None:
    """Kill what a dead child left running in its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def rotate(log: Path) -> None:
    """Make sure ``log`` exists, private, and start a new one when it has grown too large."""
    if log.exists() and log.stat().st_size > LOG_LIMIT:
        log.replace(log.with_suffix(".log.1"))
    log.touch(mode=0o600)


def last_words(log: Path) -> str:
    """The last line a child wrote, for a hint."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it wrote nothing"


def program(name: str, package: str) -> str:
    """The path of the executable that ``package``'s wheel installed, wherever its scripts went.

    Raises:
        Unsupported: it is not installed.
    """
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.name == name and os.access(path, os.X_OK):
            return str(path.resolve())
    raise Unsupported(f"{name} is not installed", hint=f"pip install {package}, or name an external server")
