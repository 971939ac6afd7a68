"""The process that owns the stack's servers: starts them in order, heals the ones that die, stops them in reverse.

``python -m esper_core.local.supervisor DATA_DIR`` with a ``PlatformConfig`` as JSON on stdin. It decides and checks
everything while the caller still waits (a fault is one JSON line on stdout, exit code 2; somebody already supervises:
exit code 3), then leaves the terminal behind and goes on alone until SIGTERM.

A child that is stopped (SIGSTOP) or hangs is shown as unhealthy and left alone: whether to kill it is for people to
say. If the supervisor itself is killed its children go on; the next one ends them before it starts its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

from esper_core import log
from esper_core.config import PlatformConfig
from esper_core.errors import EsperError
from esper_core.local import state
from esper_core.local.child import Child, last_words, rotate, spawn, stop, sweep
from esper_core.local.layout import Layout
from esper_core.local.plan import Plan, plan
from esper_core.local.state import ChildState, Phase, StackState

FAULT, TAKEN = 2, 3  # exit codes
_POLL_STARTING, _POLL_READY = 0.1, 2.0  # seconds between questions
_BACKOFF_FIRST, _BACKOFF_MOST = 0.2, 10.0  # seconds before a restart; doubles while lives stay short
_LONG_LIFE = 10.0  # seconds; who lived longer is restarted at once
_ORPHAN_SECONDS = 10.0  # to end, before it is killed
_GIVEN_UP_AFTER = 3  # lives that ended before ready, until it counts as failed

_log = log.get("supervisor")


class Supervisor:
    """Keeps the planned children running until told to stop."""

    def __init__(self, layout: Layout, planned: Plan) -> None:
        self._layout = layout
        self._children = planned.children
        self._states = {
            child.name: ChildState(name=child.name, port=child.port, external=not child.command)
            for child in planned.children
        }
        self._ready = {child.name: asyncio.Event() for child in planned.children}
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._pid, self._born = state.own()

    async def run(self) -> None:
        """Start all, heal, and return after SIGTERM or SIGINT once everything has ended."""
        told = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, told.set)
        loop.add_signal_handler(signal.SIGHUP, lambda: None)  # the terminal closed: not our concern
        self._write()
        keepers = {child.name: asyncio.create_task(self._keep(child)) for child in self._children}
        waiter = asyncio.create_task(told.wait())
        await asyncio.wait([waiter, *keepers.values()], return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()
        broken = [keeper for keeper in keepers.values() if keeper.done()]
        for child in reversed(self._children):
            await _ended(keepers[child.name])
            await self._end(child)
        for keeper in broken:
            keeper.result()  # a defect of ours ended the supervision: say so, now that nothing is left running

    async def _keep(self, child: Child) -> None:
        """One child's whole life: wait for what it needs, then start it, again and again."""
        for name in child.needs:
            await self._ready[name].wait()
        if not child.command:
            await self._watch(child, None, time.monotonic())
        short_lives, never_ready = 0, 0
        while True:
            begun = time.monotonic()
            message = await self._live(child)
            never_ready = 0 if self._states[child.name].seconds is not None else never_ready + 1
            short_lives = 0 if time.monotonic() - begun > _LONG_LIFE else short_lives + 1
            phase = Phase.FAILED if never_ready >= _GIVEN_UP_AFTER else Phase.RESTARTING
            _log.warning("child ended", child=child.name, phase=phase.value, how=message)
            self._note(child, phase=phase, healthy=False, pid=None, born=None, message=message)
            await asyncio.sleep(min(_BACKOFF_FIRST * 2 ** max(short_lives - 1, 0), _BACKOFF_MOST))
            self._note(child, restarts=self._states[child.name].restarts + 1)

    async def _live(self, child: Child) -> str:
        """Start ``child`` and stay with it until it ends; says how it ended."""
        output, begun = self._layout.logs / f"{child.name}.log", time.monotonic()
        self._note(child, phase=Phase.STARTING, started=time.time(), seconds=None)
        try:
            rotate(output)
            await asyncio.to_thread(child.prepare)
            process = await spawn(child, output)
        except (EsperError, OSError) as error:
            return f"{error} {getattr(error, 'hint', '')}".strip()
        self._processes[child.name] = process
        self._note(child, pid=process.pid, born=state.born(process.pid))
        _log.info("child started", child=child.name, pid=process.pid)
        watching = asyncio.create_task(self._watch(child, process.pid, begun))
        try:
            code = await process.wait()
        finally:
            await _ended(watching)
        sweep(process.pid)
        del self._processes[child.name]
        how = f"killed by signal {-code}" if code < 0 else f"ended with {code}"
        return f"{how}: {last_words(output)}" if code > 0 else how

    async def _watch(self, child: Child, pid: int | None, begun: float) -> None:
        """Ask again and again whether it does its work, and note every change of the answer."""
        self._note(child, phase=Phase.STARTING)
        while True:
            now = self._states[child.name]
            try:
                await child.ready()
            except Exception as error:  # noqa: BLE001 - however the question fails, the answer is no; we must go on
                if not isinstance(error, (EsperError, OSError)):
                    _log.error("question failed", child=child.name, exc_info=error)
                phase = Phase.UNHEALTHY if now.seconds is not None else Phase.STARTING
                if (now.phase, now.message) != (phase, str(error)):
                    self._note(child, phase=phase, healthy=False, message=str(error))
            else:
                if not now.healthy:
                    took = now.seconds if now.seconds is not None else round(time.monotonic() - begun, 3)
                    self._note(child, phase=Phase.READY, healthy=True, seconds=took, message="")
                    self._ready[child.name].set()
                    _log.info("child ready", child=child.name, pid=pid, seconds=took)
            await asyncio.sleep(_POLL_READY if self._states[child.name].healthy else _POLL_STARTING)

    async def _end(self, child: Child) -> None:
        process = self._processes.get(child.name)
        if process is not None and not await stop(child, process):
            _log.warning("child did not end in time and was killed", child=child.name, seconds=child.stop_seconds)
        self._note(child, phase=Phase.STOPPED, healthy=False, pid=None, born=None)

    def _note(self, child: Child, **changes: object) -> None:
        self._states[child.name] = self._states[child.name].model_copy(update=changes)
        self._write()

    def _write(self) -> None:
        known = StackState(pid=self._pid, born=self._born, children=tuple(self._states.values()))
        try:
            state.write(self._layout.state, known)
        except OSError as error:  # a full disk must not take the supervision away
            _log.error("state not written", error=error.strerror)


async def _ended(task: asyncio.Task[None]) -> None:
    """Cancel ``task`` until it heeds it: Python 3.11's ``wait_for`` swallows a cancellation that comes as its work ends."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=0.1)


def clear_orphans(layout: Layout) -> list[str]:
    """End the children that a killed supervisor left behind; returns their names."""
    last = state.read(layout.state)
    left = [c for c in reversed(last.children if last else ()) if c.pid and state.alive(c.pid, c.born)]
    for child in left:
        assert child.pid is not None  # noqa: S101 - chosen so above
        # PostgreSQL takes SIGTERM for "when all sessions have ended", and SIGINT for "now, cleanly"
        for number in (signal.SIGINT if child.name == "postgres" else signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, number)
            if state.ends(child.pid, child.born, _ORPHAN_SECONDS):
                break
        sweep(child.pid)
    return [child.name for child in left]


def main(data_dir: str) -> int:
    """Check, detach, supervise; the exit code of the process."""
    layout = Layout(Path(data_dir))
    try:
        config = PlatformConfig.model_validate_json(sys.stdin.buffer.read())
        layout.create()
        lock = os.open(layout.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return TAKEN
        orphans = clear_orphans(layout)
        planned = plan(config, layout)
        output = layout.logs / "supervisor.log"
        rotate(output)
    except EsperError as error:
        fault = {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
        print(json.dumps(fault), flush=True)  # noqa: T201 - the caller reads it
        return FAULT
    except OSError as error:  # a full or read-only disk
        fault = {
            "kind": "Unavailable",
            "message": f"{error.filename or layout.root}: {error.strerror}",
            "hint": "make room there, or choose another place with ESPER_DATA_DIR",
        }
        print(json.dumps(fault), flush=True)  # noqa: T201 - as above
        return FAULT
    _detach(output)
    log.configure("supervisor", json=True)
    if orphans:
        _log.warning("ended what a killed supervisor left", children=orphans)
    asyncio.run(_supervise(layout, planned))
    _log.info("stopped")
    return 0


async def _supervise(layout: Layout, planned: Plan) -> None:
    await Supervisor(layout, planned).run()


def _detach(output: Path) -> None:
    """Leave the caller's terminal and process tree; from here on everything is written to ``output``.

    No thread and no gRPC has been started yet, so forking is safe; the child inherits the lock.
    """
    if os.fork() > 0:
        os._exit(0)
    os.setsid()
    os.chdir("/")
    os.umask(0o077)
    nothing = os.open(os.devnull, os.O_RDONLY)
    written = os.open(output, os.O_WRONLY | os.O_APPEND)
    for source, target in ((nothing, 0), (written, 1), (written, 2)):
        os.dup2(source, target)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
