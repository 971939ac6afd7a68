"""The real servers that benches measure against: started as `esperctl up` does, in temporary folders, always stopped.

One platform is shared by every bench that needs one; a bench that disturbs it starts its own. Everything asynchronous
runs in one event loop, because gRPC's Python client belongs to the loop it was first used in.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

from esper_core.bus.bus import Bus
from esper_core.config import Endpoints, PlatformConfig
from esper_core.local import stack
from esper_core.store.postgres import open_pool
from tests.service.platform import Stage

T = TypeVar("T")


@contextlib.contextmanager
def folder(name: str) -> Iterator[Path]:
    """A temporary directory that the database's own account may enter."""
    path = Path(tempfile.mkdtemp(prefix=f"esper-bench-{name}-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def running(config: PlatformConfig) -> Iterator[Endpoints]:
    """A stack, stopped afterwards whatever happens."""
    try:
        yield stack.up(config)
    finally:
        stack.down(config)


class Ground:
    """What is shared: the event loop and the platform."""

    def __init__(self) -> None:
        self._open = contextlib.ExitStack()
        self._runner = asyncio.Runner()
        self._platform: Endpoints | None = None

    def __enter__(self) -> Ground:
        self._open.enter_context(self._runner)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def platform(self) -> Endpoints:
        """The whole platform, services and all; started at the first call."""
        if self._platform is None:
            path = self._open.enter_context(folder("platform"))
            self._platform = self._open.enter_context(running(PlatformConfig(data_dir=path)))
        return self._platform

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do ``work`` in the one event loop."""
        return self._runner.run(work)


@contextlib.asynccontextmanager
async def visit(endpoints: Endpoints) -> Any:
    """A ``Stage`` on a platform that is already running: bus, database, and stubs under every identity."""
    async with contextlib.AsyncExitStack() as open_:
        bus = await Bus.join(endpoints, "oona", "bench")
        open_.push_async_callback(bus.close)
        pool = await open_pool(endpoints.postgres_dsn.get_secret_value(), size=4)
        open_.push_async_callback(pool.close)
        stage = Stage(endpoints, bus, pool)
        open_.push_async_callback(stage.hang_up)
        yield stage


def python_environment() -> dict[str, str]:
    """The environment for a child Python that must find this checkout, and no other platform than the one it is told."""
    root = str(Path(__file__).resolve().parents[2])
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ESPER_")}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))}
