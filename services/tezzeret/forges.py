"""Forges: who is alive, as told by their own signs of life. And the forge as a whole: what waits, what runs, what came
of it. Knows PostgreSQL, neither gRPC nor torch."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

from esper_core.bus.database import Pool
from esper_core.pb.esper.tezzeret.v1 import tezzeret_pb2
from services.tezzeret.toolchain import Toolchain

BEAT_SECONDS = 3.0
ALIVE_SECONDS = 12.0
"""A forge not heard of for as long counts as dead; its lease has run out by then."""
FORGOTTEN = "1 hour"


@dataclass(frozen=True)
class Forge:
    """One forge.

    Attributes:
        name: its own, new at every start.
        toolchain: what it builds for and with.
    """

    name: str
    toolchain: Toolchain

    async def beat(self, pool: Pool) -> None:
        """Give a sign of life; the first one introduces it."""
        await pool.execute(
            """INSERT INTO tezzeret.forges (forge, host, pid, target, toolchain) VALUES ($1, $2, $3, $4, $5)
               ON CONFLICT (forge) DO UPDATE SET seen = now()""",
            self.name,
            platform.node()[:200],
            os.getpid(),
            self.toolchain.target,
            self.toolchain.name,
        )

    async def leave(self, pool: Pool) -> None:
        """Say goodbye, and clear away those who could not."""
        await pool.execute(
            f"DELETE FROM tezzeret.forges WHERE forge = $1 OR seen < now() - interval '{FORGOTTEN}'",  # noqa: S608
            self.name,
        )

    async def count(self, pool: Pool, *, done: bool) -> None:
        """Note that a build ended well, or for good."""
        column = "done" if done else "failed"
        await pool.execute(
            f"UPDATE tezzeret.forges SET {column} = {column} + 1, seen = now() WHERE forge = $1",  # noqa: S608
            self.name,
        )


async def status(pool: Pool, alive_seconds: float = ALIVE_SECONDS) -> tezzeret_pb2.GetForgeStatusResponse:
    """Who forges, what waits and what was done, as of one moment."""
    async with pool.acquire() as connection, connection.transaction(isolation="repeatable_read", readonly=True):
        forges = await connection.fetch(_FORGES, alive_seconds)
        counts = await connection.fetchrow(_COUNTS, alive_seconds)
        running = await connection.fetch(_RUNNING)
        pipelines = await connection.fetch(_PIPELINES)
    assert counts is not None  # noqa: S101 - an aggregate always gives a row
    return tezzeret_pb2.GetForgeStatusResponse(
        forges=[tezzeret_pb2.Forge(**dict(row)) for row in forges],
        running=[tezzeret_pb2.RunningBuild(**dict(row)) for row in running],
        pipelines=[tezzeret_pb2.PipelineFigures(**dict(row)) for row in pipelines],
        **dict(counts),
    )


_FORGES = """
SELECT forge, host, pid, target, toolchain, done, failed,
    extract(epoch FROM now() - started)::float8 AS up_seconds,
    extract(epoch FROM now() - seen)::float8 AS silent_seconds,
    seen > now() - make_interval(secs => $1) AS alive
FROM tezzeret.forges ORDER BY alive DESC, started
"""
_COUNTS = """
SELECT count(*) FILTER (WHERE state = 1) AS queued,
    count(*) FILTER (WHERE state = 1 AND not_before > now()) AS postponed,
    count(*) FILTER (WHERE state IN (1, 2) AND NOT EXISTS (
        SELECT FROM tezzeret.forges f
        WHERE f.seen > now() - make_interval(secs => $1)
          AND b.target IN ('', f.target) AND b.toolchain IN ('', f.toolchain))) AS stranded,
    count(*) FILTER (WHERE state = 3) AS done,
    count(*) FILTER (WHERE state = 4) AS failed
FROM tezzeret.builds b
"""
_RUNNING = """
SELECT build_id, blueprint_name, pipeline, claimed_by AS forge,
    extract(epoch FROM now() - begun)::float8 AS age_seconds, lease_until < now() AS lapsed
FROM tezzeret.builds WHERE state = 2 ORDER BY begun LIMIT 100
"""
_PIPELINES = """
SELECT pipeline,
    count(*) FILTER (WHERE state = 3) AS done,
    count(*) FILTER (WHERE state = 4) AS failed,
    coalesce(percentile_cont(0.5) WITHIN GROUP (ORDER BY seconds) FILTER (WHERE state = 3), 0) AS median_seconds,
    count(native_ratio) AS compiled,
    count(*) FILTER (WHERE native_shipped) AS shipped,
    coalesce(percentile_cont(0.5) WITHIN GROUP (ORDER BY native_ratio), 0) AS median_native_ratio
FROM tezzeret.builds WHERE state IN (3, 4) GROUP BY pipeline ORDER BY pipeline
"""
