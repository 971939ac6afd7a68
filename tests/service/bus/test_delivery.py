"""An event has its effect once, in order, whatever the line does to it."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper_core import telemetry
from esper_core.bus.bus import Bus
from esper_core.bus.envelope import Event
from esper_core.bus.inbox import consume, consume_plain, watch
from esper_core.bus.outbox import enqueue, publish_batch, relay
from esper_core.bus.subjects import EPOCH_EVENTS, FACTS, KASMINA_COMMANDS, SEED_EVENTS, STREAMS
from esper_core.errors import AlreadyExists, InvalidInput, Unavailable
from tests.service.bus.conftest import Start, until
from tests.service.bus.events import RUN, SUBJECT, effects, epoch, record, write

QUICK = (0.01, 0.01)


async def test_from_a_transaction_to_its_effect_in_order(bus: Bus, pool: asyncpg.Pool, start: Start) -> None:
    start(relay(pool, bus))
    start(consume(pool, bus, durable="effects", subjects=[EPOCH_EVENTS.all, KASMINA_COMMANDS.all], handler=write))
    await record(pool, *range(20))
    await until(lambda: _count(pool, 20))
    assert await effects(pool) == list(range(20))
    assert await pool.fetchval("SELECT count(*) FROM bus.outbox WHERE sent IS NULL") == 0


async def test_a_transaction_that_fails_says_nothing(bus: Bus, pool: asyncpg.Pool) -> None:
    async with pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        await enqueue(connection, SUBJECT, epoch(1))
        await transaction.rollback()
        assert await publish_batch(pool, connection, bus) == 0
    assert (await bus.stream_info(FACTS)).state.messages == 0


async def test_an_event_id_names_one_event(pool: asyncpg.Pool) -> None:
    event = epoch(1)
    async with pool.acquire() as connection:
        await enqueue(connection, SUBJECT, event)
        with pytest.raises(AlreadyExists, match=event.event_id):
            await enqueue(connection, SUBJECT, event)
        with pytest.raises(InvalidInput, match=r"does not travel on system\.events\.seed"):
            await enqueue(connection, SEED_EVENTS.of(RUN), epoch(2))
        with pytest.raises(InvalidInput) as caught:
            await enqueue(connection, "esper.system.events.epch.run-1", epoch(2))
    assert caught.value.hint == "did you mean 'system.events.epoch'?"


async def test_a_relay_that_died_between_publishing_and_marking_publishes_no_second_message(
    bus: Bus, pool: asyncpg.Pool
) -> None:
    await record(pool, 1, 2, 3)
    async with pool.acquire() as connection:
        assert await publish_batch(pool, connection, bus) == 3
        await connection.execute("UPDATE bus.outbox SET sent = NULL, stream_sequence = NULL")
        assert await publish_batch(pool, connection, bus) == 3
    assert (await bus.stream_info(FACTS)).state.messages == 3
    places = [row[0] for row in await pool.fetch("SELECT stream_sequence FROM bus.outbox ORDER BY position")]
    assert places == sorted(set(places))


async def test_only_one_relay_publishes_and_another_takes_over(bus: Bus, pool: asyncpg.Pool, start: Start) -> None:
    first, second = start(relay(pool, bus)), start(relay(pool, bus))
    await record(pool, *range(10))
    await until(lambda: _sent(pool, 10))
    first.cancel()
    await record(pool, *range(10, 20))
    await until(lambda: _sent(pool, 20))
    second.cancel()
    assert (await bus.stream_info(FACTS)).state.messages == 20


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(copies=st.lists(st.integers(1, 5), min_size=1, max_size=6))
async def test_one_to_five_copies_have_one_effect(bus: Bus, pool: asyncpg.Pool, copies: list[int]) -> None:
    """Copies under different message ids, so that the server's own window does not help."""
    await pool.execute("TRUNCATE effects")
    await bus.jetstream.purge_stream(FACTS.name)
    for number, times in enumerate(copies):
        event = epoch(number)
        for copy in range(times):
            await bus.publish_bytes(SUBJECT, event.SerializeToString(), message_id=f"{event.event_id}/{copy}")
    task = asyncio.create_task(consume(pool, bus, durable="copies", subjects=[EPOCH_EVENTS.all], handler=write))
    try:
        await until(lambda: _nothing_left(bus, "copies-facts"))
        assert await effects(pool) == list(range(len(copies)))
    finally:
        task.cancel()


async def test_a_lost_acknowledgement_has_no_second_effect(
    bus: Bus, pool: asyncpg.Pool, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies after the commit and before the acknowledgement, three times."""
    from nats.aio.msg import Msg

    lost = 0
    real = Msg.ack_sync

    async def ack(message: Msg, timeout: float) -> Msg:
        nonlocal lost
        if lost < 3:
            lost += 1
            await message.nak()
            return message
        return await real(message, timeout)

    monkeypatch.setattr(Msg, "ack_sync", ack)
    await bus.publish(SUBJECT, epoch(7))
    start(consume(pool, bus, durable="effects", subjects=[EPOCH_EVENTS.all], handler=write))
    await until(lambda: _nothing_left(bus, "effects-facts"))
    assert lost == 3
    assert await effects(pool) == [7]


async def test_a_failing_handler_leaves_nothing_and_is_tried_again(bus: Bus, pool: asyncpg.Pool, start: Start) -> None:
    tried: list[int] = []

    async def flaky(connection: asyncpg.Connection, event: Event) -> None:
        await write(connection, event)
        tried.append(event.message.metrics.epoch)
        if tried.count(1) < 3 and tried[-1] == 1:
            raise RuntimeError("not yet")

    start(consume(pool, bus, durable="flaky", subjects=[EPOCH_EVENTS.all], handler=flaky, backoff=QUICK))
    for number in range(3):
        await bus.publish(SUBJECT, epoch(number))
    await until(lambda: _count(pool, 3))
    assert await effects(pool) == [0, 1, 2]  # the retried one stayed in front of its successor
    assert tried == [0, 1, 1, 1, 2]
    assert await pool.fetchval("SELECT count(*) FROM bus.dead_letters") == 0


async def test_a_dependency_that_is_away_costs_no_attempt(bus: Bus, pool: asyncpg.Pool, start: Start) -> None:
    tries = 0

    async def needy(connection: asyncpg.Connection, event: Event) -> None:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise Unavailable("urza is away")
        await write(connection, event)

    start(consume(pool, bus, durable="needy", subjects=[EPOCH_EVENTS.all], handler=needy, backoff=()))
    await bus.publish(SUBJECT, epoch(1))
    await until(lambda: _count(pool, 1))
    assert await pool.fetchval("SELECT count(*) FROM bus.dead_letters") == 0


async def test_consumers_of_one_name_share_and_of_two_names_do_not(bus: Bus, pool: asyncpg.Pool, start: Start) -> None:
    for name in ("one", "one", "two"):
        start(consume(pool, bus, durable=name, subjects=[EPOCH_EVENTS.all], handler=write, ordered=name == "two"))
    for number in range(10):
        await bus.publish(SUBJECT, epoch(number))
    await until(lambda: _count(pool, 20))
    assert sorted(await effects(pool)) == sorted([*range(10)] * 2)


async def test_without_a_database_events_come_in_order_and_under_their_trace(bus: Bus, start: Start) -> None:
    got: list[int] = []
    traces: set[str] = set()

    async def handler(event: Event) -> None:
        traces.add(telemetry.trace_id(telemetry.current()))
        if event.message.metrics.epoch == 1 and not got.count(-1):
            got.append(-1)
            raise RuntimeError("once")
        got.append(event.message.metrics.epoch)

    with telemetry.use() as trace:
        events = [epoch(number) for number in range(3)]
    for event in events:
        for copy in range(2):
            await bus.publish_bytes(SUBJECT, event.SerializeToString(), message_id=f"{event.event_id}/{copy}")
    start(consume_plain(bus, durable="run-1-commands", subjects=[SUBJECT], handler=handler, backoff=QUICK))

    await until(lambda: _nothing_left(bus, "run-1-commands-facts"))
    assert got == [0, -1, 1, 2]
    assert traces == {telemetry.trace_id(trace)}


async def test_watching_sees_what_happens_from_now_on_and_skips_noise(bus: Bus) -> None:
    await bus.publish(SUBJECT, epoch(0))
    seen: list[int] = []

    async def look() -> None:
        async for event in watch(bus, [EPOCH_EVENTS.all, SEED_EVENTS.all]):
            seen.append(event.message.metrics.epoch)
            assert event.subject == SUBJECT
            if len(seen) == 2:
                return

    looking = asyncio.create_task(look())
    await asyncio.sleep(0.1)
    await bus.publish_bytes(SUBJECT, b"noise", message_id="noise")
    once = epoch(1)
    await bus.publish(SUBJECT, once)
    await bus.publish(SUBJECT, once)
    await bus.publish(SUBJECT, epoch(2))
    await asyncio.wait_for(looking, 5)
    assert seen == [1, 2]


async def test_streams_are_made_once_and_stay_as_declared(bus: Bus) -> None:
    await asyncio.gather(*(bus.provision() for _ in range(3)))
    for stream in STREAMS:
        config = (await bus.stream_info(stream)).config
        assert (config.max_bytes, config.max_age) == (stream.max_bytes, stream.max_age)
        assert config.discard == ("old" if stream.shed else "new")


async def _count(pool: asyncpg.Pool, number: int) -> bool:
    return len(await effects(pool)) >= number


async def _sent(pool: asyncpg.Pool, number: int) -> bool:
    return bool(await pool.fetchval("SELECT count(*) = $1 FROM bus.outbox WHERE sent IS NOT NULL", number))


async def _nothing_left(bus: Bus, consumer: str) -> bool:
    """Whether all that the stream holds was delivered and acknowledged; how many are pending, the server says a little late."""
    from nats.js.errors import NotFoundError

    last = (await bus.stream_info(FACTS)).state.last_seq
    try:
        info = await bus.jetstream.consumer_info(FACTS.name, consumer)
    except NotFoundError:
        return False
    return info.delivered.stream_seq >= last and info.num_pending == 0 and info.num_ack_pending == 0
