"""Consuming: every event has its effect once, and none can stop the line.

``consume`` puts the effect and the note "this consumer has acted on this event" into one transaction; a repeated
delivery finds the note and does nothing. ``consume_plain`` is for processes without a database, ``watch`` for people
looking on. What cannot be read, or fails again and again, becomes a dead letter.
"""

from __future__ import annotations

import asyncio
import collections
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial

import nats.errors
from nats.aio.msg import Msg

from esper_core import log, telemetry
from esper_core.bus.bus import Bus
from esper_core.bus.database import AWAY as DATABASE_AWAY
from esper_core.bus.database import Connection, Pool, lent
from esper_core.bus.dead import bury
from esper_core.bus.envelope import Event, unwrap
from esper_core.bus.patience import AWAY, insist
from esper_core.bus.pull import DONE, Verdict, pull
from esper_core.bus.subjects import Stream, consumer_of, stream_of
from esper_core.errors import EsperError, InvalidInput, Unavailable

Handler = Callable[[Connection, Event], Awaitable[None]]
PlainHandler = Callable[[Event], Awaitable[None]]

BACKOFF = (0.2, 1.0, 3.0, 8.0)  # seconds before each further attempt of a failing handler
PASSING = (*DATABASE_AWAY, Unavailable)  # failures that are not the handler's own
PATIENCE = 600.0  # seconds a handler whose dependency is away is tried within one delivery
REMEMBERED = 4096  # event ids kept against duplicates where there is no inbox
FORGET = 7 * 86_400.0  # seconds after which the server drops the consumer of a process that never came back

_DURABLE = re.compile(r"[a-z0-9][a-z0-9-]{0,99}")
_log = log.get("bus")


async def consume(
    pool: Pool,
    bus: Bus,
    *,
    durable: str,
    subjects: Sequence[str],
    handler: Handler,
    ordered: bool = True,
    backoff: Sequence[float] = BACKOFF,
) -> None:
    """Act on events for ever, each once.

    The handler runs inside the transaction that notes the event as acted on: when it raises, nothing of it stays. It
    is tried ``len(backoff) + 1`` times, then the event becomes a dead letter; while PostgreSQL or a dependency is away
    (``Unavailable``) it is waited for instead.

    Args:
        durable: names this consumer, for ever; processes that use the same one share the work.
        subjects: full subjects or filters, e.g. ``EPOCH_EVENTS.all``; may lie on several streams.
        handler: ``async handler(connection, event)``; all it writes goes through ``connection``.
        ordered: strictly one after the other over all processes; False lets processes work side by side.
        backoff: seconds before each further attempt.

    Raises:
        InvalidInput: a subject that no stream keeps, or ``durable`` is no valid name.
        Conflict: the server keeps other consumer settings than asked for.
    """
    _check_durable(durable)

    async def effect(event: Event) -> None:
        async with lent(pool) as connection, connection.transaction():
            if await _first_time(connection, durable, event.envelope.event_id):
                await handler(connection, event)

    await _consume(bus, pool, durable, subjects, effect, ordered, backoff, None)


async def consume_plain(
    bus: Bus, *, durable: str, subjects: Sequence[str], handler: PlainHandler, backoff: Sequence[float] = BACKOFF
) -> None:
    """Act on events for ever, in order and without a database.

    Repeated deliveries are dropped as long as this process remembers them; over a restart the handler must know by
    itself what it has done (commands have ids). Dead letters reach their table by way of Oona. The server forgets the
    consumer a week after the last fetch.

    Args, Raises: as ``consume``; ``handler`` is ``async handler(event)``.
    """
    _check_durable(durable)
    seen = _Seen()

    async def effect(event: Event) -> None:
        if event.envelope.event_id not in seen:
            await handler(event)
            seen.add(event.envelope.event_id)

    await _consume(bus, None, durable, subjects, effect, True, backoff, FORGET)


async def watch(bus: Bus, subjects: Sequence[str]) -> AsyncIterator[Event]:
    """Events as they are published from now on, for as long as one cares to look.

    A live view: what is published while the connection is away, or faster than one reads, is not seen.

    Raises:
        Unavailable: the connection is closed.
    """
    queue: asyncio.Queue[Msg] = asyncio.Queue(maxsize=REMEMBERED)

    async def arrived(message: Msg) -> None:
        if queue.full():
            queue.get_nowait()
        queue.put_nowait(message)

    seen = _Seen()
    subscriptions = []
    try:
        try:
            for subject in subjects:
                subscriptions.append(await bus.client.subscribe(subject, cb=arrived))  # noqa: PERF401 - undone below
        except nats.errors.Error as error:
            raise Unavailable(f"the event bus cannot be watched: {error}", hint="connect again") from error
        while True:
            message = await queue.get()
            try:
                event = unwrap(message.data, message.subject)
            except InvalidInput as error:
                _log.warning("bus.unreadable", subject=message.subject, error=str(error))
                continue
            if event.envelope.event_id not in seen:
                seen.add(event.envelope.event_id)
                yield event
    finally:
        for subscription in subscriptions:
            if not bus.client.is_closed:
                await subscription.unsubscribe()


async def _consume(
    bus: Bus,
    pool: Pool | None,
    durable: str,
    subjects: Sequence[str],
    effect: PlainHandler,
    ordered: bool,
    backoff: Sequence[float],
    forget_after: float | None,
) -> None:
    """One pull consumer per stream that the subjects lie on; the first that fails for good ends them all."""
    filters: dict[Stream, list[str]] = {}
    for subject in subjects:
        filters.setdefault(stream_of(subject), []).append(subject)

    async def take(message: Msg) -> Verdict:
        return await _take(bus, pool, durable, message, effect, backoff)

    async with asyncio.TaskGroup() as group:
        for stream, wanted in filters.items():
            group.create_task(
                pull(
                    bus,
                    stream=stream,
                    durable=consumer_of(durable, stream),
                    filters=wanted,
                    take=take,
                    ordered=ordered,
                    forget_after=forget_after,
                )
            )


async def _take(
    bus: Bus, pool: Pool | None, durable: str, message: Msg, effect: PlainHandler, backoff: Sequence[float]
) -> Verdict:
    deliveries = message.metadata.num_delivered or 1
    bury_it = partial(bury, bus, pool, consumer=durable, subject=message.subject, data=message.data)
    try:
        event = unwrap(message.data, message.subject)
    except InvalidInput as error:
        await insist(partial(bury_it, reason=str(error), deliveries=deliveries), AWAY)
        return DONE
    try:
        with telemetry.use(event.envelope.traceparent):
            await insist(partial(effect, event), PASSING, PATIENCE)
    except Exception as error:  # noqa: BLE001 - a handler may fail in any way; the line must keep moving
        reason = f"{type(error).__name__}: {error.message if isinstance(error, EsperError) else error}"
        _log.warning(
            "bus.handler_failed",
            consumer=durable,
            event_id=event.envelope.event_id,
            type=event.envelope.type,
            deliveries=deliveries,
            exc_info=error,
        )
        if deliveries <= len(backoff):
            return Verdict(again=backoff[deliveries - 1])
        await insist(partial(bury_it, reason=reason, deliveries=deliveries), AWAY)
    return DONE


def _check_durable(durable: str) -> None:
    if not _DURABLE.fullmatch(durable):
        raise InvalidInput(f"{durable!r} names no consumer", hint="use 1-100 characters of a-z, 0-9 and '-'")


async def _first_time(connection: Connection, durable: str, event_id: str) -> bool:
    status = await connection.execute(
        "INSERT INTO bus.inbox (consumer, event_id) VALUES ($1, $2) ON CONFLICT DO NOTHING", durable, event_id
    )
    return status == "INSERT 0 1"


class _Seen:
    """The last ``REMEMBERED`` event ids."""

    def __init__(self) -> None:
        self._ids: collections.OrderedDict[str, None] = collections.OrderedDict()

    def __contains__(self, event_id: str) -> bool:
        return event_id in self._ids

    def add(self, event_id: str) -> None:
        self._ids[event_id] = None
        if len(self._ids) > REMEMBERED:
            self._ids.popitem(last=False)
