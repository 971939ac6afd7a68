"""The supervisor alone, over one tame child."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from esper_core.local import supervisor
from esper_core.local.child import Child
from esper_core.local.layout import Layout
from esper_core.local.plan import Plan
from esper_core.local.state import Phase


class Deaf:
    """A question for readiness that, once it was answered, hangs and swallows the first cancellation.

    Python 3.11's ``asyncio.wait_for`` does so when it is cancelled just as what it waits for comes to an end, as
    happens to a question whose server dies.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.swallowed = asyncio.Event()

    async def __call__(self) -> None:
        self.asked += 1
        if self.asked != 2:
            return
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.swallowed.set()


async def test_a_child_that_dies_while_it_is_asked_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_POLL_READY", 0.01)
    layout, ready = Layout(tmp_path), Deaf()
    layout.create()
    child = Child("sleeper", ready=ready, command=(sys.executable, "-c", "import time; time.sleep(60)"))
    nothing: Any = None
    watched = supervisor.Supervisor(layout, Plan((child,), nothing))
    running = asyncio.create_task(watched.run())
    try:
        async with asyncio.timeout(10):
            while ready.asked < 2:  # noqa: ASYNC110 - the supervisor tells nobody
                await asyncio.sleep(0.01)
            first = watched._states["sleeper"].pid
            assert first is not None
            os.kill(first, signal.SIGKILL)
            await ready.swallowed.wait()
            now = watched._states["sleeper"]
            while now.pid in (first, None) or now.phase is not Phase.READY:
                await asyncio.sleep(0.01)
                now = watched._states["sleeper"]
        assert now.restarts == 1
    finally:
        os.kill(os.getpid(), signal.SIGTERM)  # how it is told to stop
        async with asyncio.timeout(10):
            await running
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            asyncio.get_running_loop().remove_signal_handler(number)
