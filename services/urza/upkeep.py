"""Upkeep: the library collects its garbage by itself, now and then, one process at a time.

A row is the lease: who collects renews it, and when it lapses (its process died) the next one goes on. That only spares
work: collections beside one another, or one that has lost its lease, delete nothing that is needed (see
:mod:`services.urza.retention`). The first one of a new library comes after a whole interval, one that is overdue when the
process starts after ``FIRST_SECONDS``.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from dataclasses import dataclass

from esper_core import log
from esper_core.bus.database import Pool
from esper_core.errors import Unavailable
from esper_core.ids import new_id
from services.lease import held
from services.urza.retention import Progress, Retention

FIRST_SECONDS = 300.0
LOOK_SECONDS = 30.0
LEASE_SECONDS = 60.0
RETRY_SECONDS = 120.0
"""After a collection that failed."""
_LOG = log.get("urza")
_DUE = "coalesce(retry, coalesce(begun, created) + make_interval(secs => $1))"
_FREE = "holder = NULL, lease_until = NULL"


@dataclass(frozen=True)
class Standing:
    """How the library's own collections are getting on.

    Attributes:
        due: when the next one is due; None while they are turned off.
        holder: who collects at this moment; empty: nobody.
        begun, finished: the last one's times; None: not yet.
        reason: why the last one failed; empty when it did not.
        passes: collections that were finished.
        forgotten, blobs, bytes, kept: what the last finished one did.
    """

    due: dt.datetime | None
    holder: str
    begun: dt.datetime | None
    finished: dt.datetime | None
    reason: str
    passes: int
    forgotten: int
    blobs: int
    bytes: int
    kept: int


class Upkeep:
    """Collects whenever it is due.

    Args:
        database: where the row is.
        retention: what collects.
        every_seconds: between the beginnings of two collections; 0: none.
        keep_unused: as in ``Retention.collect``.
        lease_seconds: after its last sign of life a collection is anybody's.
    """

    def __init__(
        self,
        database: Pool,
        retention: Retention,
        every_seconds: float,
        keep_unused: int,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self._database, self._retention, self._lease = database, retention, lease_seconds
        self.every_seconds, self.keep_unused = every_seconds, keep_unused
        self._name = f"urza-{new_id()}"

    async def run(self) -> None:
        """Collect whenever it is due, until cancelled.

        Raises:
            asyncpg.PostgresError, OSError: the database is away; the next run goes on.
        """
        await asyncio.sleep(min(FIRST_SECONDS, self.every_seconds))
        while True:
            await self.once()
            await asyncio.sleep(min(LOOK_SECONDS, self.every_seconds))

    async def once(self) -> Progress | None:
        """Collect if that is due and nobody else does; what came of it, None when there was nothing to do or it failed."""
        if not await self._claim():
            return None
        progress = Progress()
        try:
            async with held(self._renew, self._lease / 3):
                async for step in self._retention.collect(self.keep_unused):
                    progress = step
        except Unavailable as error:
            _LOG.warning("upkeep.failed", reason=error.message)
            await self._put_off(RETRY_SECONDS, error.message)
            return None
        except asyncio.CancelledError:
            await self._put_off(0.0, "broken off")
            raise
        await self._write(
            f"finished = now(), reason = '', passes = passes + 1, forgotten = $2, blobs = $3, bytes = $4, kept = $5, {_FREE}",
            progress.forgotten,
            progress.blobs,
            progress.bytes,
            progress.kept,
        )
        return progress

    async def standing(self) -> Standing:
        """As the row has it, whichever process collects."""
        row = await self._database.fetchrow(
            f"""SELECT {_DUE} AS due, coalesce(holder, '') AS holder, begun, finished, reason, passes, forgotten, blobs,
                    bytes, kept FROM urza.upkeep""",  # noqa: S608
            self.every_seconds,
        )
        assert row is not None  # noqa: S101 - the migration puts it there
        return Standing(**{**dict(row), "due": row["due"] if self.every_seconds else None})

    async def _claim(self) -> bool:
        tag = await self._database.execute(
            f"""UPDATE urza.upkeep SET holder = $2, lease_until = now() + make_interval(secs => $3), begun = now(), retry = NULL
                WHERE CASE WHEN holder IS NULL THEN {_DUE} <= now() ELSE lease_until < now() END""",  # noqa: S608
            self.every_seconds,
            self._name,
            self._lease,
        )
        return bool(tag == "UPDATE 1")

    async def _renew(self) -> bool:
        return await self._write("lease_until = now() + make_interval(secs => $2)", self._lease)

    async def _put_off(self, seconds: float, reason: str) -> None:
        await self._write(f"retry = now() + make_interval(secs => $2), reason = $3, {_FREE}", seconds, reason[:500])

    async def _write(self, change: str, *values: object) -> bool:
        """Change the row while it is ours; False when the lease was lost."""
        tag = await self._database.execute(f"UPDATE urza.upkeep SET {change} WHERE holder = $1", self._name, *values)  # noqa: S608
        return bool(tag == "UPDATE 1")
