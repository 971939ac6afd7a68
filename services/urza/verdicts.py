"""A kernel's status: who may move it, on what grounds, and that of two verdicts at once only one counts.

A verdict is worked out on what was read and written only if nothing of it has changed since: the row's revision is part
of the condition. The edges are held by a trigger, whoever writes the SQL.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import asyncpg

from esper_core.bus.database import Connection, Pool
from esper_core.errors import Conflict, Forbidden, InvalidInput, NotFound
from esper_core.kernel.manifest import KernelManifest
from esper_core.kernel.record import KernelRecord, KernelStatus, Measurement
from esper_core.kernel.sign import Attestation
from esper_core.kernel.trust import TrustList, verify_statement
from services.urza.records import KERNEL, attest, kernel

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


class Verdicts:
    """The court over the shelf of kernels.

    Args:
        database: where the rows are.
        trust: path of the list of keys whose statements count; read anew for every statement.
    """

    def __init__(self, database: Pool, trust: Path) -> None:
        self._database = database
        self._trust = trust

    async def judge(self, kernel_id: str, verdict: Verdict, principal: str) -> KernelRecord:
        """Move a kernel's status. Repeating a verdict refreshes its measurement, tags and statement.

        Raises:
            Forbidden: VALIDATED or REJECTED by anyone but Urabrask.
            InvalidInput: VALIDATED without measurement or statement.
            Untrusted: the statement is not by a listed validation key about this kernel, or says something else.
            NotFound: no such kernel.
            Conflict: the status machine has no such edge, or somebody else moved the kernel at the same time.
        """
        verdicts = (KernelStatus.VALIDATED, KernelStatus.REJECTED)
        if verdict.status in verdicts and principal != JUDGE:
            raise Forbidden(f"{principal} may not say {verdict.status.name}", hint=f"only {JUDGE} judges kernels")
        row = await self._database.fetchrow(f"{KERNEL} WHERE k.kernel_id = $1", kernel_id)
        if row is None:
            raise _nobody(kernel_id)
        found = kernel(row)
        self._substantiated(found.manifest, verdict)
        async with self._database.acquire() as connection, connection.transaction():
            await move(connection, found, verdict, row["revision"])
            if verdict.attestation is not None:
                await attest(connection, kernel_id, "validation", verdict.attestation)
            changed = await connection.fetchrow(f"{KERNEL} WHERE k.kernel_id = $1", kernel_id)
        assert changed is not None  # noqa: S101 - locked by the update
        return kernel(changed)

    def _substantiated(self, manifest: KernelManifest, verdict: Verdict) -> None:
        if verdict.attestation is None:
            if verdict.status is KernelStatus.VALIDATED:
                raise InvalidInput("VALIDATED needs a signed statement", hint="send the attestation")
            return
        if verdict.status is KernelStatus.VALIDATED and verdict.measurement is None:
            raise InvalidInput("VALIDATED needs a measurement", hint="no measurement, no verdict")
        trust = TrustList.load(self._trust)
        said = verify_statement(manifest, verdict.attestation, trust, "validation").predicate
        if said.get("verdict") != verdict.status.name:
            raise InvalidInput(
                f"the statement says {str(said.get('verdict'))[:20]}, the call {verdict.status.name}",
                hint="sign what you say",
            )


async def move(connection: Connection, found: KernelRecord, verdict: Verdict, revision: int) -> None:
    """Write ``verdict`` about ``found``, in the caller's transaction, if the kernel still is as it was found.

    Args:
        revision: of the row when it was read.

    Raises:
        NotFound: it was forgotten meanwhile.
        Conflict: it was moved meanwhile, or the status machine has no such edge.
    """
    measured = verdict.measurement or found.measurement
    kernel_id = found.manifest.kernel_id
    try:
        async with connection.transaction():
            done = await connection.execute(
                """UPDATE urza.kernels SET status = $4, reason = $5, tags = CASE WHEN $6 THEN $7 ELSE tags END,
                       measurement = $8, forward_seconds = $9, revision = revision + 1
                   WHERE kernel_id = $1 AND status = $2 AND revision = $3""",
                kernel_id,
                int(found.status),
                revision,
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
    if done == "UPDATE 0":
        now = await connection.fetchval("SELECT status FROM urza.kernels WHERE kernel_id = $1", kernel_id)
        if now is None:
            raise _nobody(kernel_id)
        raise Conflict(
            f"{kernel_id} was judged by somebody else at the same time and is {KernelStatus(now).name} now",
            hint="look at it again, then decide anew",
        )


def _nobody(kernel_id: str) -> NotFound:
    return NotFound(f"no kernel {kernel_id}", hint="`esperctl kernel list` shows what there is")
