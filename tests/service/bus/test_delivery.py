"""An event has its effect once, whatever the line does to it."""

from __future__ import annotations

import asyncpg
import pytest

from esper_core.bus.bus import Bus
from esper_core.bus.envelope import Event, wrap
from esper_core.bus.inbox import consume
from esper_core.bus.outbox import enqueue, relay
from esper_core.bus.subjects import EPOCH_EVENTS
from esper_core.pb.esper.bus.v1.bus_pb2 import EpochCompleted, EventEnvelope
from esper_core.pb.esper.core.v1.run_pb2 import EpochMetrics
from tests.service.bus.conftest import Start, until


def epoch(number: int, run: str = "run-1") -> EventEnvelope:
    message = EpochCompleted(run_id=run, metrics=EpochMetrics(epoch=number))
    return wrap(message, producer="tolaria", run_id=run, epoch=number, sequence=number + 1)


async def effects(pool: asyncpg.Pool) -> list[int]:
    return [row["epoch"] for row in await pool.fetch("SELECT epoch FROM effects ORDER BY position")]


@pytest.fixture
async def table(pool: asyncpg.Pool) -> None:
    await pool.execute("CREATE TABLE effects (position serial, epoch int)")


async def write(connection: asyncpg.Connection, event: Event) -> None:
    await connection.execute("INSERT INTO effects (epoch) VALUES ($1)", event.message.metrics.epoch)


async def test_from_a_transaction_to_its_effect(bus: Bus, pool: asyncpg.Pool, table: None, start: Start) -> None:
    start(relay(pool, bus))
    start(consume(pool, bus, durable="effects", subjects=[EPOCH_EVENTS.all], handler=write))
    async with pool.acquire() as connection:
        for number in range(20):
            async with connection.transaction():
                await enqueue(connection, EPOCH_EVENTS.of("run-1"), epoch(number))

    async def all_there() -> bool:
        return len(await effects(pool)) == 20

    await until(all_there)
    assert await effects(pool) == list(range(20))
    assert await pool.fetchval("SELECT count(*) FROM bus.outbox WHERE sent IS NULL") == 0
