"""Fill streams again whose contents were wiped or damaged.

PostgreSQL is the system of record and JetStream can be lost: the outbox keeps what it sent. Where a stream turns out
to be another incarnation than the one it was sent to, or no longer holds what it acknowledged, the rows concerned are
marked unsent, so that the relay publishes them again. Consumers drop through their inbox what they have acted on.

The server itself says nothing about a message whose bytes rotted on its disk: it passes over it. Hence the audit,
which reads the headers of everything the outbox has put into a stream.

Does not know about events that training processes drained from their spools: those send them again themselves.
"""

from __future__ import annotations

import contextlib

import nats.errors
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, StreamInfo

from esper_core import log
from esper_core.bus.bus import Bus, translated
from esper_core.bus.database import Pool
from esper_core.bus.mark import MARGIN, Mark, damage, generation_id
from esper_core.bus.subjects import STREAMS, Stream
from esper_core.ids import new_id

_BATCH = 500  # headers fetched at once
_SILENCES = 5  # fetches in vain after which a server that says it has more is given up for now
_log = log.get("bus")


async def rebuild(pool: Pool, bus: Bus, *, thorough: bool = True) -> dict[str, int]:
    """Make the streams, and mark for publishing again what a wiped or damaged one has lost.

    Args:
        thorough: read every message's headers, too (20 thousand a second or so); worth it after the server restarted.

    Returns:
        Events to be published again, by stream; only the damaged ones appear.

    Raises:
        Unavailable: NATS does not answer.
        Conflict: as ``Bus.provision``.
    """
    await bus.provision()
    found: dict[str, int] = {}
    for stream in STREAMS:
        info = await bus.stream_info(stream)
        why = await _damage(pool, bus, stream, info)
        lost = await _unsend(pool, stream) if why else 0
        if thorough and not why and not stream.shed:
            why = "messages are missing"
            lost = await _audit(pool, bus, stream)
        if lost:
            found[stream.name] = lost
            _log.error("bus.stream_damaged", stream=stream.name, why=why, events=lost)
        await pool.execute(
            "INSERT INTO bus.streams (name, created) VALUES ($1, $2)"
            " ON CONFLICT (name) DO UPDATE SET created = excluded.created",
            stream.name,
            info.created,
        )
    return found


async def _damage(pool: Pool, bus: Bus, stream: Stream, info: StreamInfo) -> str:
    """What is plainly wrong with a stream, in words; empty when nothing is."""
    created = await pool.fetchval("SELECT created FROM bus.streams WHERE name = $1", stream.name)
    if created is None:
        return ""
    last = await pool.fetchrow(
        "SELECT event_id, generation, stream_sequence, sent FROM bus.outbox"
        " WHERE stream = $1 AND stream_sequence IS NOT NULL ORDER BY stream_sequence DESC LIMIT 1",
        stream.name,
    )
    mark = Mark(created)
    if last:
        message_id = generation_id(last["event_id"], last["generation"])
        mark = Mark(created, last["stream_sequence"], message_id, last["sent"])
    return await damage(bus, stream, info, mark)


async def _audit(pool: Pool, bus: Bus, stream: Stream) -> int:
    """Unsend what the stream should hold and does not; returns how many events that are."""
    rows = await pool.fetch(
        "SELECT position, event_id, generation, stream_sequence FROM bus.outbox"
        " WHERE stream = $1 AND stream_sequence IS NOT NULL AND sent > now() - make_interval(secs => $2)",
        stream.name,
        stream.max_age - MARGIN,
    )
    if not rows:
        return 0
    wanted = {row["stream_sequence"]: generation_id(row["event_id"], row["generation"]) for row in rows}
    held = await _message_ids(bus, stream, min(wanted), max(wanted))
    gone = [row["position"] for row in rows if held.get(row["stream_sequence"]) != wanted[row["stream_sequence"]]]
    await pool.execute(
        "UPDATE bus.outbox SET sent = NULL, stream_sequence = NULL, generation = generation + 1"
        " WHERE position = ANY($1::bigint[])",
        gone,
    )
    return len(gone)


async def _message_ids(bus: Bus, stream: Stream, first: int, last: int) -> dict[int, str]:
    """``Nats-Msg-Id`` by sequence, of what can be read of a stretch of a stream."""
    name = f"audit-{new_id()}"
    config = ConsumerConfig(
        name=name,
        deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
        opt_start_seq=first,
        ack_policy=AckPolicy.NONE,
        headers_only=True,
        mem_storage=True,
        inactive_threshold=60.0,
    )
    try:
        await bus.jetstream.add_consumer(stream.name, config)
        subscription = await bus.jetstream.pull_subscribe_bind(name, stream.name)
        try:
            return await _read_ids(bus, subscription, last)
        finally:
            with contextlib.suppress(nats.errors.Error, OSError):
                await subscription.unsubscribe()
                await bus.jetstream.delete_consumer(stream.name, name)
    except (nats.errors.Error, TimeoutError, OSError) as error:
        raise translated(error, f"reading stream {stream.name}") from error


async def _read_ids(bus: Bus, subscription: JetStreamContext.PullSubscription, last: int) -> dict[int, str]:
    found: dict[int, str] = {}
    reached = silences = 0
    while reached < last:
        try:
            messages = await subscription.fetch(_BATCH, timeout=1)
        except nats.errors.TimeoutError:
            bus.check_connected()
            silences += 1
            if (await subscription.consumer_info()).num_pending == 0:
                break
            if silences == _SILENCES:
                raise
            continue
        for message in messages:
            reached = message.metadata.sequence.stream
            found[reached] = str((message.headers or {}).get("Nats-Msg-Id", ""))
    return found


async def _unsend(pool: Pool, stream: Stream) -> int:
    status = await pool.execute(
        "UPDATE bus.outbox SET sent = NULL, stream_sequence = NULL, generation = generation + 1"
        " WHERE stream = $1 AND sent > now() - make_interval(secs => $2)",
        stream.name,
        stream.max_age,
    )
    return int(status.rpartition(" ")[2])
