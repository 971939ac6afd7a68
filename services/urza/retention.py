"""What the library forgets, and how bytes that nobody needs are deleted without ever deleting others.

Forgotten are kernels that were judged unfit or withdrawn, and kernels that were never used and are not among the newest
so many; how long ago something happened is counted in kernels, not read off a clock. A forgotten kernel leaves a
tombstone, its blueprint stays. Every step is one transaction or can be repeated, so that a collection may die at any
moment and the next one goes on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace

from esper_core import log
from esper_core.bus.database import Pool
from esper_core.kernel.record import KernelStatus
from esper_core.store.blobs import Blobs
from services.urza.copies import DELETED, DOOMED, GONE, Copies, Copy

BATCH = 200
_FORGETTABLE = "(k.status IN (3, 4) OR (k.interest = '-infinity' AND k.serial <= $1))"
_LOG = log.get("urza")

Step = Callable[[str], Awaitable[None]]


@dataclass(frozen=True)
class Progress:
    """How far a collection is."""

    doomed: int = 0
    """Kernels to forget in all, as counted at the beginning."""
    rejected: int = 0
    retired: int = 0
    unused: int = 0
    blobs: int = 0
    bytes: int = 0
    kept: int = 0
    """Kernels that remain."""
    done: bool = False

    @property
    def forgotten(self) -> int:
        return self.rejected + self.retired + self.unused

    def with_blob(self, copy: Copy) -> Progress:
        return replace(self, blobs=self.blobs + 1, bytes=self.bytes + copy.size)

    def with_kernel(self, status: KernelStatus) -> Progress:
        name = {KernelStatus.REJECTED: "rejected", KernelStatus.RETIRED: "retired"}.get(status, "unused")
        return replace(self, **{name: getattr(self, name) + 1})


async def _nothing(_: str) -> None:
    """No step is interrupted."""


class Retention:
    """Forgets and deletes.

    Args:
        database: where the rows are.
        blobs: where the bytes are.
        step: called after every step with its name (``forgotten``, ``doomed``, ``deleted``, ``noted``, ``swept``);
            tests die there.
    """

    def __init__(self, database: Pool, blobs: Blobs, step: Step = _nothing) -> None:
        self._database, self._blobs, self._step = database, blobs, step
        self._copies = Copies(database)

    async def collect(self, keep_unused: int) -> AsyncIterator[Progress]:
        """Forget what is to be forgotten, then delete what no kernel needs; yields after every batch.

        Args:
            keep_unused: kernels that were never used are kept when they are among the newest so many.

        Raises:
            Unavailable: the blob store is away; what was done stays done.
        """
        newest = await self._newest(keep_unused)
        planned = await self._count(newest)
        progress = Progress(doomed=planned.doomed, kept=planned.kept)
        async for step in self._forget(newest, progress):
            progress = step
            yield progress
        async for step in self._delete(progress):
            progress = step
            yield progress
        kept = await self._database.fetchval("SELECT count(*) FROM urza.kernels")
        _LOG.info("urza.collected", forgotten=progress.forgotten, blobs=progress.blobs, bytes=progress.bytes, kept=kept)
        yield replace(progress, kept=kept, done=True)

    async def foresee(self, keep_unused: int) -> Progress:
        """What ``collect`` would do now; changes nothing."""
        newest = await self._newest(keep_unused)
        planned = await self._count(newest)
        row = await self._database.fetchrow(
            f"""SELECT count(*) AS blobs, coalesce(sum(blob_bytes), 0)::bigint AS bytes FROM urza.copies c
                WHERE state = 2 OR (state = 1
                    AND NOT EXISTS (
                        SELECT FROM urza.kernels k WHERE k.blob_sha256 = c.blob_sha256 AND NOT {_FORGETTABLE})
                    AND NOT EXISTS (
                        SELECT FROM urza.natives n JOIN urza.kernels k USING (kernel_id)
                        WHERE n.blob_sha256 = c.blob_sha256 AND NOT {_FORGETTABLE}))""",  # noqa: S608
            newest,
        )
        assert row is not None  # noqa: S101 - an aggregate has one row
        return replace(planned, blobs=row["blobs"], bytes=row["bytes"], done=True)

    async def _newest(self, keep_unused: int) -> int:
        """The serial up to which a kernel that was never used is old."""
        found: int | None = await self._database.fetchval(
            "SELECT serial FROM urza.kernels ORDER BY serial DESC OFFSET $1 LIMIT 1", keep_unused
        )
        return 0 if found is None else found

    async def _count(self, newest: int) -> Progress:
        rows = await self._database.fetch(
            f"""SELECT CASE WHEN NOT {_FORGETTABLE} THEN 0 ELSE k.status END AS status, count(*)
                FROM urza.kernels k GROUP BY 1""",  # noqa: S608
            newest,
        )
        counts = {row["status"]: row["count"] for row in rows}
        rejected, retired = counts.pop(KernelStatus.REJECTED, 0), counts.pop(KernelStatus.RETIRED, 0)
        kept, unused = counts.pop(0, 0), sum(counts.values())
        return Progress(rejected + retired + unused, rejected, retired, unused, kept=kept)

    async def _forget(self, newest: int, progress: Progress) -> AsyncIterator[Progress]:
        while gone := await self._forget_some(newest):
            for status in gone:
                progress = progress.with_kernel(status)
            await self._step("forgotten")
            yield progress

    async def _forget_some(self, newest: int) -> list[KernelStatus]:
        """Bury a batch: the rows go and the tombstones come in one transaction."""
        async with self._database.acquire() as connection, connection.transaction():
            rows = await connection.fetch(
                f"SELECT k.kernel_id, k.status FROM urza.kernels k WHERE {_FORGETTABLE} LIMIT $2 FOR UPDATE",  # noqa: S608
                newest,
                BATCH,
            )
            ids = [row["kernel_id"] for row in rows]
            await connection.execute(
                """INSERT INTO urza.tombstones (kernel_id, blueprint_id, interface_id, blob_sha256, serial, status, reason)
                   SELECT kernel_id, blueprint_id, interface_id, blob_sha256, serial, status, reason
                   FROM urza.kernels WHERE kernel_id = ANY($1)""",
                ids,
            )
            await connection.execute("DELETE FROM urza.attestations WHERE kernel_id = ANY($1)", ids)
            await connection.execute("DELETE FROM urza.kernels WHERE kernel_id = ANY($1)", ids)
        return [KernelStatus(row["status"]) for row in rows]

    async def _delete(self, progress: Progress) -> AsyncIterator[Progress]:
        for copy in await self._copies.dying(DELETED):  # by an earlier collection; a write may have come in since
            await self._blobs.delete(copy.digest, copy.number)
            await self._copies.advance(copy, GONE)
            await self._step("swept")
        async for step in self._delete_doomed(progress):  # what an earlier collection had decided
            progress = step
            yield progress
        after = ""
        while wanted := await self._copies.unneeded(after, BATCH):
            for copy in wanted:
                if await self._copies.doom(copy):
                    await self._step("doomed")
            async for step in self._delete_doomed(progress):
                progress = step
                yield progress
            after = wanted[-1].digest

    async def _delete_doomed(self, progress: Progress) -> AsyncIterator[Progress]:
        for copy in await self._copies.dying(DOOMED):
            await self._blobs.delete(copy.digest, copy.number)
            await self._step("deleted")
            if await self._copies.advance(copy, DELETED):
                progress = progress.with_blob(copy)
            await self._step("noted")
            yield progress
