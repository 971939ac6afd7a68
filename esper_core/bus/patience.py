"""Outlasting what is away: NATS, PostgreSQL or a dependency comes back, and the work goes on.

Only what is known to pass is waited out; anything else propagates to whoever supervises the task.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from math import inf

import asyncpg
import nats.errors

from esper_core import log
from esper_core.bus import database
from esper_core.clock import SYSTEM
from esper_core.errors import Exhausted, NotFound, Unavailable

AWAY: tuple[type[Exception], ...] = (
    *database.AWAY,
    asyncpg.InterfaceError,  # "connection is closed"
    asyncpg.InternalClientError,  # asyncpg stumbling over a connection that broke
    nats.errors.Error,
    Unavailable,
    Exhausted,
    NotFound,
)
"""What makes a forever-task of the bus pause; NotFound is a stream or a consumer that has yet to be made again."""

PAUSE_FIRST, PAUSE_MAX = 0.1, 3.0  # seconds
HEALTHY = 30.0  # seconds of work after which the pauses begin small again

_log = log.get("bus")


def heed_cancellation() -> None:
    """Raise CancelledError when this task was asked to end and something on the way swallowed it.

    nats-py does when the connection closes meanwhile, and so does Python 3.11's ``wait_for`` when what it waits for
    comes at the same moment. Every loop that runs for ever calls this in each round.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def insist(work: Callable[[], Awaitable[None]], away: tuple[type[Exception], ...], seconds: float = inf) -> None:
    """Do ``work`` once, trying again with growing pauses while it raises what is in ``away``.

    Raises:
        Exception: what ``work`` raises that is not in ``away``, or still is when ``seconds`` have passed.
    """
    begun, pause = SYSTEM.monotonic(), PAUSE_FIRST
    while True:
        heed_cancellation()
        try:
            return await work()
        except away as error:
            if SYSTEM.monotonic() + pause - begun > seconds:
                raise
            _log.warning("bus.waiting", seconds=pause, error=f"{type(error).__name__}: {error}")
        await SYSTEM.sleep(pause)
        pause = min(2 * pause, PAUSE_MAX)


async def persist(work: Callable[[], Awaitable[None]], name: str) -> None:
    """Run ``work`` again and again for ever, with growing pauses while something is away.

    Raises:
        Exception: whatever ``work`` raises that is not in ``AWAY``.
    """
    pause = PAUSE_FIRST
    while True:
        heed_cancellation()
        begun = SYSTEM.monotonic()
        try:
            await work()
            pause = PAUSE_FIRST
        except AWAY as error:
            if SYSTEM.monotonic() - begun > HEALTHY:
                pause = PAUSE_FIRST
            _log.warning("bus.waiting", task=name, seconds=pause, error=f"{type(error).__name__}: {error}")
            await SYSTEM.sleep(pause)
            pause = min(2 * pause, PAUSE_MAX)
