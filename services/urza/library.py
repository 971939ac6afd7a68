"""Kernels in the library: immutable bytes with signed papers, found by what is known of them.

Nothing is kept unchecked: the blob is hashed, the manifest's figures are recomputed from its blueprint, and both
statements must be by listed keys about exactly this manifest. The bytes' insides are not looked at here (that needs
torch and is Urabrask's work), so a stored kernel is well-formed in its papers and nothing more until it is VALIDATED.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from esper_core.blueprint.analyse import analyse
from esper_core.bus.database import Connection, Pool
from esper_core.errors import Conflict, Corrupt, InvalidInput, NotFound
from esper_core.ids import sha256
from esper_core.kernel.manifest import KernelManifest
from esper_core.kernel.record import KernelRecord, KernelStatus
from esper_core.kernel.sign import Attestation
from esper_core.kernel.trust import TrustList, verify_statement
from esper_core.store.blobs import Blobs
from services.urza.blueprints import SHORTEST_PREFIX
from services.urza.copies import Copies
from services.urza.query import PLANNING, Place, Query, classes, value_column
from services.urza.records import KERNEL, attest, kernel
from services.urza.usage import Usage, usage

CHUNK_BYTES = 128 * 1024


Settle = Callable[[Connection], Awaitable[None]]

BURIED = frozenset({KernelStatus.REJECTED, KernelStatus.RETIRED})
"""As what a kernel was forgotten for good."""


@dataclass(frozen=True)
class Kept:
    """A kernel, what became of it in the field, and in a search the token of the page that begins after it."""

    record: KernelRecord
    usage: Usage
    token: str = ""


class Library:
    """The shelf of kernels.

    Args:
        database: where the rows are.
        blobs: where the bytes are.
        trust: path of the list of keys whose statements count; read anew for every statement, so that revoking
            is instant.
    """

    def __init__(self, database: Pool, blobs: Blobs, trust: Path) -> None:
        self._database = database
        self._blobs = blobs
        self._trust = trust
        self._copies = Copies(database)

    async def check(self, manifest: KernelManifest, attestation: Attestation) -> None:
        """Judge a kernel's papers before its bytes are taken.

        Raises:
            InvalidInput: the manifest's figures are not what its blueprint gives at its interface.
            Untrusted: the build statement is not by a listed build key about this manifest.
            NotFound: the blueprint is not in the library.
            Conflict: the kernel was judged unfit or withdrawn, and forgotten.
        """
        analysis = analyse(manifest.blueprint, manifest.interface, manifest.symbols)
        if manifest.symbols != manifest.blueprint.bind(manifest.symbols):
            raise InvalidInput("the manifest leaves symbols open", hint="name the value of every symbol")
        if (manifest.parameters, manifest.flops) != (analysis.parameters, analysis.flops):
            raise InvalidInput(
                f"the manifest claims {manifest.parameters} parameters and {manifest.flops} FLOPs, "
                f"its blueprint has {analysis.parameters} and {analysis.flops}",
                hint="build the manifest with KernelManifest.describe",
            )
        verify_statement(manifest, attestation, TrustList.load(self._trust), "build")
        known = await self._database.fetchval(
            "SELECT true FROM urza.blueprints WHERE blueprint_id = $1", manifest.blueprint_id
        )
        if not known:
            raise NotFound(f"no blueprint {manifest.blueprint_id}", hint="upload the blueprint first")
        if buried := await self.buried(manifest.kernel_id):
            raise Conflict(buried, hint="build another kernel")

    async def buried(self, kernel_id: str) -> str:
        """That the kernel was forgotten for good and why, in words; empty when it may come."""
        found = await self._tombstone(kernel_id)
        return _epitaph(found) if found is not None and KernelStatus(found["status"]) in BURIED else ""

    async def put(
        self,
        manifest: KernelManifest,
        attestation: Attestation,
        blob: bytes,
        created_by: str,
        settle: Settle | None = None,
    ) -> bool:
        """Keep a checked kernel as COMPILED; False when it was there already.

        Args:
            manifest: what it is.
            attestation: the build's statement.
            blob: its bytes.
            created_by: principal that brings it.
            settle: what else is to be written of it, in the same transaction, when it is new.

        Raises:
            Corrupt: blob and manifest disagree.
            Conflict: the kernel was judged unfit or withdrawn, and forgotten.
            Unavailable: the blob store is away.
        """
        if len(blob) != manifest.blob_bytes or sha256(blob) != manifest.blob_sha256:
            raise Corrupt(
                f"{manifest.kernel_id}: {len(blob)} bytes with digest {sha256(blob)[:12]}… instead of "
                f"{manifest.blob_bytes} with {manifest.blob_sha256[:12]}…",
                hint="upload it again",
            )

        async def write(connection: Connection) -> bool:
            created = await _insert(connection, manifest, attestation, created_by)
            if created and settle is not None:
                await settle(connection)
            return created

        return await self._copies.store(self._blobs, blob, write)

    async def get(self, wanted: str) -> Kept:
        """The kernel of that id or prefix.

        Raises:
            NotFound: none.
            InvalidInput: too short a prefix, or one that several share.
        """
        if not wanted.startswith("kernel-") or len(wanted) < SHORTEST_PREFIX:
            raise InvalidInput(f"{wanted!r} is no kernel id", hint=f"kernel- and at least {SHORTEST_PREFIX - 7} digits")
        rows = await self._database.fetch(
            f"{KERNEL} WHERE k.kernel_id >= $1 AND k.kernel_id < $1 || 'g' AND starts_with(k.kernel_id, $1) LIMIT 5",
            wanted,
        )
        if not rows:
            buried = await self._tombstone(wanted)
            said = f"no kernel {wanted}" if buried is None else _epitaph(buried)
            raise NotFound(said, hint="`esperctl kernel list` shows what there is")
        if len(rows) > 1:
            some = ", ".join(sorted(row["kernel_id"][:24] for row in rows))
            raise InvalidInput(f"several kernels begin with {wanted!r}", hint=f"give more digits: {some}")
        return Kept(kernel(rows[0]), usage(rows[0]))

    async def stream(self, manifest: KernelManifest, offset: int) -> AsyncIterator[tuple[int, bytes]]:
        """The blob from ``offset`` on: positions and at most 128 KiB each. The whole is verified before the first byte.

        Raises:
            InvalidInput: past the end.
            Corrupt: the stored bytes do not match their digest, or are gone.
        """
        if offset > manifest.blob_bytes:
            raise InvalidInput(
                f"offset {offset} is past the end of {manifest.blob_bytes} bytes", hint="start over from offset 0"
            )
        number = await self._copies.live(manifest.blob_sha256)
        try:
            if number is None:
                raise NotFound(f"no blob {manifest.blob_sha256}")
            blob = await self._blobs.get(manifest.blob_sha256, number)
        except NotFound:
            raise Corrupt(f"the blob of {manifest.kernel_id} is gone", hint="have the kernel built anew") from None
        for start in range(offset, len(blob), CHUNK_BYTES):
            yield start, blob[start : start + CHUNK_BYTES]

    async def query(self, query: Query) -> tuple[list[Kept], bool]:
        """Kernels that ``query`` asks for, in its order, and whether there are more.

        Raises:
            InvalidInput: the token is none of ours.
        """
        column = value_column(query.order)
        found: list[tuple[int, asyncpg.Record]] = []
        async with self._database.acquire() as connection, connection.transaction(readonly=True):
            await connection.execute(PLANNING)
            for cls, asked in classes(query):
                rows = await connection.fetch(f"{KERNEL} {asked.sql}", *asked.arguments)
                found += [(cls, row) for row in rows]
                if len(found) > query.size:
                    break

        def read() -> list[Kept]:
            return [
                Kept(kernel(row), usage(row), Place(cls, row[column], row["kernel_id"]).token())
                for cls, row in found[: query.size]
            ]

        return await asyncio.to_thread(read), len(found) > query.size

    async def _tombstone(self, kernel_id: str) -> asyncpg.Record | None:
        return await self._database.fetchrow(
            "SELECT kernel_id, status, reason FROM urza.tombstones WHERE kernel_id = $1", kernel_id
        )


def _epitaph(buried: asyncpg.Record) -> str:
    said = f"{buried['kernel_id']} was {KernelStatus(buried['status']).name} and has been forgotten"
    return f"{said}: {buried['reason']}" if buried["reason"] else said


async def _insert(connection: Connection, manifest: KernelManifest, attestation: Attestation, created_by: str) -> bool:
    """Write the row and its build statement; False when it was there already."""
    try:
        async with connection.transaction():
            tag = await connection.execute(
                """INSERT INTO urza.kernels
                       (kernel_id, blueprint_id, interface_id, manifest,
                        blob_sha256, blob_bytes, parameters, created_by, born_of)
                   SELECT $1, blueprint_id, $3, $4, $5, $6, $7, $8, created_by
                   FROM urza.blueprints WHERE blueprint_id = $2 ON CONFLICT DO NOTHING""",
                manifest.kernel_id,
                manifest.blueprint_id,
                manifest.interface_id,
                manifest.model_dump_json(),
                manifest.blob_sha256,
                manifest.blob_bytes,
                manifest.parameters,
                created_by,
            )
    except asyncpg.RestrictViolationError:  # forgotten between the check of its papers and now
        raise Conflict(f"{manifest.kernel_id} has been forgotten for good", hint="build another kernel") from None
    created = bool(tag == "INSERT 0 1")
    if created:
        await connection.execute("DELETE FROM urza.tombstones WHERE kernel_id = $1", manifest.kernel_id)
        await attest(connection, manifest.kernel_id, "build", attestation)
    return created
