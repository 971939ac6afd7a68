"""Builds: the wishes for kernels, who works on which, and what came of them. Knows PostgreSQL, neither gRPC nor torch.

A claim is a lease: it must be renewed while the work goes on, and a build whose lease ran out (its forge died) is
claimed again by whoever asks next. Every write after a claim is guarded by the claimant's name, so that a forge which
lost its lease cannot overwrite the outcome of the one that took over.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from typing import Any

import asyncpg
from pydantic import BaseModel, ConfigDict

from esper_core.blueprint.interface import SlotInterface, canonical_json
from esper_core.bus.database import Connection, Pool
from esper_core.errors import NotFound, Unsupported, nearest
from esper_core.ids import content_id

PIPELINE = "standard"
PIPELINES = (PIPELINE,)
LEASE_SECONDS = 30.0


class BuildState(enum.IntEnum):
    """How a build is getting on; the numbers equal those of ``esper.tezzeret.v1.BuildState``."""

    QUEUED = 1
    """Waits for a forge."""
    RUNNING = 2
    """A forge works on it and renews its lease."""
    DONE = 3
    """The kernel is in the library."""
    FAILED = 4
    """It cannot be built; asking for it again queues it again."""


class Wish(BaseModel):
    """What is to be built. ``rank``: 0 is built before 1, and so on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    blueprint_id: str
    blueprint_name: str = ""
    interface: SlotInterface
    symbols: Mapping[str, int] = {}
    pipeline: str = PIPELINE
    rank: int = 0

    @property
    def build_id(self) -> str:
        """``build-<sha256>``: equal wishes are one build."""
        parts = [self.blueprint_id, self.interface.id, dict(self.symbols), self.pipeline]
        return content_id("build", canonical_json(parts))


class Build(BaseModel):
    """A wish and how it is getting on; field names equal those of ``esper.tezzeret.v1.Build``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    build_id: str
    blueprint_id: str
    blueprint_name: str
    interface: SlotInterface
    interface_id: str
    symbols: Mapping[str, int]
    pipeline: str
    state: BuildState
    kernel_id: str = ""
    reason: str = ""
    attempts: int = 0
    seconds: float = 0.0


_FIELDS = """build_id, blueprint_id, blueprint_name, interface, interface_id, symbols, pipeline, state,
    coalesce(kernel_id, '') AS kernel_id, reason, attempts, seconds"""


def check_pipeline(name: str) -> None:
    """Raises: Unsupported: no pipeline of that name."""
    if name not in PIPELINES:
        raise Unsupported(f"no build pipeline {name!r}", hint=nearest(name, PIPELINES))


async def add(connection: Connection, wish: Wish) -> bool:
    """Queue ``wish`` unless it is known; a failed one is queued again. True when there is new work."""
    again = """ON CONFLICT (build_id) DO UPDATE
        SET state = 1, reason = '', attempts = 0, not_before = now(), updated = now() WHERE builds.state = 4"""
    return await _insert(connection, wish, again)


async def expect(connection: Connection, wish: Wish) -> bool:
    """Queue ``wish`` unless it was ever known, whatever came of it. True when there is new work."""
    return await _insert(connection, wish, "ON CONFLICT (build_id) DO NOTHING")


async def _insert(connection: Connection, wish: Wish, otherwise: str) -> bool:
    row = await connection.fetchrow(
        f"""INSERT INTO tezzeret.builds
               (build_id, blueprint_id, blueprint_name, interface, interface_id, symbols, pipeline, rank)
           VALUES ($1, $2, $3, $4, $5, $6, $7, $8) {otherwise} RETURNING build_id""",  # noqa: S608
        wish.build_id,
        wish.blueprint_id,
        wish.blueprint_name,
        wish.interface.model_dump_json(),
        wish.interface.id,
        json.dumps(dict(wish.symbols)),
        wish.pipeline,
        wish.rank,
    )
    return row is not None


async def get(pool: Pool, build_id: str) -> Build:
    """Raises: NotFound."""
    row = await pool.fetchrow(f"SELECT {_FIELDS} FROM tezzeret.builds WHERE build_id = $1", build_id)  # noqa: S608
    if row is None:
        raise NotFound(f"no build {build_id[:18]}…", hint="`esperctl blueprint submit` queues one")
    return _build(row)


async def newest(pool: Pool, *, state: int, interface_id: str, size: int) -> list[Build]:
    """Builds, newest first; 0 and empty do not restrict."""
    rows = await pool.fetch(
        f"""SELECT {_FIELDS} FROM tezzeret.builds
            WHERE ($1 = 0 OR state = $1) AND ($2 = '' OR interface_id = $2) ORDER BY serial DESC LIMIT $3""",  # noqa: S608
        state,
        interface_id,
        size,
    )
    return [_build(row) for row in rows]


async def claim(pool: Pool, forge: str, lease_seconds: float = LEASE_SECONDS) -> Build | None:
    """Take the most useful build that nobody works on, or ``None`` when there is none."""
    row = await pool.fetchrow(
        f"""UPDATE tezzeret.builds
            SET state = 2, claimed_by = $1, lease_until = now() + make_interval(secs => $2),
                attempts = attempts + 1, updated = now()
            WHERE build_id = (
                SELECT build_id FROM tezzeret.builds
                WHERE (state = 1 AND not_before <= now()) OR (state = 2 AND lease_until < now())
                ORDER BY rank, serial LIMIT 1 FOR UPDATE SKIP LOCKED)
            RETURNING {_FIELDS}""",  # noqa: S608
        forge,
        lease_seconds,
    )
    return None if row is None else _build(row)


async def renew(pool: Pool, build_id: str, forge: str, lease_seconds: float = LEASE_SECONDS) -> bool:
    """Keep a claim; False when it was lost."""
    return await _guarded(pool, "lease_until = now() + make_interval(secs => $3)", build_id, forge, lease_seconds)


async def finish(
    connection: Connection, build_id: str, forge: str, *, kernel_id: str, name: str, seconds: float
) -> bool:
    """Mark a claimed build DONE; False when the claim was lost."""
    change = "state = 3, kernel_id = $3, blueprint_name = $4, seconds = $5, reason = ''"
    return await _guarded(connection, f"{change}, {_FREE}", build_id, forge, kernel_id, name, seconds)


async def fail(on: Connection | Pool, build_id: str, forge: str, *, reason: str, seconds: float) -> bool:
    """Mark a claimed build FAILED; False when the claim was lost."""
    change = "state = 4, reason = $3, seconds = $4"
    return await _guarded(on, f"{change}, {_FREE}", build_id, forge, reason[:500], seconds)


async def postpone(
    on: Connection | Pool, build_id: str, forge: str, *, reason: str, delay_seconds: float, counts: bool
) -> bool:
    """Put a claimed build back into the queue, not to be tried for a while; False when the claim was lost.

    ``counts``: whether the attempt just made is held against it.
    """
    change = "state = 1, reason = $3, not_before = now() + make_interval(secs => $4), attempts = attempts - $5"
    return await _guarded(on, f"{change}, {_FREE}", build_id, forge, reason[:500], delay_seconds, 0 if counts else 1)


async def release(pool: Pool, forge: str) -> None:
    """Put everything that ``forge`` holds back into the queue, as if it had not been begun."""
    await pool.execute(
        f"""UPDATE tezzeret.builds SET state = 1, attempts = greatest(attempts - 1, 0), updated = now(), {_FREE}
            WHERE claimed_by = $1""",  # noqa: S608
        forge,
    )


_FREE = "claimed_by = NULL, lease_until = NULL"


async def _guarded(on: Connection | Pool, change: str, build_id: str, forge: str, *values: Any) -> bool:
    tag = await on.execute(
        f"""UPDATE tezzeret.builds SET {change}, updated = now()
            WHERE build_id = $1 AND claimed_by = $2""",  # noqa: S608
        build_id,
        forge,
        *values,
    )
    return bool(tag == "UPDATE 1")


def _build(row: asyncpg.Record) -> Build:
    fields = dict(row)
    fields["interface"] = json.loads(fields["interface"])
    fields["symbols"] = json.loads(fields["symbols"])
    return Build.model_validate(fields)
