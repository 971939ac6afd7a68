"""One durable pull consumer, fetched from for ever.

Binds (and, after a wipe, makes again) the durable, fetches message by message, keeps the server informed while one is
worked on, and acknowledges or asks for another delivery as it is told. Knows nothing of events or databases.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

import nats.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from esper_core import log
from esper_core.bus.bus import Bus
from esper_core.bus.patience import heed_cancellation, persist
from esper_core.bus.subjects import Stream
from esper_core.errors import Conflict

ACK_WAIT = 5.0  # seconds after which the server believes that the consumer died
FETCH = 2.0  # seconds one fetch waits; one in flight is lost with the server, so short ones
MAX_DELIVER = 12  # deliveries after which the server itself gives a message up, with an advisory
UNORDERED = 256  # messages out at once when their order does not matter


_log = log.get("bus")


@dataclass(frozen=True)
class Verdict:
    """What becomes of a delivery: done with (``again`` is None), or delivered again after ``again`` seconds."""

    again: float | None = None


DONE = Verdict()
Take = Callable[[Msg], Awaitable[Verdict]]


async def pull(
    bus: Bus,
    *,
    stream: Stream,
    durable: str,
    filters: Sequence[str],
    take: Take,
    ordered: bool = True,
    forget_after: float | None = None,
) -> None:
    """Hand every message of ``stream`` that matches ``filters`` to ``take``, at least once, for ever.

    Args:
        durable: names the consumer; processes that use the same one share the work.
        take: decides on a delivery; what it raises from ``patience.AWAY`` ends the session, so that the message comes
            again; anything else propagates.
        ordered: one message out at a time over all processes, so that a retried one stays in front of its successors.
        forget_after: seconds without a fetch after which the server may drop the consumer; None: never.

    Raises:
        Conflict: the server keeps other consumer settings than asked for.
        Forbidden: this principal has no such consumer.
    """
    config = ConsumerConfig(
        durable_name=durable,
        name=durable,
        deliver_policy=DeliverPolicy.ALL,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=ACK_WAIT,
        max_deliver=MAX_DELIVER,
        max_ack_pending=1 if ordered else UNORDERED,
        filter_subjects=sorted(filters),
        inactive_threshold=forget_after,
    )
    await persist(partial(_session, bus, stream, config, take), durable)


async def _session(bus: Bus, stream: Stream, config: ConsumerConfig, take: Take) -> None:
    subscription = await _bind(bus, stream, config)
    try:
        while True:
            heed_cancellation()
            try:
                messages = await subscription.fetch(1, timeout=FETCH)
            except nats.errors.TimeoutError:
                continue
            for message in messages:
                async with _kept_alive(message):
                    verdict = await take(message)
                if verdict.again is None:
                    await _acknowledge(message)
                else:
                    await message.nak(delay=verdict.again)
    finally:
        with contextlib.suppress(nats.errors.Error, OSError):
            await subscription.unsubscribe()


async def _acknowledge(message: Msg) -> None:
    """Acknowledge until the server has heard it: one that is lost would hold the line up for ``ACK_WAIT``."""
    for _ in range(3):
        with contextlib.suppress(nats.errors.TimeoutError):
            await message.ack_sync(timeout=ACK_WAIT / 5)
            return
    _log.warning("bus.ack_lost", subject=message.subject)


async def _bind(bus: Bus, stream: Stream, config: ConsumerConfig) -> JetStreamContext.PullSubscription:
    name = str(config.durable_name)
    bus.check_connected()
    try:
        kept = (await bus.jetstream.add_consumer(stream.name, config)).config
        for field in ("ack_policy", "ack_wait", "max_deliver", "max_ack_pending", "deliver_policy"):
            if getattr(kept, field) != getattr(config, field):
                raise Conflict(
                    f"consumer {name}: asked for {field}={getattr(config, field)!r}, the server keeps"
                    f" {getattr(kept, field)!r}",
                    hint="use nats-server 2.10.23 or newer",
                )
        caught = sorted(kept.filter_subjects or [kept.filter_subject or ""])
        if caught != config.filter_subjects:
            raise Conflict(f"consumer {name}: asked for {config.filter_subjects}, the server filters {caught}")
        return await bus.jetstream.pull_subscribe_bind(name, stream.name)
    except (nats.errors.Error, TimeoutError, OSError) as error:
        asked = f"$JS.API.CONSUMER.CREATE.{stream.name}.{name}"
        raise bus.failure(error, f"binding consumer {name}", asked) from error


@contextlib.asynccontextmanager
async def _kept_alive(message: Msg) -> AsyncIterator[None]:
    """Tell the server every so often that ``message`` is being worked on."""

    async def beat() -> None:
        while True:
            await asyncio.sleep(ACK_WAIT / 3)
            with contextlib.suppress(nats.errors.Error, OSError):
                await message.in_progress()

    task = asyncio.create_task(beat())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
