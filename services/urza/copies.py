"""Copies of blobs: which of them is the one to read and write, and which are to be deleted.

The S3 store deletes without conditions, at any later moment, even when whoever asked for it has died. So nothing is
ever deleted under a name that may be wanted again: every copy of a blob has a number of its own, and a copy that has
been doomed never comes back. Whoever stores bytes claims the live copy, writes it, and then holds it in the transaction
that writes the row that needs it; if it was doomed meanwhile, the next copy is written instead. No lock is held while
bytes travel.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from esper_core.bus.database import Connection, Pool
from esper_core.errors import Unavailable
from esper_core.ids import sha256
from esper_core.store.blobs import Blobs

T = TypeVar("T")
LIVE, DOOMED, DELETED, GONE = 1, 2, 3, 4
ATTEMPTS = 5
_UNNEEDED = """NOT EXISTS (SELECT FROM urza.kernels k WHERE k.blob_sha256 = c.blob_sha256)
               AND NOT EXISTS (SELECT FROM urza.natives n WHERE n.blob_sha256 = c.blob_sha256)"""


@dataclass(frozen=True)
class Copy:
    """One copy of a blob."""

    digest: str
    number: int
    size: int
    """Bytes."""


class Copies:
    """The table of copies."""

    def __init__(self, database: Pool) -> None:
        self._database = database

    async def store(self, blobs: Blobs, blob: bytes, write: Callable[[Connection], Awaitable[T]]) -> T:
        """Keep bytes, and in the same transaction the row that needs them; what ``write`` gives.

        Raises:
            Unavailable: the blob store is away, or the blob is doomed as often as it is written.
        """
        digest = sha256(blob)
        for _ in range(ATTEMPTS):
            copy = await self.claim(digest, len(blob))
            await blobs.put(blob, copy.number)
            async with self._database.acquire() as connection, connection.transaction():
                if await self.hold(connection, copy):
                    return await write(connection)
            await blobs.delete(digest, copy.number)  # it was doomed while the bytes travelled
        raise Unavailable(f"blob {digest} is being deleted again and again", hint="store it again later")

    async def claim(self, digest: str, size: int) -> Copy:
        """The live copy of a blob, on record before anything is written.

        Raises:
            Unavailable: it is doomed as often as it is claimed.
        """
        for _ in range(ATTEMPTS):
            number = await self.live(digest)
            if number is None:
                await self._database.execute(
                    """INSERT INTO urza.copies (blob_sha256, number, blob_bytes)
                       SELECT $1, coalesce(max(number) + 1, 0), $2 FROM urza.copies WHERE blob_sha256 = $1
                       ON CONFLICT DO NOTHING""",
                    digest,
                    size,
                )
                number = await self.live(digest)
            if number is not None:
                return Copy(digest, number, size)
        raise Unavailable(f"blob {digest} is being deleted again and again", hint="store it again later")

    async def live(self, digest: str) -> int | None:
        """Number of the copy to read; None when there is none."""
        found: int | None = await self._database.fetchval(
            "SELECT number FROM urza.copies WHERE blob_sha256 = $1 AND state = 1", digest
        )
        return found

    async def hold(self, connection: Connection, copy: Copy) -> bool:
        """Whether ``copy`` is still live; if so nobody can doom it before the caller's transaction ends."""
        found = await connection.fetchval(
            "SELECT true FROM urza.copies WHERE blob_sha256 = $1 AND number = $2 AND state = 1 FOR SHARE",
            copy.digest,
            copy.number,
        )
        return found is not None

    async def unneeded(self, after: str, most: int) -> list[Copy]:
        """Live copies of blobs that nothing needs, by digest from ``after`` on; may have changed by the time one looks."""
        return await self._some(
            f"""SELECT blob_sha256, number, blob_bytes FROM urza.copies c WHERE state = 1 AND blob_sha256 > $1
               AND {_UNNEEDED} ORDER BY blob_sha256 LIMIT $2""",  # noqa: S608
            after,
            most,
        )

    async def dying(self, state: int) -> list[Copy]:
        """Copies that are ``DOOMED``, or ``DELETED`` once."""
        return await self._some(
            "SELECT blob_sha256, number, blob_bytes FROM urza.copies WHERE state = $1 AND state IN (2, 3)", state
        )

    async def doom(self, copy: Copy) -> bool:
        """Decide, for ever, that ``copy`` goes; False when something needs it after all."""
        async with self._database.acquire() as connection, connection.transaction():
            # first wait for whoever holds it, then look what was written: one statement would look and then wait
            await connection.execute(
                "SELECT FROM urza.copies WHERE blob_sha256 = $1 AND number = $2 FOR UPDATE", copy.digest, copy.number
            )
            done = await connection.execute(
                f"""UPDATE urza.copies c SET state = 2 WHERE blob_sha256 = $1 AND number = $2 AND state = 1
                   AND {_UNNEEDED}""",  # noqa: S608
                copy.digest,
                copy.number,
            )
        return bool(done == "UPDATE 1")

    async def advance(self, copy: Copy, state: int) -> bool:
        """Note that ``copy`` has come as far as ``state``; False when it had before."""
        done = await self._database.execute(
            "UPDATE urza.copies SET state = $3 WHERE blob_sha256 = $1 AND number = $2 AND state < $3",
            copy.digest,
            copy.number,
            state,
        )
        return bool(done == "UPDATE 1")

    async def _some(self, sql: str, *arguments: object) -> list[Copy]:
        rows = await self._database.fetch(sql, *arguments)
        return [Copy(row["blob_sha256"], row["number"], row["blob_bytes"]) for row in rows]
