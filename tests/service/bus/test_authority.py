"""Principal × subject, on the wire: the broker itself refuses whoever has no business there. Generated from the table."""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest
from nats.aio.msg import Msg
from nats.js.api import ConsumerConfig

from esper_core.bus.bus import Bus
from esper_core.bus.envelope import Event
from esper_core.bus.inbox import consume_plain
from esper_core.bus.login import seed_file
from esper_core.bus.nkey import new_seed
from esper_core.bus.policy import KEEPER, ORDERS, PRINCIPALS, READERS, SPOOLED, WATCHERS, Reader, inbox
from esper_core.bus.pull import DONE, Verdict, pull
from esper_core.bus.subjects import (
    ADVISORY,
    CONTROL,
    DEAD,
    FACTS,
    KASMINA_COMMANDS,
    STREAMS,
    SUBJECTS,
    Stream,
    Subject,
    consumer_of,
)
from esper_core.config import Endpoints
from esper_core.errors import Corrupt, Forbidden, NotFound, Unauthenticated
from tests.service.bus.conftest import Start, until
from tests.service.bus.events import SUBJECT

EVERYONE = sorted(PRINCIPALS)
SUBORDINATE = sorted(PRINCIPALS - {KEEPER})
RUN = "authority"


@pytest.fixture
async def crew(stack: Endpoints, bus: Bus) -> AsyncIterator[dict[str, Bus]]:
    """Every principal's own connection, to empty streams; what is refused is given up early."""
    found = {name: await Bus.join(stack, name) for name in EVERYONE}
    for one in found.values():
        one.jetstream = one.client.jetstream(timeout=1)
    yield found
    for one in found.values():
        await one.close()


def full(subject: Subject) -> str:
    return subject.of(RUN) if subject.per_run else subject.of()


async def refused(bus: Bus, subjects: Iterable[str], *, listening: bool = False) -> set[str]:
    """On which of ``subjects`` the broker refuses this principal to publish (or to subscribe), by its own word."""
    asked = set(subjects)
    for subject in asked:
        if listening:
            await bus.client.subscribe(subject)
        else:
            await bus.client.publish(subject, b"")
    last = f"nobody.may.{secrets.token_hex(8)}"  # its refusal comes after all others

    async def answered() -> bool:
        return f'publish to "{last}"' in bus.refused

    await bus.client.publish(last, b"")
    await until(answered)
    verb = "subscription" if listening else "publish"
    return {subject for subject in asked if f'{verb} to "{subject.lower()}"' in bus.refused}


async def kept(bus: Bus, stream: Stream) -> list[tuple[str, bytes]]:
    """What lies in a stream."""
    state = (await bus.stream_info(stream)).state
    messages = [await bus.jetstream.get_msg(stream.name, n) for n in range(state.first_seq, state.last_seq + 1)]
    return [(message.subject or "", message.data or b"") for message in messages]


async def test_each_principal_publishes_exactly_where_the_table_lets_it(bus: Bus, crew: dict[str, Bus]) -> None:
    """Oona carries everybody's events, a training process publishes its own; nobody else is heard on any subject."""

    async def tried(who: str, subject: Subject) -> str:
        data = f"{who} on {subject.name}".encode()
        try:
            await crew[who].publish_bytes(full(subject), data, message_id=secrets.token_hex(8))
        except Forbidden as error:
            return error.message
        return ""

    pairs = [(who, subject) for who in EVERYONE for subject in SUBJECTS]
    said = await asyncio.gather(*(tried(*pair) for pair in pairs))
    lie = [entry for stream in STREAMS for entry in await kept(bus, stream)]
    may = {(w, s.name) for w, s in pairs if w == "oona" or (w == "tolaria" and "tolaria" in s.producers)}
    assert {(who, subject.name) for (who, subject), why in zip(pairs, said, strict=True) if not why} == may
    assert all(full(subject) in why for (_, subject), why in zip(pairs, said, strict=True) if why)
    assert sorted(data.decode() for _, data in lie) == sorted(f"{who} on {name}" for who, name in may)


@pytest.mark.parametrize("who", SUBORDINATE)
async def test_nobody_but_oona_changes_streams_or_reads_past_its_consumers(who: str, crew: dict[str, Bus]) -> None:
    """But a spool looks up its own last fact, to see whether the stream still holds it."""
    asked = {f"{ADVISORY}{FACTS.name}.nissa-facts"}
    asked |= {f"$JS.API.{ask}" for ask in ("STREAM.CREATE.OTHER", "STREAM.LIST", "STREAM.NAMES", "INFO")}
    for stream in STREAMS:
        changes = ("CREATE", "UPDATE", "DELETE", "PURGE", "SNAPSHOT", "RESTORE", "MSG.DELETE", "MSG.GET")
        asked |= {f"$JS.API.STREAM.{ask}.{stream.name}" for ask in changes}
        asked |= {f"$JS.API.{ask}.{stream.name}" for ask in ("DIRECT.GET", "CONSUMER.LIST", "CONSUMER.NAMES")}
    let_in = {f"$JS.API.STREAM.MSG.GET.{FACTS.name}"} if who == "tolaria" else set()
    assert asked - await refused(crew[who], asked) == let_in


def requests(reader: Reader) -> Iterable[str]:
    """How one would take another's messages away: fetch them, acknowledge them, make the consumer anew, or drop it."""
    for stream, consumer in reader.consumers:
        place = f"{stream.name}.{consumer}"
        yield from (f"$JS.API.CONSUMER.{ask}.{place}" for ask in ("MSG.NEXT", "CREATE", "DURABLE.CREATE", "DELETE"))
        yield from (f"$JS.API.CONSUMER.CREATE.{place}.{full(subject)}" for subject in reader.subjects)
        yield f"$JS.ACK.{place}.1.1.1.1.0"
    yield f"esper.dead.{reader.durable}"


@pytest.mark.parametrize("who", SUBORDINATE)
async def test_nobody_steals_anothers_messages_or_buries_letters_in_its_name(who: str, crew: dict[str, Bus]) -> None:
    readers = [reader for owner in READERS for reader in READERS[owner] if owner != who]
    if who != "tolaria":
        readers.append(Reader(f"tolaria-{RUN}", ORDERS))
    asked = {subject for reader in readers for subject in requests(reader)}
    assert asked - await refused(crew[who], asked) == set()


async def test_everyone_reads_what_the_table_says_and_acknowledges_it(
    bus: Bus, crew: dict[str, Bus], start: Start
) -> None:
    got: dict[str, set[str]] = {}

    def begin(who: str, durable: str, subjects: Iterable[str], stream: Stream) -> None:
        name = consumer_of(durable, stream)
        got[name] = set()

        async def take(message: Msg) -> Verdict:
            got[name].add(message.subject)
            return DONE

        start(pull(crew[who], stream=stream, durable=name, filters=list(subjects), take=take))

    expected: dict[str, set[str]] = {}
    for who, readers in READERS.items():
        for reader in readers:
            for stream, name in reader.consumers:
                read = [subject for subject in reader.subjects if subject.stream == stream]
                begin(who, reader.durable, (subject.all for subject in read), stream)
                expected[name] = {full(subject) for subject in read}
            await crew[who].publish_bytes(f"esper.dead.{reader.durable}", b"letter", message_id=reader.durable)
    begin(SPOOLED, f"{SPOOLED}-{RUN}", map(full, ORDERS), CONTROL)
    expected[consumer_of(f"{SPOOLED}-{RUN}", CONTROL)] = set(map(full, ORDERS))
    for letter in (f"{SPOOLED}-{RUN}", "spool"):
        await crew[SPOOLED].publish_bytes(f"esper.dead.{letter}", b"letter", message_id=letter)

    for subject in SUBJECTS:
        await crew[KEEPER].publish_bytes(full(subject), b"told", message_id=subject.name)

    async def settled() -> bool:
        infos = [info for stream in STREAMS for info in await bus.jetstream.consumers_info(stream.name)]
        return got == expected and not any(info.num_ack_pending or info.num_pending for info in infos)

    await until(settled)
    assert (await bus.stream_info(DEAD)).state.messages == sum(map(len, READERS.values())) + 2


@pytest.mark.parametrize("who", EVERYONE)
async def test_nobody_reaches_into_anothers_inbox(who: str, crew: dict[str, Bus]) -> None:
    """And nobody listens in on what is said, but for those whom the table lets look on."""
    foreign = {f"{inbox(name)}.word" for name in PRINCIPALS - {who}}
    assert await refused(crew[who], foreign) == foreign
    wide = {f"{inbox(name)}.>" for name in PRINCIPALS - {who}} | {">", "_INBOX.>", "*.*"}
    said = {subject.all for subject in SUBJECTS}
    let_in = said if who == "oona" else {subject.all for subject in WATCHERS.get(who, ())}
    assert (wide | said) - await refused(crew[who], wide | said, listening=True) == let_in


async def test_an_answer_that_is_sent_astray_passes_for_nothing_that_was_said(
    bus: Bus, crew: dict[str, Bus], start: Start
) -> None:
    """NATS sends an answer wherever one asks, even into a stream: what was published keeps its own subject there."""
    order, got = KASMINA_COMMANDS.of(RUN), list[str]()
    stream, consumer = READERS["tolaria"][0].consumers[0]
    await crew["tolaria"].publish_bytes(SUBJECT, b"planted", message_id="planted")
    config = ConsumerConfig(durable_name=consumer, name=consumer, filter_subjects=[SUBJECT])
    await crew["tolaria"].jetstream.add_consumer(stream.name, config)
    await crew["tolaria"].client.publish(f"$JS.API.CONSUMER.MSG.NEXT.{stream.name}.{consumer}", b"1", reply=order)

    async def arrived() -> bool:
        return await kept(bus, CONTROL) == [(SUBJECT, b"planted")]

    async def take(message: Msg) -> Verdict:
        got.append(message.subject)
        return DONE

    async def heard() -> bool:
        return bool(got)

    await until(arrived)
    await crew["oona"].publish_bytes(order, b"a real one", message_id="order")
    start(pull(crew["nissa"], stream=CONTROL, durable="nissa-control", filters=[KASMINA_COMMANDS.all], take=take))
    await until(heard)
    assert got == [order]


async def test_only_the_right_key_opens(stack: Endpoints, tmp_path: Path) -> None:
    assert stack.nats_keys_dir is not None
    shutil.copytree(stack.nats_keys_dir, tmp_path, dirs_exist_ok=True)
    here = stack.model_copy(update={"nats_keys_dir": tmp_path})
    await (await Bus.join(here, "karn")).close()
    mine = seed_file(tmp_path, "karn")
    seed = mine.read_text()

    mine.write_text(new_seed())
    with pytest.raises(Unauthenticated, match="does not know the key of karn") as caught:
        await Bus.join(here, "karn", timeout=5)
    assert "esperctl up" in caught.value.hint
    assert mine.read_text() not in caught.value.message + caught.value.hint

    mine.write_text(seed[:20] + ("A" if seed[20] != "A" else "B") + seed[21:])
    with pytest.raises(Corrupt, match="altered"):
        await Bus.join(here, "karn")
    mine.unlink()
    for nobody in ("karn", "operator"):
        with pytest.raises(NotFound, match=nobody):
            await Bus.join(here, nobody)


async def test_who_has_no_such_consumer_is_told_so_and_does_not_wait_for_ever(crew: dict[str, Bus]) -> None:
    work = consume_plain(crew["karn"], durable="kasmina-seeds", subjects=[SUBJECT], handler=_never)
    with pytest.raises(ExceptionGroup) as caught:
        await asyncio.wait_for(work, 5)
    assert caught.group_contains(Forbidden, match="kasmina-seeds")


async def _never(event: Event) -> None:
    raise AssertionError(event)
