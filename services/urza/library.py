"""Kernels in the library: immutable bytes with signed papers, and a status that moves along few edges.

Nothing is kept unchecked: the blob is hashed, the manifest's figures are recomputed from its blueprint, and both
statements must be by listed keys about exactly this manifest. The bytes' insides are not looked at here (that needs
torch and is Urabrask's work), so a stored kernel is well-formed in its papers and nothing more until it is VALIDATED.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from esper_core.blueprint.analyse import analyse
from esper_core.bus.database import Connection, Pool
from esper_core.errors import Conflict, Corrupt, Forbidden, InvalidInput, NotFound
from esper_core.ids import sha256
from esper_core.kernel.manifest import KernelManifest
from esper_core.kernel.record import KernelRecord, KernelStatus, Measurement
from esper_core.kernel.sign import Attestation, Role
from esper_core.kernel.trust import TrustList, verify_statement
from esper_core.store.blobs import Blobs
from services.urza.blueprints import SHORTEST_PREFIX
from services.urza.records import KERNEL, kernel, kernels

CHUNK_BYTES = 128 * 1024
JUDGE = "urabrask"
"""The one principal that may say VALIDATED or REJECTED."""


@dataclass(frozen=True)
class Verdict:
    """A status change and what stands behind it."""

    status: KernelStatus
    reason: str = ""
    tags: tuple[str, ...] = ()
    measurement: Measurement | None = None
    attestation: Attestation | None = None


@dataclass(frozen=True)
class Query:
    """What kernels are wanted; empty and 0 do not restrict."""

    interface_id: str = ""
    status: int = 0
    required_tags: Sequence[str] = ()
    excluded_tags: Sequence[str] = ()
    max_parameters: int = 0
    max_forward_seconds: float = 0.0
    blueprint_id: str = ""
    size: int = 100
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

    async def check(self, manifest: KernelManifest, attestation: Attestation) -> None:
        """Judge a kernel's papers before its bytes are taken.

        Raises:
            InvalidInput: the manifest's figures are not what its blueprint gives at its interface.
            Untrusted: the build statement is not by a listed build key about this manifest.
            NotFound: the blueprint is not in the library.
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
        self._verify(manifest, attestation, "build")
        known = await self._database.fetchval(
            "SELECT true FROM urza.blueprints WHERE blueprint_id = $1", manifest.blueprint_id
        )
        if not known:
            raise NotFound(f"no blueprint {manifest.blueprint_id}", hint="upload the blueprint first")

    async def put(self, manifest: KernelManifest, attestation: Attestation, blob: bytes, created_by: str) -> bool:
        """Keep a checked kernel as COMPILED; False when it was there already.

        Raises:
            Corrupt: blob and manifest disagree.
            Unavailable: the blob store is away.
        """
        if len(blob) != manifest.blob_bytes or sha256(blob) != manifest.blob_sha256:
            raise Corrupt(
                f"{manifest.kernel_id}: {len(blob)} bytes with digest {sha256(blob)[:12]}… instead of "
                f"{manifest.blob_bytes} with {manifest.blob_sha256[:12]}…",
                hint="upload it again",
            )
        await self._blobs.put(blob)
        async with self._database.acquire() as connection, connection.transaction():
            tag = await connection.execute(
                """INSERT INTO urza.kernels
                       (kernel_id, blueprint_id, interface_id, manifest,
                        blob_sha256, blob_bytes, parameters, created_by)
                   VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT DO NOTHING""",
                manifest.kernel_id,
                manifest.blueprint_id,
                manifest.interface_id,
                manifest.model_dump_json(),
                manifest.blob_sha256,
                manifest.blob_bytes,
                manifest.parameters,
                created_by,
            )
            created = bool(tag == "INSERT 0 1")
            if created:
                await _attest(connection, manifest.kernel_id, "build", attestation)
        return created

    async def get(self, wanted: str) -> KernelRecord:
        """The kernel of that id or prefix.

        Raises:
            NotFound: none.
            InvalidInput: too short a prefix, or one that several share.
        """
        if not wanted.startswith("kernel-") or len(wanted) < SHORTEST_PREFIX:
            raise InvalidInput(f"{wanted!r} is no kernel id", hint=f"kernel- and at least {SHORTEST_PREFIX - 7} digits")
        rows = await self._database.fetch(f"{KERNEL} WHERE starts_with(k.kernel_id, $1) LIMIT 5", wanted)
        if not rows:
            raise NotFound(f"no kernel {wanted}", hint="`esperctl kernel list` shows what there is")
        if len(rows) > 1:
            some = ", ".join(sorted(row["kernel_id"][:24] for row in rows))
            raise InvalidInput(f"several kernels begin with {wanted!r}", hint=f"give more digits: {some}")
        return kernel(rows[0])

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
        try:
            blob = await self._blobs.get(manifest.blob_sha256)
        except NotFound:
            raise Corrupt(f"the blob of {manifest.kernel_id} is gone", hint="have the kernel built anew") from None
        for start in range(offset, len(blob), CHUNK_BYTES):
            yield start, blob[start : start + CHUNK_BYTES]

    async def judge(self, kernel_id: str, verdict: Verdict, principal: str) -> KernelRecord:
        """Move a kernel's status. Repeating a verdict refreshes its measurement, tags and statement.

        Raises:
            Forbidden: VALIDATED or REJECTED by anyone but Urabrask.
            InvalidInput: VALIDATED without measurement or statement.
            Untrusted: the statement is not by a listed validation key about this kernel, or says something else.
            NotFound: no such kernel.
            Conflict: the status machine has no such edge.
        """
        verdicts = (KernelStatus.VALIDATED, KernelStatus.REJECTED)
        if verdict.status in verdicts and principal != JUDGE:
            raise Forbidden(f"{principal} may not say {verdict.status.name}", hint=f"only {JUDGE} judges kernels")
        async with self._database.acquire() as connection, connection.transaction():
            row = await connection.fetchrow(f"{KERNEL} WHERE k.kernel_id = $1 FOR UPDATE OF k", kernel_id)
            if row is None:
                raise NotFound(f"no kernel {kernel_id}", hint="`esperctl kernel list` shows what there is")
            found = kernel(row)
            self._substantiated(found.manifest, verdict)
            await _move(connection, found, verdict)
            if verdict.attestation is not None:
                await _attest(connection, kernel_id, "validation", verdict.attestation)
            changed = await connection.fetchrow(f"{KERNEL} WHERE k.kernel_id = $1", kernel_id)
        assert changed is not None  # noqa: S101 - locked above
        return kernel(changed)

    async def query(self, query: Query) -> tuple[list[KernelRecord], bool]:
        """Kernels that ``query`` asks for, fewest parameters first, and whether there are more.

        Raises:
            InvalidInput: the token is none of ours.
        """
        least, after = _cursor(query.token)
        rows = await self._database.fetch(
            f"""{KERNEL}
            WHERE ($1 = '' OR k.interface_id = $1) AND ($2 = 0 OR k.status = $2)
              AND k.tags @> $3 AND NOT k.tags && $4
              AND ($5 = 0 OR k.parameters <= $5) AND ($6::double precision = 0 OR k.forward_seconds <= $6)
              AND ($7 = '' OR k.blueprint_id = $7) AND (k.parameters, k.kernel_id) > ($8, $9)
            ORDER BY k.parameters, k.kernel_id LIMIT $10""",
            query.interface_id,
            query.status,
            list(query.required_tags),
            list(query.excluded_tags),
            min(query.max_parameters, 2**63 - 1),
            query.max_forward_seconds,
            query.blueprint_id,
            least,
            after,
            query.size + 1,
        )
        return await asyncio.to_thread(kernels, rows[: query.size]), len(rows) > query.size

    def _substantiated(self, manifest: KernelManifest, verdict: Verdict) -> None:
        if verdict.attestation is None:
            if verdict.status is KernelStatus.VALIDATED:
                raise InvalidInput("VALIDATED needs a signed statement", hint="send the attestation")
            return
        if verdict.status is KernelStatus.VALIDATED and verdict.measurement is None:
            raise InvalidInput("VALIDATED needs a measurement", hint="no measurement, no verdict")
        said = self._verify(manifest, verdict.attestation, "validation")
        if said.get("verdict") != verdict.status.name:
            raise InvalidInput(
                f"the statement says {str(said.get('verdict'))[:20]}, the call {verdict.status.name}",
                hint="sign what you say",
            )

    def _verify(self, manifest: KernelManifest, attestation: Attestation, role: Role) -> dict[str, object]:
        return verify_statement(manifest, attestation, TrustList.load(self._trust), role).predicate


def token_after(record: KernelRecord) -> str:
    """The token of the page that begins after ``record``."""
    return f"{record.manifest.parameters}:{record.manifest.kernel_id}"


def _cursor(token: str) -> tuple[int, str]:
    if not token:
        return -1, ""
    parameters, _, kernel_id = token.partition(":")
    if not (parameters.isascii() and parameters.isdecimal()) or len(parameters) > 18 or not kernel_id:
        raise InvalidInput(f"page token {token!r} is none of ours", hint="pass on the token of the page before")
    return int(parameters), kernel_id


async def _move(connection: Connection, found: KernelRecord, verdict: Verdict) -> None:
    measured = verdict.measurement or found.measurement
    try:
        async with connection.transaction():
            await connection.execute(
                """UPDATE urza.kernels SET status = $2, reason = $3, tags = CASE WHEN $4 THEN $5 ELSE tags END,
                       measurement = $6, forward_seconds = $7 WHERE kernel_id = $1""",
                found.manifest.kernel_id,
                int(verdict.status),
                verdict.reason,
                bool(verdict.tags),
                list(verdict.tags),
                None if measured is None else measured.model_dump_json(),
                None if measured is None else measured.forward_seconds,
            )
    except asyncpg.CheckViolationError:
        raise Conflict(
            f"a kernel that is {found.status.name} cannot become {verdict.status.name}",
            hint="COMPILED becomes VALIDATED or REJECTED, VALIDATED becomes RETIRED",
        ) from None


async def _attest(connection: Connection, kernel_id: str, role: Role, attestation: Attestation) -> None:
    await connection.execute(
        """INSERT INTO urza.attestations (kernel_id, role, payload_type, payload, key_id, signature)
           VALUES ($1, $2, $3, $4, $5, $6)
           ON CONFLICT (kernel_id, role) DO UPDATE SET payload_type = excluded.payload_type,
               payload = excluded.payload, key_id = excluded.key_id, signature = excluded.signature, created = now()""",
        kernel_id,
        role,
        attestation.payload_type,
        attestation.payload,
        attestation.key_id,
        attestation.signature,
    )
