"""What the bus knows of PostgreSQL: the types of its pool and connections, and how it looks when it is away."""

from __future__ import annotations

from typing import TypeAlias

import asyncpg
import asyncpg.pool

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
