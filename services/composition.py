"""The composition root: opens what services share, builds the wished ones, serves them, keeps their tasks alive, and
stops everything in order.

Stopping: NOT_SERVING, long streams end, calls in flight get ``GRACE`` seconds, then the tasks, the channels, the bus
and the database. What is recorded but not yet published stays in the outbox for the next start.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import types
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import asyncpg
import grpc.aio
from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

import esper_core.bus
from esper_core import log
from esper_core.bus.bus import Bus
from esper_core.bus.database import AWAY
from esper_core.clock import SYSTEM
from esper_core.config import Endpoints
from esper_core.errors import EsperError, InvalidInput, Unavailable, nearest
from esper_core.rpc.client import open_channel
from esper_core.rpc.server import RunningServer, serve
from esper_core.rpc.tls import ServerTls
from esper_core.store.blobs import Blobs
from esper_core.store.postgres import migrate, open_pool
from services.bell import Bell
from services.runtime import Platform, Service, Task

NAMES = ("oona", "urza", "tezzeret", "urabrask", "tamiyo", "kasmina", "tolaria", "nissa", "emrakul", "karn")
POOL_SIZE = 16
GRACE, TASKS_GRACE, CLOSE_GRACE = 4.0, 2.0, 1.5  # seconds; together below the 10 that a stop may take
CONNECT_SECONDS = 3.0
DATABASE_AWAY = (*AWAY, asyncpg.InternalClientError)  # the last: a connection that broke while it was handed back
PAUSE_FIRST, PAUSE_MAX, HEALTHY = 0.5, 10.0, 30.0  # seconds

T = TypeVar("T")
_log = log.get("services")


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """The services to run; all without names.

    Raises:
        InvalidInput: no service is called so.
    """
    for name in names:
        if name not in NAMES:
            raise InvalidInput(f"there is no service {name!r}", hint=nearest(name, NAMES))
    return tuple(dict.fromkeys(names)) or NAMES


def schemas(names: Sequence[str]) -> dict[str, Path]:
    """Directories of migrations by schema: the bus's and those of ``names`` that keep rows."""
    found = {"bus": Path(esper_core.bus.__path__[0]) / "schema"}
    for name in names:
        folder = Path(__file__).parent / name / "schema"
        if folder.is_dir():
            found[name] = folder
    return found


async def run(endpoints: Endpoints, names: Sequence[str]) -> None:
    """Serve until cancelled; then stop in order and return by the cancellation.

    Raises:
        EsperError: it cannot start: a refused migration, a taken port, missing certificates.
    """
    async with contextlib.AsyncExitStack() as stack:
        platforms = await _open(endpoints, names, stack)
        services = [await _insist(name, partial(_module(name).build, each)) for name, each in platforms.items()]
        platform = platforms[names[0]]  # what is the process's is the same in all
        await _expose(platform, stack)
        tasks: list[asyncio.Task[None]] = []
        stack.push_async_callback(_cancel, tasks)
        server = await _serve(platform, services)
        stack.push_async_callback(_drain, platform, server)
        for name, task in _tasks(platform, services):
            tasks.append(asyncio.create_task(supervise(name, task, platform.draining), name=name))
        _log.info("up", services=list(names), address=endpoints.grpc_address, tasks=len(tasks))
        await asyncio.Event().wait()


async def supervise(name: str, task: Task, draining: asyncio.Event) -> None:
    """Run ``task`` until draining: when it fails or returns, say so and start it again after a growing pause."""
    pause = PAUSE_FIRST
    while not draining.is_set():
        begun = SYSTEM.monotonic()
        try:
            await task()
            if not draining.is_set():
                _log.error("task.returned", task=name)
        except asyncio.CancelledError:
            mine = asyncio.current_task()
            if mine is None or mine.cancelling():
                raise
            _log.error("task.cancelled", task=name)  # from within: nobody asked this task to end
        except Exception as error:  # noqa: BLE001 - a task may fail in any way; the others must go on and it must come back
            _log.error(
                "task.failed", task=name, error=f"{type(error).__name__}: {error}", exc_info=not _expected(error)
            )
        if SYSTEM.monotonic() - begun > HEALTHY:
            pause = PAUSE_FIRST
        await asyncio.sleep(pause)
        pause = min(2 * pause, PAUSE_MAX)


async def _open(endpoints: Endpoints, names: Sequence[str], stack: contextlib.AsyncExitStack) -> dict[str, Platform]:
    """What each service gets; they differ in the bus, on which everyone is known by a key of its own."""
    dsn = endpoints.postgres_dsn.get_secret_value()
    await _insist("migrations", lambda: migrate(dsn, schemas(names)))
    database = await _insist("database", lambda: open_pool(dsn, size=POOL_SIZE))
    stack.push_async_callback(_close_pool, database)
    blobs = await _insist("blobs", lambda: Blobs.open(endpoints))
    stack.push_async_callback(blobs.close)
    buses: dict[str, Bus] = {}
    for name in names:
        buses[name] = await _insist("bus", partial(Bus.join, endpoints, name, timeout=CONNECT_SECONDS))
        stack.push_async_callback(buses[name].close)
    channels: dict[str, grpc.aio.Channel] = {}
    stack.push_async_callback(_close_channels, channels)

    def channel(principal: str) -> grpc.aio.Channel:
        if principal not in channels:
            channels[principal] = open_channel(endpoints.grpc_address, tls_dir=endpoints.tls_dir, principal=principal)
        return channels[principal]

    draining, metrics = asyncio.Event(), CollectorRegistry()
    bell = Bell(database, draining)
    return {
        name: Platform(endpoints, database, bus, blobs, channel, bell, metrics, draining) for name, bus in buses.items()
    }


async def _insist(what: str, attempt: Callable[[], Awaitable[T]]) -> T:
    """Try until it is there: a dependency that is away for a while delays the start, it does not prevent it."""
    pause = PAUSE_FIRST
    while True:
        try:
            return await attempt()
        except Unavailable as error:
            _log.warning("waiting", what=what, seconds=pause, error=error.message)
        await asyncio.sleep(pause)
        pause = min(2 * pause, PAUSE_MAX)


async def _expose(platform: Platform, stack: contextlib.AsyncExitStack) -> None:
    """Let Prometheus read, on loopback only: it is plain HTTP."""
    port = platform.endpoints.metrics_port
    ProcessCollector(registry=platform.metrics)
    try:
        http, thread = start_http_server(port, addr="127.0.0.1", registry=platform.metrics)
    except OSError as error:
        raise Unavailable(
            f"the metrics port {port} cannot be bound ({error.strerror})",
            hint="does another platform run there? `esperctl status`",
        ) from None

    def close() -> None:
        http.shutdown()
        http.server_close()
        thread.join()

    stack.push_async_callback(asyncio.to_thread, close)


async def _serve(platform: Platform, services: Sequence[Service]) -> RunningServer:
    endpoints = platform.endpoints
    host, _, port = endpoints.grpc_listen.rpartition(":")
    served = [each for service in services for each in service.served]
    tls = await asyncio.to_thread(ServerTls.read, endpoints.tls_dir)
    return await serve(
        served, host=host.strip("[]"), port=int(port), tls=tls, metrics=platform.metrics, away=DATABASE_AWAY
    )


def _tasks(platform: Platform, services: Sequence[Service]) -> list[tuple[str, Task]]:
    found: list[tuple[str, Task]] = [("bell", platform.bell.listen)]
    for service in services:
        found.extend((f"{service.name}-{index}", task) for index, task in enumerate(service.tasks, start=1))
    return found


async def _drain(platform: Platform, server: RunningServer) -> None:
    _log.info("stopping")
    platform.draining.set()
    await server.stop(GRACE)


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        _, late = await asyncio.wait(tasks, timeout=TASKS_GRACE)
        if late:
            _log.warning("tasks.late", tasks=sorted(task.get_name() for task in late))


async def _close_channels(channels: dict[str, grpc.aio.Channel]) -> None:
    for channel in channels.values():
        await channel.close(None)


async def _close_pool(database: asyncpg.Pool[asyncpg.Record]) -> None:
    try:
        await asyncio.wait_for(database.close(), CLOSE_GRACE)
    except TimeoutError:
        _log.warning("database.late")
        database.terminate()


def _module(name: str) -> types.ModuleType:
    return importlib.import_module(f"services.{name}.service")


def _expected(error: Exception) -> bool:
    return isinstance(error, (EsperError, OSError, asyncpg.PostgresConnectionError))
