"""Events to send about, and a handler whose effects can be counted."""

from __future__ import annotations

import asyncpg

from esper_core.bus.envelope import Event, wrap
from esper_core.bus.outbox import enqueue
from esper_core.bus.subjects import EPOCH_EVENTS
from esper_core.pb.esper.bus.v1.bus_pb2 import EpochCompleted, EventEnvelope
from esper_core.pb.esper.core.v1.run_pb2 import EpochMetrics

RUN = "run-1"
SUBJECT = EPOCH_EVENTS.of(RUN)


def epoch(number: int) -> EventEnvelope:
    message = EpochCompleted(run_id=RUN, metrics=EpochMetrics(epoch=number))
    return wrap(message, producer="tolaria", run_id=RUN, epoch=number)


async def write(connection: asyncpg.Connection, event: Event) -> None:
    await connection.execute("INSERT INTO effects (epoch) VALUES ($1)", event.message.metrics.epoch)


async def effects(pool: asyncpg.Pool) -> list[int]:
    """What ``write`` wrote, in order."""
    return [row["epoch"] for row in await pool.fetch("SELECT epoch FROM effects ORDER BY position")]


async def record(pool: asyncpg.Pool, *numbers: int) -> None:
    """Put epochs into the outbox, each in its own transaction."""
    async with pool.acquire() as connection:
        for number in numbers:
            async with connection.transaction():
                await enqueue(connection, SUBJECT, epoch(number))
