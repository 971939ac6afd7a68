"""Forges: who is alive, as told by their own signs of life. Knows PostgreSQL, neither gRPC nor torch."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

from esper_core.bus.database import Pool
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
