"""What the bus knows of PostgreSQL: the types of its pool and connections, and how it looks when it is away."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TypeAlias

import asyncpg
import asyncpg.pool

from esper_core.errors import Unavailable

# asyncpg's classes take no type argument at run time
Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"

AWAY: tuple[type[Exception], ...] = (
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    OSError,  # refused, reset; TimeoutError is one of them
)
"""The server is stopped, starting, or the line to it broke; what was asked may be asked again."""


@contextlib.asynccontextmanager
async def lent(pool: Pool) -> AsyncIterator[Connection]:
    """A connection of the pool.

    Raises:
        Unavailable: the connection broke. asyncpg itself raises then, depending on the moment, what it also raises for
            a caller's mistakes, and from returning the connection to the pool what looks like a defect of its own.
    """
    lost = False
    try:
        async with pool.acquire() as connection:
            try:
                yield connection
            except BaseException:
                lost = _lost(connection)
                raise
    except (asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
        if lost or isinstance(error, asyncpg.InternalClientError):
            raise Unavailable("the database connection broke", hint="it is tried again") from error
        raise


def _lost(connection: Connection) -> bool:
    try:
        return connection.is_closed()
    except asyncpg.InterfaceError:  # the pool has taken it away already
        return True
