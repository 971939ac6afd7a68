"""Events from a committed transaction to an effect: outbox, JetStream, inbox, on servers of their own."""

from __future__ import annotations

import asyncio
import contextlib
import time

import asyncpg

from esper_core.bus import SCHEMA
from esper_core.bus.bus import Bus
from esper_core.bus.envelope import Event
from esper_core.bus.inbox import consume
from esper_core.bus.outbox import enqueue, relay
from esper_core.config import Endpoints, PlatformConfig
from esper_core.store.postgres import migrate, open_pool
from tests.bench.bench import Pace, Table
from tests.bench.figures import Row, Sample
from tests.bench.ground import folder, running
from tests.service.bus.events import SUBJECT, epoch

PER_TRANSACTION = 50
PACE_SECONDS = 0.02
PATIENCE = 120.0
_PUBLISHED = """
    SELECT CASE WHEN bool_and(sent IS NOT NULL) THEN extract(epoch FROM max(sent) - min(created)) END
    FROM bus.outbox WHERE position > $1"""
"""Seconds from the first record to the last mark; nothing while one is unmarked."""


class Watcher:
    """Notes when each event had its effect."""

    def __init__(self) -> None:
        self.seen: dict[int, float] = {}
        self._wanted: set[int] = set()
        self._done = asyncio.Event()

    async def handle(self, _: asyncpg.Connection, event: Event) -> None:
        number = event.message.metrics.epoch
        self.seen[number] = time.perf_counter()
        self._wanted.discard(number)
        if not self._wanted:
            self._done.set()

    def expect(self, numbers: range) -> None:
        self._wanted = set(numbers)
        self._done.clear()

    async def all_seen(self) -> None:
        await asyncio.wait_for(self._done.wait(), PATIENCE)


def run(pace: Pace) -> list[Table]:
    with folder("bus") as path, running(PlatformConfig(data_dir=path, services_command=())) as endpoints:
        return pace.ground.run(_measured(endpoints, pace))


async def _measured(endpoints: Endpoints, pace: Pace) -> list[Table]:
    dsn = endpoints.postgres_dsn.get_secret_value()
    await migrate(dsn, {"bus": SCHEMA})
    bus = await Bus.join(endpoints, "oona", "bench")
    await bus.provision()
    pool = await open_pool(dsn)
    ordered, free = Watcher(), Watcher()
    tasks = [
        asyncio.create_task(relay(pool, bus)),
        asyncio.create_task(consume(pool, bus, durable="ordered", subjects=[SUBJECT], handler=ordered.handle)),
        asyncio.create_task(consume(pool, bus, durable="free", subjects=[SUBJECT], handler=free.handle, ordered=False)),
    ]
    try:
        pace.say("latency")
        latency = await _latency(pool, ordered, free, pace.rounds(200, 30))
        pace.say("throughput")
        rates = [row for number in range(pace.rounds(3, 1)) for row in await _throughput(pool, ordered, free, number)]
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await pool.close()
        await bus.close()
    grouped: dict[str, list[float]] = {}
    for name, rate in rates:
        grouped.setdefault(name, []).append(rate)
    return [
        Table(
            "From a committed transaction to the handler's call",
            latency,
            (
                f"One event every {PACE_SECONDS * 1e3:.0f} ms, relay and both consumers in this one process, wall clock.",
            ),
        ),
        Table(
            f"Throughput, {PER_TRANSACTION} events per transaction",
            [Sample(tuple(found)).row(name, "events/s") for name, found in grouped.items()],
            (
                "Recorded: durable in PostgreSQL. Acted on: each in its own transaction with the note that it was, by "
                "both consumers at once. Relay, consumers and producer share one process.",
            ),
        ),
    ]


async def _latency(pool: asyncpg.Pool, ordered: Watcher, free: Watcher, count: int) -> list[Row]:
    numbers = range(count)
    ordered.expect(numbers)
    free.expect(numbers)
    committed: dict[int, float] = {}
    for number in numbers:
        async with pool.acquire() as connection:
            async with connection.transaction():
                await enqueue(connection, SUBJECT, epoch(number))
            committed[number] = time.perf_counter()
        await asyncio.sleep(PACE_SECONDS)
    await asyncio.gather(ordered.all_seen(), free.all_seen())
    warm = numbers[len(numbers) // 10 :]
    return [
        Sample(tuple(watcher.seen[number] - committed[number] for number in warm)).row(what, "ms", 1e3)
        for what, watcher in (("strictly ordered consumer", ordered), ("unordered consumer", free))
    ]


async def _throughput(pool: asyncpg.Pool, ordered: Watcher, free: Watcher, turn: int) -> list[tuple[str, float]]:
    count = 1000
    numbers = range(10_000 * (turn + 1), 10_000 * (turn + 1) + count)
    ordered.expect(numbers)
    free.expect(numbers)
    async with pool.acquire() as connection:
        before = await connection.fetchval("SELECT coalesce(max(position), 0) FROM bus.outbox")
        began = time.perf_counter()
        for first in range(0, count, PER_TRANSACTION):
            async with connection.transaction():
                for number in numbers[first : first + PER_TRANSACTION]:
                    await enqueue(connection, SUBJECT, epoch(number))
    recorded = time.perf_counter()
    await asyncio.gather(ordered.all_seen(), free.all_seen())
    while not (published := await pool.fetchval(_PUBLISHED, before)):  # noqa: ASYNC110 - the relay marks after sending
        await asyncio.sleep(0.01)
    ends = {name: max(watcher.seen[number] for number in numbers) for name, watcher in (("o", ordered), ("f", free))}
    return [
        ("recorded in the outbox", count / (recorded - began)),
        ("published to JetStream by the relay", count / float(published)),
        ("acted on by the strictly ordered consumer", count / (ends["o"] - began)),
        ("acted on by the unordered consumer", count / (ends["f"] - began)),
    ]
