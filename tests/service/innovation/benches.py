"""Judges that a test starts itself, beside one another or in a process of their own, over a library that runs already.

``python -m tests.service.innovation.benches DSN ADDRESS TLS_DIR KEYS_DIR MODULE LEASE_SECONDS`` is one such process.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg

from esper_core.kernel.record import KernelRecord
from esper_core.pb.esper.urza.v1 import urza_pb2_grpc
from esper_core.rpc.client import open_channel
from services.bell import Bell
from services.sandbox import Limits
from services.urabrask.judge import MODULE, Judge
from services.urabrask.library import Library
from services.urabrask.verdict import Verdict
from tests.service.innovation.papers import Innovation


class Counting(Library):
    """The library, and what it was told by whom."""

    told: list[tuple[str, KernelRecord, Verdict]]
    name: str

    async def tell(self, record: KernelRecord, verdict: Verdict) -> None:
        self.told.append((self.name, record, verdict))
        await super().tell(record, verdict)


def library(innovation: Innovation, name: str, told: list[tuple[str, KernelRecord, Verdict]]) -> Counting:
    """Urza as the judge called ``name`` knows it."""
    stub = urza_pb2_grpc.UrzaServiceStub(innovation.channel("urabrask"))  # type: ignore[no-untyped-call]
    made = Counting(stub, innovation.endpoints.keys_dir / "urabrask.key")
    made.told, made.name = told, name
    return made


@contextlib.asynccontextmanager
async def running(*judges: Judge) -> AsyncIterator[None]:
    """The judges at work; stopped afterwards."""
    tasks = [asyncio.create_task(judge.run()) for judge in judges]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def alone(dsn: str, address: str, tls_dir: Path, keys_dir: Path, module: str, lease_seconds: float) -> None:
    """Judge until killed."""
    async with (
        asyncpg.create_pool(dsn, min_size=1, max_size=3) as pool,
        open_channel(address, tls_dir=tls_dir, principal="urabrask") as channel,
    ):
        stub = urza_pb2_grpc.UrzaServiceStub(channel)  # type: ignore[no-untyped-call]
        shelf = Library(stub, keys_dir / "urabrask.key")
        bell = Bell(pool, asyncio.Event())
        await Judge(pool, bell, shelf, keys_dir / "trust.json", Limits(), module or MODULE, lease_seconds).run()


if __name__ == "__main__":
    asyncio.run(alone(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5], float(sys.argv[6])))
