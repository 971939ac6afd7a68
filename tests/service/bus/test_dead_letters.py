"""What nobody can take is put aside with its reason, and the line moves on."""

from __future__ import annotations

import asyncpg
import pytest
from nats.js.api import AckPolicy, ConsumerConfig

from esper_core.bus.bus import Bus
from esper_core.bus.dead import collect, replay
from esper_core.bus.envelope import Event, wrap
from esper_core.bus.inbox import consume, consume_plain
from esper_core.bus.subjects import DEAD, EPOCH_EVENTS, FACTS, MAX_MESSAGE, MAX_PAYLOAD, SEED_EVENTS
from esper_core.errors import Conflict, InvalidInput, NotFound
from esper_core.ids import sha256
from esper_core.pb.esper.bus.v1.bus_pb2 import EventEnvelope, RunEnded
from tests.service.bus.conftest import Start, until
from tests.service.bus.events import RUN, SUBJECT, effects, epoch, write


def altered(**fields: object) -> bytes:
    """A good event with fields of its envelope overwritten."""
    event = epoch(99)
    for name, value in fields.items():
        setattr(event, name, value)
    return event.SerializeToString()


def sealed(payload: bytes, **fields: object) -> bytes:
    return altered(payload=payload, payload_sha256=sha256(payload), **fields)


POISON = {
    "undecodable": (b"\xff\xfenonsense", "no event envelope"),
    "empty": (b"", "event_id"),
    "invalid envelope": (altered(schema_version=2), "schema_version"),
    "no timestamp": (
        EventEnvelope(event_id="x", type="x", schema_version=1, producer="x").SerializeToString(),
        "created",
    ),
    "unknown type": (altered(type="esper.bus.v1.Rumour"), "unknown type 'esper.bus.v1.Rumour'"),
    "astray": (altered(type="esper.bus.v1.RunEnded"), "does not travel on system.events.epoch"),
    "by somebody who may not": (altered(producer="karn"), "karn may not speak on system.events.epoch"),
    "another run's": (altered(run_id="run-2"), "an event of run 'run-2'"),
    "altered": (altered(payload=b"\x0a\x05run-9"), "does not match its digest"),
    "undecodable payload": (sealed(b"\xff\xff"), "is no esper.bus.v1.EpochCompleted"),
    "invalid payload": (sealed(b""), "run_id"),
    "oversized payload": (sealed(b"\x0a" * (MAX_PAYLOAD + 1)), "payload"),
}


async def test_no_poison_stops_the_line(bus: Bus, pool: asyncpg.Pool, start: Start) -> None:
    for number, (data, _) in enumerate(POISON.values()):
        await bus.publish_bytes(SUBJECT, data, message_id=f"poison {number}")
        await bus.publish(SUBJECT, epoch(number))
    start(consume(pool, bus, durable="effects", subjects=[EPOCH_EVENTS.all], handler=write))
    await until(lambda: _effects(pool, len(POISON)))

    assert await effects(pool) == list(range(len(POISON)))
    rows = await pool.fetch("SELECT * FROM bus.dead_letters ORDER BY position")
    assert [row["data"] for row in rows] == [data for data, _ in POISON.values()]
    for row, (kind, (_, reason)) in zip(rows, POISON.items(), strict=True):
        assert reason in row["reason"], kind
        assert (row["consumer"], row["subject"], row["deliveries"], row["truncated"]) == ("effects", SUBJECT, 1, False)
    assert (await bus.stream_info(DEAD)).state.messages == len(POISON)


async def test_the_stream_itself_refuses_giants(bus: Bus) -> None:
    with pytest.raises(InvalidInput, match="larger than the stream takes"):
        await bus.publish_bytes(SUBJECT, b"x" * MAX_MESSAGE, message_id="giant")
    with pytest.raises(InvalidInput, match="larger than the server takes"):
        await bus.publish_bytes(SUBJECT, b"x" * 2 * 1024 * 1024, message_id="giant")


async def test_a_handler_that_always_fails_is_tried_so_often_and_then_it_is_put_aside(
    bus: Bus, pool: asyncpg.Pool, start: Start
) -> None:
    tries = 0

    async def handler(connection: asyncpg.Connection, event: Event) -> None:
        nonlocal tries
        await write(connection, event)
        if event.message.metrics.epoch == 0:
            tries += 1
            raise ValueError("cannot\nbear it")

    bad = epoch(0)
    await bus.publish(SUBJECT, bad)
    await bus.publish(SUBJECT, epoch(1))
    start(consume(pool, bus, durable="picky", subjects=[EPOCH_EVENTS.all], handler=handler, backoff=(0.01, 0.01, 0.01)))
    await until(lambda: _effects(pool, 1))
    assert await effects(pool) == [1]
    assert tries == 4
    row = await pool.fetchrow("SELECT * FROM bus.dead_letters")
    assert (row["reason"], row["deliveries"]) == ("ValueError: cannot bear it", 4)
    assert row["data"] == bad.SerializeToString()


async def test_a_letter_can_be_replayed_once_its_cause_is_gone(bus: Bus, pool: asyncpg.Pool, start: Start) -> None:
    broken = True

    async def handler(connection: asyncpg.Connection, event: Event) -> None:
        if broken:
            raise ValueError("broken")
        await write(connection, event)

    start(consume(pool, bus, durable="mended", subjects=[EPOCH_EVENTS.all], handler=handler, backoff=()))
    start(consume(pool, bus, durable="fine", subjects=[EPOCH_EVENTS.all], handler=write))
    await bus.publish(SUBJECT, epoch(5))
    letter = await until(lambda: pool.fetchval("SELECT dead_letter_id FROM bus.dead_letters"))
    broken = False
    await replay(pool, bus, letter)
    await until(lambda: _effects(pool, 2))
    await until(lambda: _handled(bus, "fine-facts", 2))
    assert await effects(pool) == [5, 5]  # one for each consumer; the one that had acted dropped the replay
    assert await pool.fetchval("SELECT replayed IS NOT NULL FROM bus.dead_letters")
    with pytest.raises(NotFound):
        await replay(pool, bus, "0" * 64)


async def test_oona_books_the_letters_of_those_without_a_database(bus: Bus, pool: asyncpg.Pool, start: Start) -> None:
    async def handler(event: Event) -> None:
        raise ValueError("näh")

    start(collect(pool, bus))
    start(consume_plain(bus, durable="run-1-commands", subjects=[SUBJECT], handler=handler, backoff=()))
    await bus.publish_bytes(SUBJECT, b"nonsense", message_id="1")
    bad = epoch(1)
    await bus.publish(SUBJECT, bad)
    rows = await until(lambda: _letters(pool, 2))
    assert [row["data"] for row in rows] == [b"nonsense", bad.SerializeToString()]
    assert [row["consumer"] for row in rows] == ["run-1-commands"] * 2
    assert rows[1]["reason"] == "ValueError: n?h"


async def test_oona_books_what_killed_its_consumers_too_often(bus: Bus, pool: asyncpg.Pool, start: Start) -> None:
    """A consumer that takes a message and is never heard of again, until the server gives the message up."""
    config = ConsumerConfig(durable_name="doomed", ack_policy=AckPolicy.EXPLICIT, ack_wait=0.1, max_deliver=2)
    await bus.jetstream.add_consumer(FACTS.name, config)
    doomed = await bus.jetstream.pull_subscribe_bind("doomed", FACTS.name)
    event = epoch(3)
    await bus.publish(SUBJECT, event)
    start(collect(pool, bus))
    for _ in range(2):
        await doomed.fetch(1, timeout=2)
    from nats.errors import TimeoutError as NothingCame

    with pytest.raises(NothingCame):
        await doomed.fetch(1, timeout=0.5)
    row = (await until(lambda: _letters(pool, 1)))[0]
    assert (row["consumer"], row["subject"], row["data"]) == ("doomed", SUBJECT, event.SerializeToString())
    assert "delivered 2 times" in row["reason"]
    await doomed.unsubscribe()


async def test_a_giant_is_kept_in_part_and_not_replayed(bus: Bus, pool: asyncpg.Pool) -> None:
    from esper_core.bus.dead import bury

    giant = b"x" * (MAX_MESSAGE + 1)
    for _ in range(2):
        await bury(bus, pool, consumer="c", subject=SUBJECT, data=giant, reason="r" * 9999, deliveries=1)
    row = await pool.fetchrow("SELECT * FROM bus.dead_letters")
    assert (len(row["data"]), row["truncated"], len(row["reason"])) == (MAX_MESSAGE, True, 500)
    with pytest.raises(Conflict):
        await replay(pool, bus, row["dead_letter_id"])
    assert (await bus.stream_info(DEAD)).state.messages == 1


async def test_publishing_refuses_what_consumers_would(bus: Bus) -> None:
    with pytest.raises(InvalidInput, match="does not travel"):
        await bus.publish(SEED_EVENTS.of(RUN), epoch(1))
    with pytest.raises(InvalidInput, match="larger than the bus takes"):
        wrap(RunEnded(run_id=RUN, state=2, report="x" * MAX_PAYLOAD), producer="tolaria")


async def _effects(pool: asyncpg.Pool, number: int) -> bool:
    return len(await effects(pool)) >= number


async def _letters(pool: asyncpg.Pool, number: int) -> list[asyncpg.Record]:
    rows = await pool.fetch("SELECT * FROM bus.dead_letters ORDER BY position")
    return rows if len(rows) >= number else []


async def _handled(bus: Bus, consumer: str, number: int) -> bool:
    info = await bus.jetstream.consumer_info(FACTS.name, consumer)
    return info.ack_floor.stream_seq >= number if info.ack_floor else False
