"""A collection in a process of its own that is killed at a named step: ``python collector.py DSN ENDPOINTS STEP NTH``."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from esper_core.config import Endpoints
from esper_core.store.blobs import Blobs
from esper_core.store.postgres import open_pool
from services.urza.retention import Retention


async def collect(dsn: str, endpoints: Endpoints, last: str, nth: int) -> None:
    """Collect everything that was never used, and die when step ``last`` is reached for the ``nth`` time."""
    seen = 0

    async def step(name: str) -> None:
        nonlocal seen
        seen += name == last
        if seen == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    pool = await open_pool(dsn, size=2)
    blobs = await Blobs.open(endpoints)
    async for _ in Retention(pool, blobs, step).collect(0):
        pass


if __name__ == "__main__":
    asyncio.run(collect(sys.argv[1], Endpoints.model_validate_json(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
