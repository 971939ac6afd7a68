"""The outbox: an event is recorded in the transaction that makes it true, and published afterwards.

One relay at a time (an advisory lock chooses it) publishes in order, with the event's id as ``Nats-Msg-Id``, and marks
what JetStream acknowledged. A crash between the two publishes again under the same id: the server's window and the
consumers' inbox see to it that nothing happens twice. Sent rows are kept, so that a wiped stream can be filled again.
"""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial

import asyncpg

from esper_core import log
from esper_core.bus.bus import Bus, Receipt
from esper_core.bus.database import Connection, Pool
from esper_core.bus.dead import bury
from esper_core.bus.envelope import check_belongs
from esper_core.bus.mark import generation_id
from esper_core.bus.patience import heed_cancellation, persist
from esper_core.bus.rebuild import rebuild
from esper_core.bus.subjects import stream_of
from esper_core.clock import SYSTEM
from esper_core.errors import AlreadyExists, InvalidInput
from esper_core.pb.esper.bus.v1.bus_pb2 import EventEnvelope

CHANNEL = "esper_outbox"
LOCK = 0x6F6F6E61  # "oona"
BATCH = 200  # events published between two marks
POLL = 2.0  # seconds between looks when no notification came
INSPECT = 15.0  # seconds between looks at the streams' health
SWEEP = 3600.0  # seconds between removals of what is past its retention
OUTBOX_DAYS, INBOX_DAYS = 7, 30  # the inbox must remember longer than anything can be published again

_log = log.get("bus")


async def enqueue(connection: Connection, subject: str, envelope: EventEnvelope) -> None:
    """Record an event for publishing, inside the caller's transaction.

    Args:
        connection: with the transaction that makes the event true.
        subject: in full, e.g. ``KASMINA_COMMANDS.of(run_id)``.
        envelope: from ``wrap``.

    Raises:
        InvalidInput: the event does not belong on ``subject``.
        AlreadyExists: an event of that id was recorded before; the transaction is spoilt.
    """
    check_belongs(envelope, subject)
    try:
        await connection.execute(
            "INSERT INTO bus.outbox (event_id, subject, stream, data) VALUES ($1, $2, $3, $4)",
            envelope.event_id,
            subject,
            stream_of(subject).name,
            envelope.SerializeToString(),
        )
    except asyncpg.UniqueViolationError:
        raise AlreadyExists(
            f"event {envelope.event_id} was recorded before", hint="an event id names one event"
        ) from None
    await connection.execute("SELECT pg_notify($1, '')", CHANNEL)


async def relay(pool: Pool, bus: Bus) -> None:
    """Publish the outbox for ever, and keep the streams as the outbox knows them; one relay works, others stand by.

    Raises:
        Conflict: the server keeps other stream settings than asked for.
    """
    await persist(partial(_lead, pool, bus), "relay")


async def _lead(pool: Pool, bus: Bus) -> None:
    async with pool.acquire() as connection:
        if not await connection.fetchval("SELECT pg_try_advisory_lock($1)", LOCK):
            await asyncio.sleep(POLL)
            return
        wake = asyncio.Event()

        def on_notify(*_: object) -> None:
            wake.set()

        await connection.add_listener(CHANNEL, on_notify)
        try:
            await _work(pool, connection, bus, wake)
        finally:
            # Ends lock and listening for certain; asking the server to would wait on a connection that may be broken.
            connection.terminate()


async def _work(pool: Pool, connection: Connection, bus: Bus, wake: asyncio.Event) -> None:
    server, inspected, swept = "", 0.0, 0.0
    while True:
        heed_cancellation()
        now = SYSTEM.monotonic()
        if bus.server_id != server or now - inspected > INSPECT:
            fresh, server, inspected = bus.server_id != server, bus.server_id, now
            await rebuild(pool, bus, thorough=fresh)
        if now - swept > SWEEP:
            swept = now
            await _sweep(connection)
        wake.clear()
        if not await publish_batch(pool, connection, bus):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(wake.wait(), POLL)


async def publish_batch(pool: Pool, connection: Connection, bus: Bus) -> int:
    """Publish the oldest unsent events and mark what was acknowledged; returns how many there were."""
    rows = await connection.fetch(
        "SELECT position, event_id, generation, subject, data FROM bus.outbox"
        " WHERE sent IS NULL ORDER BY position LIMIT $1",
        BATCH,
    )
    sent: list[tuple[int, int | None]] = []
    try:
        for row in rows:
            receipt = await _publish(pool, bus, row)
            sent.append((row["position"], receipt.sequence if receipt else None))
    finally:
        if sent:
            await connection.executemany(
                "UPDATE bus.outbox SET sent = now(), stream_sequence = $2 WHERE position = $1", sent
            )
    return len(rows)


async def _publish(pool: Pool, bus: Bus, row: asyncpg.Record) -> Receipt | None:
    try:
        message_id = generation_id(row["event_id"], row["generation"])
        return await bus.publish_bytes(row["subject"], row["data"], message_id=message_id)
    except InvalidInput as error:  # the server takes no message of this size: it must not stop the line
        await bury(bus, pool, consumer="relay", subject=row["subject"], data=row["data"], reason=str(error))
        return None


async def _sweep(connection: Connection) -> None:
    outbox = await connection.execute(
        "DELETE FROM bus.outbox WHERE sent < now() - make_interval(days => $1)", OUTBOX_DAYS
    )
    inbox = await connection.execute(
        "DELETE FROM bus.inbox WHERE received < now() - make_interval(days => $1)", INBOX_DAYS
    )
    _log.info("bus.swept", outbox=outbox, inbox=inbox)
