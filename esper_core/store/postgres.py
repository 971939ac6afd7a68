"""PostgreSQL: the connection pool, and migrations from numbered SQL files.

A schema's directory holds ``0001_what.sql``, ``0002_…``; each file runs once, in its own transaction, in order, and is
remembered with its digest: a file that was edited or taken away after it ran is refused. An advisory lock lets any
number of processes migrate at the same time. There is no way back down: a mistake is mended by the next file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit

import asyncpg

from esper_core import log
from esper_core.clock import SYSTEM
from esper_core.errors import Conflict, InvalidInput, Unavailable
from esper_core.ids import sha256

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"  # the class takes no type argument at run time

PATIENCE = 15.0  # seconds to wait for a server that is starting
CONNECT_TIMEOUT = 10.0  # seconds one connection may take to come about
COMMAND_TIMEOUT = 60.0  # seconds one statement may take
RESET_TIMEOUT = 5.0  # seconds giving a connection back may take

_LOCK = 0x65737065  # "espe"
_FILE = re.compile(r"^(\d{4})_[a-z0-9_]+\.sql$")
_SCHEMA = re.compile(r"^[a-z][a-z0-9_]{0,40}$")
_AWAY = (OSError, asyncpg.CannotConnectNowError, asyncpg.PostgresConnectionError, asyncpg.TooManyConnectionsError)
_log = log.get("store")


@dataclass(frozen=True)
class Migration:
    """One SQL file.

    Attributes:
        schema: it belongs to.
        number: its place, from 1.
        name: of the file.
        sql: what it does.
    """

    schema: str
    number: int
    name: str
    sql: str

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the text."""
        return sha256(self.sql.encode())


class _Connection(asyncpg.Connection):
    """A connection that is given back quickly or dropped: the server may have died while it was lent."""

    async def reset(self, *, timeout: float | None = None) -> None:
        await super().reset(timeout=RESET_TIMEOUT if timeout is None else timeout)


async def open_pool(dsn: str, *, size: int = 10) -> Pool:
    """Connect to PostgreSQL, waiting for a server that is still starting.

    The pool replaces connections that a server's restart has broken; the statement that meets one raises.

    Args:
        dsn: ``postgresql://user:password@host:port/database``.
        size: most connections at once.

    Raises:
        Unavailable: no server answered within 15 s.
        InvalidInput: the DSN is none, or the server knows no such user, password or database.
    """
    try:
        pool = await asyncpg.create_pool(
            dsn,
            min_size=0,
            max_size=size,
            timeout=CONNECT_TIMEOUT,
            command_timeout=COMMAND_TIMEOUT,
            connection_class=_Connection,
        )
        try:
            await _answer(pool)
        except BaseException:
            await pool.close()
            raise
    except _AWAY as error:
        raise _away(dsn, error) from error
    except (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError, ValueError) as error:
        raise InvalidInput(
            f"PostgreSQL refuses us: {error}", hint="check user, password and database in the DSN"
        ) from None
    return pool


async def _answer(pool: Pool) -> None:
    """Return once the server answers; what is in ``_AWAY`` is raised when it did not within ``PATIENCE``."""
    deadline = SYSTEM.monotonic() + PATIENCE
    while True:
        try:
            await pool.fetchval("SELECT 1")
        except _AWAY:
            if SYSTEM.monotonic() > deadline:
                raise
            await SYSTEM.sleep(0.2)
        else:
            return


async def migrate(dsn: str, schemas: Mapping[str, Path]) -> list[Migration]:
    """Bring every schema up to date; safe to repeat and to run in several processes at once.

    Args:
        dsn: of the database.
        schemas: directory of numbered ``*.sql`` files by schema name. The schema is created and is first in the search
            path while its files run.

    Returns:
        What was run now, in order.

    Raises:
        InvalidInput: a misnamed file, a gap or a repeated number, SQL the server does not take.
        Conflict: a file differs from what was run under its number, or is gone.
        Unavailable: no server answered.
    """
    plans = {schema: read_migrations(schema, folder) for schema, folder in schemas.items()}
    pool = await open_pool(dsn, size=1)
    try:
        async with pool.acquire() as connection:
            await connection.execute("SELECT pg_advisory_lock($1)", _LOCK)
            await connection.execute(
                "CREATE SCHEMA IF NOT EXISTS esper; CREATE TABLE IF NOT EXISTS esper.migrations ("
                " schema text NOT NULL, number integer NOT NULL, name text NOT NULL, sha256 text NOT NULL,"
                " applied timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (schema, number))"
            )
            done = [ran for plan in plans.items() for ran in await _apply(connection, *plan)]
    except _AWAY as error:
        raise _away(dsn, error) from error
    finally:
        await pool.close()
    if done:
        _log.info("store.migrated", files=[f"{ran.schema}/{ran.name}" for ran in done])
    return done


def read_migrations(schema: str, folder: Path) -> list[Migration]:
    """The files of one schema in order; raises InvalidInput as ``migrate``."""
    if not _SCHEMA.match(schema):
        raise InvalidInput(f"schema name {schema!r}", hint="a-z, 0-9 and _, beginning with a letter")
    found = []
    for path in sorted(folder.glob("*.sql")):
        if not (match := _FILE.match(path.name)):
            raise InvalidInput(f"{path} is misnamed", hint="four digits and what it does: 0002_add_tags.sql")
        found.append(Migration(schema, int(match.group(1)), path.name, path.read_text("utf-8")))
    if [migration.number for migration in found] != list(range(1, len(found) + 1)):
        raise InvalidInput(
            f"the migrations of {schema} are not numbered 1, 2, 3 …: {', '.join(m.name for m in found)}",
            hint=f"rename the files under {folder}",
        )
    return found


async def _apply(
    connection: asyncpg.pool.PoolConnectionProxy[asyncpg.Record], schema: str, plan: list[Migration]
) -> list[Migration]:
    rows = await connection.fetch("SELECT number, name, sha256 FROM esper.migrations WHERE schema = $1", schema)
    ran = {row["number"]: row for row in rows}
    for number, row in ran.items():
        migration = plan[number - 1] if number <= len(plan) else None
        if migration is None or migration.digest != row["sha256"]:
            raise Conflict(
                f"{schema}/{row['name']} was {'changed' if migration else 'taken away'} after it was run",
                hint="put the old text back and make the change in a new, higher-numbered file",
            )
    fresh = [migration for migration in plan if migration.number not in ran]
    for migration in fresh:
        try:
            async with connection.transaction():
                await connection.execute(f'CREATE SCHEMA IF NOT EXISTS "{schema}"; SET LOCAL search_path = "{schema}"')
                await connection.execute(migration.sql)
                await connection.execute(
                    "INSERT INTO esper.migrations (schema, number, name, sha256) VALUES ($1, $2, $3, $4)",
                    schema,
                    migration.number,
                    migration.name,
                    migration.digest,
                )
        except asyncpg.PostgresConnectionError:
            raise
        except asyncpg.PostgresError as error:
            raise InvalidInput(
                f"{schema}/{migration.name}: {error}", hint="mend the SQL; nothing of it was kept"
            ) from error
    return fresh


def _away(dsn: str, error: Exception) -> Unavailable:
    parts = urlsplit(dsn)
    where = parts.hostname or "its unix socket"
    return Unavailable(
        f"PostgreSQL at {where} does not answer: {error or type(error).__name__}",
        hint="`esperctl status` says what runs; `esperctl up` starts it",
    )
