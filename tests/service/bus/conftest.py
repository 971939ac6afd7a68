"""A provisioned bus with empty streams, a database with the bus's schema, and consumers that are stopped afterwards."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import asyncpg
import pytest

from esper_core.bus import SCHEMA
from esper_core.bus.bus import Bus
from esper_core.bus.subjects import STREAMS
from esper_core.config import Endpoints
from esper_core.store.postgres import migrate, open_pool

Start = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


async def connect(endpoints: Endpoints, name: str = "test") -> Bus:
    password = endpoints.nats_password.get_secret_value() if endpoints.nats_password else None
    return await Bus.connect(endpoints.nats_url, endpoints.nats_user, password, name)


@pytest.fixture
async def bus(stack: Endpoints) -> AsyncIterator[Bus]:
    bus = await connect(stack)
    await bus.provision()
    for stream in STREAMS:
        for consumer in await bus.jetstream.consumers_info(stream.name):
            await bus.jetstream.delete_consumer(stream.name, consumer.name)
        await bus.jetstream.purge_stream(stream.name)
    yield bus
    await bus.close()


@pytest.fixture
async def pool(database: str) -> AsyncIterator[asyncpg.Pool]:
    await migrate(database, {"bus": SCHEMA})
    pool = await open_pool(database)
    yield pool
    await pool.close()


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts a forever-task; all are cancelled afterwards, and one that died of something else fails the test."""
    tasks: list[asyncio.Task[None]] = []

    def begin(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        tasks.append(asyncio.create_task(work))
        return tasks[-1]

    yield begin
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], Awaitable[Any]], seconds: float = 10.0) -> Any:
    """Wait until ``condition`` is true and return what it said."""
    async with asyncio.timeout(seconds):
        while not (said := await condition()):
            await asyncio.sleep(0.02)  # noqa: ASYNC110 - what is awaited happens in a server
        return said
