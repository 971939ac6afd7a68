"""What a service is given and what it gives back: the two nouns between the composition root and every service.

``Platform`` holds the connections of this process; ``Service`` says what to serve and which tasks to keep running. A
service package offers ``async def build(platform: Platform) -> Service`` in its ``service`` module and, when it keeps
rows, numbered migrations under ``schema/``, which have been applied before ``build`` is called.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncpg
    import grpc.aio
    from prometheus_client import CollectorRegistry

    from esper_core.bus.bus import Bus
    from esper_core.config import Endpoints
    from esper_core.rpc.server import ServedService
    from esper_core.store.blobs import Blobs
    from services.bell import Bell

Task = Callable[[], Awaitable[None]]
"""Starts a piece of background work that runs until it is cancelled; it is started again when it ends by itself."""


@dataclass(frozen=True)
class Platform:
    """The connections that a service works with, open for as long as it runs; all but the bus are the process's.

    Attributes:
        endpoints: where everything is found.
        database: pool on the system of record; each service keeps to its own schema.
        bus: JetStream, as this service; record facts by ``esper_core.bus.outbox`` inside the transaction that makes them
            true: on our own server Oona alone may publish them.
        blobs: content-addressed bytes.
        channel: opens (once per principal, then shared) a mutual-TLS channel to the platform's own gRPC address. The
            platform owns the channel and closes it. Dials lazily: it may be asked for before the server is up.
        bell: wakes watchers when rows change; the composition root keeps its ``listen`` running.
        metrics: what Prometheus reads; register collectors here, never in the process-wide registry.
        draining: set when the platform begins to stop; long streams end themselves then.
    """

    endpoints: Endpoints
    database: asyncpg.Pool[asyncpg.Record]
    bus: Bus
    blobs: Blobs
    channel: Callable[[str], grpc.aio.Channel]
    bell: Bell
    metrics: CollectorRegistry
    draining: asyncio.Event


@dataclass(frozen=True)
class Service:
    """A built service.

    Attributes:
        name: as in the package, e.g. ``urza``.
        served: gRPC services to serve; empty for pure workers.
        tasks: background work, started once the server is up and supervised: a task that raises or returns is logged
            and started again after a pause; on shutdown it is cancelled after the server has drained.
    """

    name: str
    served: tuple[ServedService, ...] = ()
    tasks: tuple[Task, ...] = ()
