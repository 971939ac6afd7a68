"""Servers die and lose their memory; nothing that was acknowledged is lost and nothing happens twice."""

from __future__ import annotations

import asyncio
import os
import signal

import asyncpg
import pytest
from pydantic import SecretStr

from esper_core.bus.bus import Bus
from esper_core.bus.inbox import consume, consume_plain
from esper_core.bus.login import Login
from esper_core.bus.outbox import publish_batch, relay
from esper_core.bus.rebuild import rebuild
from esper_core.bus.spool import Spool
from esper_core.bus.subjects import EPOCH_EVENTS, FACTS
from esper_core.config import Endpoints
from esper_core.errors import Unauthenticated, Unavailable
from esper_core.local import layout, state
from tests.service.bus.conftest import NatsServer, Start, until
from tests.service.bus.events import SUBJECT, effects, epoch, record, write


async def test_a_killed_nats_server_loses_nothing_and_repeats_nothing(
    server: NatsServer, own_bus: Bus, pool: asyncpg.Pool, start: Start
) -> None:
    start(relay(pool, own_bus))
    start(consume(pool, own_bus, durable="effects", subjects=[EPOCH_EVENTS.all], handler=write))
    for round_ in range(2):
        await record(pool, *range(20 * round_, 20 * round_ + 10))
        server.kill()
        await record(pool, *range(20 * round_ + 10, 20 * round_ + 20))
        server.start()
    await until(lambda: _count(pool, 40), 30)
    assert await effects(pool) == list(range(40))


async def test_a_wiped_jetstream_is_filled_again_and_nothing_happens_twice(
    server: NatsServer, own_bus: Bus, pool: asyncpg.Pool, start: Start
) -> None:
    start(relay(pool, own_bus))
    early = start(consume(pool, own_bus, durable="early", subjects=[EPOCH_EVENTS.all], handler=write))
    await record(pool, *range(5))
    await until(lambda: _count(pool, 5))
    early.cancel()
    await record(pool, *range(5, 10))
    await until(lambda: _sent(pool, 10))

    server.kill()
    server.wipe()
    server.start()
    start(consume(pool, own_bus, durable="early", subjects=[EPOCH_EVENTS.all], handler=write))
    await until(lambda: _count(pool, 10), 30)
    await until(lambda: _sent(pool, 10))
    assert await effects(pool) == list(range(10))
    assert (await own_bus.stream_info(FACTS)).state.messages == 10


@pytest.mark.parametrize(("where", "gently"), [(0.05, True), (0.52, True), (0.52, False)])
async def test_a_flipped_bit_in_the_store_loses_nothing(
    server: NatsServer, own_bus: Bus, pool: asyncpg.Pool, start: Start, where: float, gently: bool
) -> None:
    """After a gentle stop the server trusts its index, and passes over the message without a word."""
    early = start(relay(pool, own_bus))
    await record(pool, *range(10))
    await until(lambda: _sent(pool, 10))
    early.cancel()
    server.stop() if gently else server.kill()
    block = next(server.store.rglob("ESPER_FACTS/msgs/*.blk"))
    raw = bytearray(block.read_bytes())
    raw[int(where * len(raw))] ^= 0x10
    block.write_bytes(raw)
    server.start()
    start(relay(pool, own_bus))
    start(consume(pool, own_bus, durable="effects", subjects=[EPOCH_EVENTS.all], handler=write))
    await until(lambda: _count(pool, 10), 30)
    assert sorted(await effects(pool)) == list(range(10))


async def test_what_a_stream_lost_is_published_again_and_nothing_else(own_bus: Bus, pool: asyncpg.Pool) -> None:
    async def publish() -> int:
        async with pool.acquire() as connection:
            return await publish_batch(pool, connection, own_bus)

    async def mended(lost: int) -> None:
        assert await rebuild(pool, own_bus) == {FACTS.name: lost}
        assert await publish() == lost
        assert await rebuild(pool, own_bus) == {}

    assert await rebuild(pool, own_bus) == {}
    await record(pool, *range(6))
    assert await publish() == 6
    assert await rebuild(pool, own_bus) == {}

    await own_bus.jetstream.delete_msg(FACTS.name, 3)
    assert await rebuild(pool, own_bus, thorough=False) == {}
    await mended(1)  # lies at 7 now
    await own_bus.jetstream.purge_stream(FACTS.name, seq=3)
    await mended(2)  # 8, 9
    await own_bus.jetstream.delete_msg(FACTS.name, 9)
    assert await rebuild(pool, own_bus, thorough=False) == {FACTS.name: 6}
    assert await publish() == 6
    assert await rebuild(pool, own_bus) == {}


async def test_a_killed_postgres_loses_nothing_and_repeats_nothing(
    stack: Endpoints, bus: Bus, pool: asyncpg.Pool, start: Start
) -> None:
    tasks = [
        start(relay(pool, bus)),
        start(consume(pool, bus, durable="effects", subjects=[EPOCH_EVENTS.all], handler=write)),
    ]
    await record(pool, *range(10))
    os.kill(_postgres(stack), signal.SIGKILL)
    for number in range(10, 15):
        await bus.publish(SUBJECT, epoch(number))

    async def all_there() -> bool:
        for task in tasks:
            if task.done():
                task.result()
        try:
            return len(await effects(pool)) == 15
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return False

    await until(all_there, 60)
    assert sorted(await effects(pool)) == list(range(15))
    assert await pool.fetchval("SELECT count(*) FROM bus.dead_letters") == 0


async def test_without_a_server_publishing_says_so(server: NatsServer, own_bus: Bus) -> None:
    async def noticed() -> bool:
        return not own_bus.connected

    server.kill()
    await until(noticed)
    with pytest.raises(Unavailable) as caught:
        await asyncio.wait_for(own_bus.publish(SUBJECT, epoch(1)), 0.5)
    assert "esperctl status" in caught.value.hint
    with pytest.raises(Unavailable, match="did not answer within 1 s"):
        await Bus.connect(server.url, Login(), "late", timeout=1)


async def test_wrong_credentials_say_so(stack: Endpoints) -> None:
    wrong = Login(user="esper", password=SecretStr("hunter2"))
    for timeout in (5, None):
        with pytest.raises(Unauthenticated, match="does not know user 'esper'") as caught:
            await asyncio.wait_for(Bus.connect(stack.nats_url, wrong, "thief", timeout=timeout), 5)
        assert "ESPER_NATS__PASSWORD" in caught.value.hint
        assert "hunter2" not in str(caught.value) + caught.value.hint


async def test_a_spool_outlives_kills_and_a_wiped_jetstream(
    server: NatsServer, own_bus: Bus, pool: asyncpg.Pool, start: Start, tmp_path: object
) -> None:
    """A run's facts reach the database although JetStream forgot what it had acknowledged to the spool."""
    spool = Spool(server.store.parent / "spool")
    start(spool.drain(own_bus))
    for number in range(5):
        spool.append(SUBJECT, epoch(number))
    await until(lambda: _drained(spool))
    server.kill()
    for number in range(5, 10):
        spool.append(SUBJECT, epoch(number))
    server.wipe()
    server.start()
    start(relay(pool, own_bus))
    start(consume(pool, own_bus, durable="effects", subjects=[EPOCH_EVENTS.all], handler=write))
    await until(lambda: _count(pool, 10), 30)
    assert await effects(pool) == list(range(10))
    spool.close()


async def test_commands_reach_a_run_over_restarts(server: NatsServer, own_bus: Bus, start: Start) -> None:
    got: list[int] = []

    async def handler(event: object) -> None:
        got.append(event.message.metrics.epoch)  # type: ignore[attr-defined]

    start(consume_plain(own_bus, durable="run-1", subjects=[SUBJECT], handler=handler))
    await own_bus.publish(SUBJECT, epoch(1))

    async def has(number: int) -> bool:
        return number in got

    await until(lambda: has(1))
    await until(lambda: _acknowledged(own_bus, "run-1-facts"))
    server.kill()
    server.start()
    event = epoch(2)

    async def published() -> bool:
        try:
            await own_bus.publish(SUBJECT, event)
        except Unavailable:
            return False
        return True

    await until(published, 20)
    await until(lambda: has(2), 20)
    assert got == [1, 2]


def _postgres(stack: Endpoints) -> int:
    found = state.read(layout.Layout(stack.data_dir).state)
    assert found is not None
    return next(child.pid for child in found.children if child.name == "postgres" and child.pid)


async def _acknowledged(bus: Bus, consumer: str) -> bool:
    return (await bus.jetstream.consumer_info(FACTS.name, consumer)).num_ack_pending == 0


async def _drained(spool: Spool) -> bool:
    return spool.pending == 0


async def _count(pool: asyncpg.Pool, number: int) -> bool:
    return len(await effects(pool)) >= number


async def _sent(pool: asyncpg.Pool, number: int) -> bool:
    return bool(await pool.fetchval("SELECT count(*) = $1 FROM bus.outbox WHERE sent IS NOT NULL", number))
