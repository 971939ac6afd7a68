"""The laptop stack from outside: bring it up, take it down, ask how it is, find its endpoints.

All of it may be repeated: ``up`` on a running stack says so and returns, ``down`` on a stopped one does nothing, and
both leave the data. The servers outlive the caller.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from esper_core import errors
from esper_core.config import Endpoints, PlatformConfig, Section, read_endpoints
from esper_core.local import state
from esper_core.local.child import last_words
from esper_core.local.credentials import revealed
from esper_core.local.layout import Layout
from esper_core.local.services import import_path
from esper_core.local.state import ChildState, Phase

Progress = Callable[[str, str, float], None]
"""Called with a child's name ("stack" for the whole), its phase and the seconds since ``up`` began."""

START_SECONDS, STOP_SECONDS = 90.0, 60.0
_POLL = 0.05
_FAULT, _TAKEN = 2, 3


class StackStatus(Section):
    """How the stack is at this moment; ``children`` in starting order, empty when it never ran."""

    data_dir: Path
    running: bool
    pid: int | None = None
    children: tuple[ChildState, ...] = ()

    @property
    def healthy(self) -> bool:
        """Everything runs and did its work when last asked."""
        return self.running and bool(self.children) and all(child.healthy for child in self.children)


def up(config: PlatformConfig, on_progress: Progress = lambda _name, _phase, _seconds: None) -> Endpoints:
    """Start whatever does not run and wait until all of it is ready.

    Raises:
        Unavailable: a child could not be brought to work; the stack is down again.
        EsperError: what ``plan`` raises: a configured port is taken, something is not installed, a file is damaged.
    """
    layout, begun = Layout(config.data_dir), time.monotonic()
    on_progress("stack", "preparing", 0.0)
    code = _launch(config)
    on_progress("stack", "running already" if code == _TAKEN else "prepared", time.monotonic() - begun)
    try:
        _await_ready(layout, on_progress, begun)
    except errors.Unavailable:
        if code != _TAKEN:  # what somebody else started stays as they have it
            down(config)
        raise
    on_progress("stack", "ready", time.monotonic() - begun)
    return read_endpoints(config.data_dir)


def down(config: PlatformConfig) -> bool:
    """Stop everything, in order, and leave the data; ``False`` when nothing ran."""
    layout = Layout(config.data_dir)
    last = state.read(layout.state)
    if last is None:
        return False
    ran = state.alive(last.pid, last.born)
    if ran:
        os.kill(last.pid, signal.SIGTERM)
        if not state.ends(last.pid, last.born, STOP_SECONDS):
            os.kill(last.pid, signal.SIGKILL)
            state.ends(last.pid, last.born, 5)
    from esper_core.local.supervisor import clear_orphans  # it knows how to end each of them

    return bool(clear_orphans(layout)) or ran


def status(config: PlatformConfig) -> StackStatus:
    """How each child is; what a dead supervisor left behind is shown with its process, and never as healthy."""
    last = state.read(Layout(config.data_dir).state)
    if last is None:
        return StackStatus(data_dir=config.data_dir, running=False)
    if state.alive(last.pid, last.born):
        return StackStatus(data_dir=config.data_dir, running=True, pid=last.pid, children=last.children)
    return StackStatus(data_dir=config.data_dir, running=False, children=tuple(map(_unattended, last.children)))


def endpoints(config: PlatformConfig) -> Endpoints:
    """Where everything is; ``read_endpoints`` for the configured data directory."""
    return read_endpoints(config.data_dir)


def _unattended(child: ChildState) -> ChildState:
    if child.pid is not None and state.alive(child.pid, child.born):
        return child.model_copy(update={"healthy": False, "message": "runs on, but its supervisor is gone"})
    return child.model_copy(update={"phase": Phase.STOPPED, "healthy": False, "pid": None, "born": None})


def _launch(config: PlatformConfig) -> int:
    """Start a supervisor; its exit code, once it has detached or found that another one is there."""
    environment = {**os.environ, "PYTHONPATH": import_path()}
    done = subprocess.run(
        [sys.executable, "-m", "esper_core.local.supervisor", str(config.data_dir)],
        input=json.dumps(revealed(config)).encode(),
        capture_output=True,
        env=environment,
        start_new_session=True,
        check=False,
    )
    if done.returncode in (0, _TAKEN):
        return done.returncode
    if done.returncode == _FAULT and done.stdout:
        fault = Fault.model_validate_json(done.stdout)
        raise getattr(errors, fault.kind)(fault.message, hint=fault.hint)
    words = done.stderr.decode(errors="replace").strip().splitlines()
    raise errors.Internal(f"the supervisor ended with {done.returncode}", hint=words[-1] if words else "")


class Fault(Section):
    """Why a supervisor did not start."""

    kind: str
    message: str
    hint: str = ""


def _await_ready(layout: Layout, on_progress: Progress, begun: float) -> None:
    shown: dict[str, Phase] = {}
    while True:
        last = state.read(layout.state)
        lives = last is not None and state.alive(last.pid, last.born)
        for child in last.children if last and lives else ():
            if shown.get(child.name) != child.phase:
                shown[child.name] = child.phase
                on_progress(child.name, child.phase, time.monotonic() - begun)
            if child.phase is Phase.FAILED:
                raise errors.Unavailable(f"{child.name} does not start: {child.message}", hint=_see(layout, child.name))
        if last and lives and all(child.healthy for child in last.children):
            return
        waited = time.monotonic() - begun
        if not lives and waited > 10:
            raise errors.Unavailable("the supervisor is gone", hint=last_words(layout.logs / "supervisor.log"))
        if waited > START_SECONDS:
            late = ", ".join(
                f"{c.name} ({c.message or c.phase})" for c in (last.children if last else ()) if not c.healthy
            )
            raise errors.Unavailable(f"not ready after {START_SECONDS:.0f} s: {late}", hint=f"see {layout.logs}")
        time.sleep(_POLL)


def _see(layout: Layout, name: str) -> str:
    return f"see {layout.logs / name}.log"
