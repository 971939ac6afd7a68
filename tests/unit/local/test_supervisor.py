"""The supervisor alone, over one tame child."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import cast

import pytest

from esper_core.config import Endpoints
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


class Odd:
    """A question that fails in a way nobody expected, at first and once more later."""

    def __init__(self) -> None:
        self.asked = 0

    async def __call__(self) -> None:
        self.asked += 1
        if self.asked in (1, 3):
            raise RuntimeError("cannot switch to state 12")


Watch = Callable[[Callable[[], Awaitable[None]]], AbstractAsyncContextManager[supervisor.Supervisor]]


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watch:
    """``async with watch(ready) as it``: a supervisor that runs one sleeping child and asks ``ready`` about it."""
    monkeypatch.setattr(supervisor, "_POLL_READY", 0.01)

    @asynccontextmanager
    async def run(ready: Callable[[], Awaitable[None]]) -> AsyncIterator[supervisor.Supervisor]:
        layout, nothing = Layout(tmp_path), cast(Endpoints, None)
        layout.create()
        child = Child("sleeper", ready=ready, command=(sys.executable, "-c", "import time; time.sleep(60)"))
        watched = supervisor.Supervisor(layout, Plan((child,), nothing))
        running = asyncio.create_task(watched.run())
        try:
            async with asyncio.timeout(10):
                yield watched
        finally:
            assert not running.done()
            os.kill(os.getpid(), signal.SIGTERM)  # how it is told to stop
            async with asyncio.timeout(10):
                await running
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                asyncio.get_running_loop().remove_signal_handler(number)

    return run


async def _until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110 - the supervisor tells nobody
        await asyncio.sleep(0.01)


async def test_a_child_that_dies_while_it_is_asked_is_started_again(watch: Watch) -> None:
    ready = Deaf()
    async with watch(ready) as watched:
        await _until(lambda: ready.asked >= 2)
        first = watched._states["sleeper"].pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await ready.swallowed.wait()
        await _until(lambda: watched._states["sleeper"].pid not in (first, None))
        await _until(lambda: watched._states["sleeper"].phase is Phase.READY)
        assert watched._states["sleeper"].restarts == 1


async def test_a_question_that_fails_oddly_is_a_no_and_ends_nothing(watch: Watch) -> None:
    ready = Odd()
    async with watch(ready) as watched:
        await _until(lambda: watched._states["sleeper"].phase is Phase.READY)
        await _until(lambda: watched._states["sleeper"].phase is Phase.UNHEALTHY)
        assert watched._states["sleeper"].message == "cannot switch to state 12"
        await _until(lambda: watched._states["sleeper"].healthy)
        assert watched._states["sleeper"].restarts == 0
