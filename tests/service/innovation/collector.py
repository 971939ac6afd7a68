"""A collection in a process of its own that is killed at a named step.

``python collector.py DSN ENDPOINTS STEP NTH HOW``; HOW: ``collect``, or ``upkeep`` for one that also holds the lease.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from esper_core.config import Endpoints
from esper_core.store.blobs import Blobs
from esper_core.store.postgres import open_pool
from services.urza.retention import Retention
from services.urza.upkeep import Upkeep

LEASE_SECONDS = 3.0


async def collect(dsn: str, endpoints: Endpoints, last: str, nth: int, how: str) -> None:
    """Collect everything that was never used, and die when step ``last`` is reached for the ``nth`` time."""
    seen = 0

    async def step(name: str) -> None:
        nonlocal seen
        seen += name == last
        if seen == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    pool = await open_pool(dsn, size=2)
    blobs = await Blobs.open(endpoints)
    retention = Retention(pool, blobs, step)
    if how == "upkeep":
        await Upkeep(pool, retention, 1e-6, 0, LEASE_SECONDS).once()
    async for _ in retention.collect(0):
        pass


if __name__ == "__main__":
    there, where, at, times, way = sys.argv[1:]
    asyncio.run(collect(there, Endpoints.model_validate_json(where), at, int(times), way))
