"""A claim on a row, kept while the work on it goes on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import asyncpg

from esper_core import log

LOG = log.get(__name__)


@contextlib.asynccontextmanager
async def held(renew: Callable[[], Awaitable[bool]], every_seconds: float) -> AsyncIterator[None]:
    """Call ``renew`` regularly while the body runs.

    Losing the claim does not interrupt the body: its last write must be guarded by the claimant's name anyway, for a
    process may be stopped between any two checks.
    """

    async def renewing() -> None:
        while True:
            await asyncio.sleep(every_seconds)
            try:
                if not await renew():
                    LOG.warning("lease.lost")
                    return
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
                LOG.warning("lease.not_renewed", reason=str(error))

    task = asyncio.create_task(renewing())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
