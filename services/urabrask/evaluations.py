"""Evaluations: which kernels wait to be judged, who judges which, and what was found. Knows PostgreSQL, not torch.

As with builds, a claim is a lease: renewed while the work goes on, taken over when it runs out, and every later write
is guarded by the claimant's name.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from esper_core.bus.database import Connection, Pool
from esper_core.errors import NotFound
from esper_core.kernel.record import KernelStatus, Measurement, RejectionReason

LEASE_SECONDS = 30.0


class Phase(enum.IntEnum):
    """How far an evaluation got; the numbers equal those of ``esper.urabrask.v1.Phase``."""

    QUEUED = 1
    """Waiting."""
    STATIC = 2
    """Manifest, signature, digest, analysis."""
    SAFETY = 3
    """Run in the child: shapes, finiteness, gradients, determinism."""
    BENCHMARK = 4
    """Timed in the child."""
    DONE = 5
    """Judged."""


class Evaluation(BaseModel):
    """What is known of one kernel's evaluation; field names equal those of ``esper.urabrask.v1.Evaluation``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kernel_id: str
    phase: Phase
    verdict: KernelStatus = KernelStatus.COMPILED
    reason: str = ""
    measurement: Measurement | None = None
    tags: tuple[str, ...] = ()
    rejection: RejectionReason | None = None
    risk: float | None = None
    risk_model: str = ""


class Claim(BaseModel):
    """A kernel to judge, and how often that was begun."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kernel_id: str
    attempts: int


_FIELDS = "kernel_id, phase, verdict, reason, measurement, tags, rejection, risk, risk_model"
_FREE = "claimed_by = NULL, lease_until = NULL"


async def add(connection: Connection | Pool, kernel_id: str, interface_id: str = "", *, again: bool = False) -> bool:
    """Queue a kernel unless it is known; ``again`` queues one that has been judged. True when there is new work."""
    row = await connection.fetchrow(
        """INSERT INTO urabrask.evaluations (kernel_id, interface_id) VALUES ($1, $2)
           ON CONFLICT (kernel_id) DO UPDATE SET phase = 1, attempts = 0, not_before = now(), updated = now()
               WHERE $3 AND evaluations.phase = 5
           RETURNING kernel_id""",
        kernel_id,
        interface_id,
        again,
    )
    return row is not None


async def get(pool: Pool, kernel_id: str) -> Evaluation:
    """Raises: NotFound."""
    row = await pool.fetchrow(f"SELECT {_FIELDS} FROM urabrask.evaluations WHERE kernel_id = $1", kernel_id)  # noqa: S608
    if row is None:
        raise NotFound(f"{kernel_id[:19]}… was never looked at", hint="`esperctl kernel list` shows what there is")
    fields = dict(row)
    fields["measurement"] = fields["measurement"] and json.loads(fields["measurement"])
    return Evaluation.model_validate(fields)


async def claim(pool: Pool, judge: str, lease_seconds: float = LEASE_SECONDS) -> Claim | None:
    """Take the oldest kernel that nobody judges, or ``None`` when there is none."""
    row = await pool.fetchrow(
        """UPDATE urabrask.evaluations
           SET phase = 2, claimed_by = $1, lease_until = now() + make_interval(secs => $2),
               attempts = attempts + 1, updated = now()
           WHERE kernel_id = (
               SELECT kernel_id FROM urabrask.evaluations
               WHERE (phase = 1 AND not_before <= now()) OR (phase BETWEEN 2 AND 4 AND lease_until < now())
               ORDER BY serial LIMIT 1 FOR UPDATE SKIP LOCKED)
           RETURNING kernel_id, attempts""",
        judge,
        lease_seconds,
    )
    return None if row is None else Claim.model_validate(dict(row))


async def enter(pool: Pool, kernel_id: str, judge: str, phase: Phase, lease_seconds: float = LEASE_SECONDS) -> bool:
    """Note the phase of a claimed evaluation and renew the claim; False when it was lost."""
    change = "phase = $3, lease_until = now() + make_interval(secs => $4)"
    return await _guarded(pool, change, kernel_id, judge, int(phase), lease_seconds)


async def renew(pool: Pool, kernel_id: str, judge: str, lease_seconds: float = LEASE_SECONDS) -> bool:
    """Keep a claim; False when it was lost."""
    return await _guarded(pool, "lease_until = now() + make_interval(secs => $3)", kernel_id, judge, lease_seconds)


async def finish(
    connection: Connection,
    kernel_id: str,
    judge: str,
    *,
    verdict: KernelStatus,
    reason: str,
    measurement: Measurement | None,
    tags: Sequence[str],
    rejection: RejectionReason | None = None,
    design: Mapping[str, float] | None = None,
    risk: float | None = None,
    risk_model: str = "",
) -> bool:
    """Note the verdict on a claimed kernel; False when the claim was lost.

    Without ``rejection``, a kernel that is not VALIDATED keeps the one it had.
    """
    change = f"""phase = 5, verdict = $3::smallint, reason = $4, measurement = $5, tags = $6, design = $8, risk = $9, risk_model = $10,
        rejection = CASE WHEN $3::smallint = 2 THEN NULL ELSE coalesce($7::smallint, rejection) END, {_FREE}"""
    figures = None if measurement is None else measurement.model_dump_json()
    papers = None if design is None else json.dumps(dict(design))
    reasons = (int(verdict), reason[:500], figures, list(tags), None if rejection is None else int(rejection))
    values = (*reasons, papers, risk, risk_model)
    return await _guarded(connection, change, kernel_id, judge, *values)


async def postpone(pool: Pool, kernel_id: str, judge: str, *, reason: str, delay_seconds: float, counts: bool) -> bool:
    """Put a claimed evaluation back into the queue, not to be tried for a while; False when the claim was lost.

    ``counts``: whether the attempt just made is held against it.
    """
    change = "phase = 1, reason = $3, not_before = now() + make_interval(secs => $4), attempts = attempts - $5"
    return await _guarded(pool, f"{change}, {_FREE}", kernel_id, judge, reason[:500], delay_seconds, 0 if counts else 1)


async def release(pool: Pool, judge: str) -> None:
    """Put everything that ``judge`` holds back into the queue, as if it had not been begun."""
    await pool.execute(
        f"""UPDATE urabrask.evaluations
            SET phase = 1, attempts = greatest(attempts - 1, 0), updated = now(), {_FREE} WHERE claimed_by = $1""",  # noqa: S608
        judge,
    )


async def forget(pool: Pool, kernel_id: str, judge: str) -> None:
    """Drop a claimed evaluation of a kernel that does not exist."""
    await pool.execute("DELETE FROM urabrask.evaluations WHERE kernel_id = $1 AND claimed_by = $2", kernel_id, judge)


async def _guarded(on: Connection | Pool, change: str, kernel_id: str, judge: str, *values: Any) -> bool:
    tag = await on.execute(
        f"""UPDATE urabrask.evaluations SET {change}, updated = now()
            WHERE kernel_id = $1 AND claimed_by = $2""",  # noqa: S608
        kernel_id,
        judge,
        *values,
    )
    return bool(tag == "UPDATE 1")
