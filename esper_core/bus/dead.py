"""Dead letters: messages that no consumer could take, with the reason.

Whoever gives a message up publishes it on the dead-letter stream and, where it has a database, writes the row at
once; ``collect`` writes the rows for those who have none, and for messages whose consumers died of them so often that
JetStream itself gave up. A letter is named by the digest of consumer, subject and data: burying twice is burying once.
"""

from __future__ import annotations

import json

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg

from esper_core import log
from esper_core.bus.bus import Bus, translated
from esper_core.bus.database import Pool
from esper_core.bus.pull import DONE, Verdict, pull
from esper_core.bus.subjects import ADVISORY, DEAD, MAX_MESSAGE, PREFIX
from esper_core.errors import Conflict, NotFound
from esper_core.ids import new_id, sha256

_KEPT = MAX_MESSAGE  # bytes kept of a message; the rest of a giant is of no use to anyone
_log = log.get("bus")


async def bury(
    bus: Bus, pool: Pool | None, *, consumer: str, subject: str, data: bytes, reason: str, deliveries: int = 1
) -> None:
    """Give a message up.

    Args:
        bus, pool: where to; without a pool, Oona writes the row.
        consumer: who could not take it.
        subject, data: the message.
        reason: why, in words for people; one line of it is kept.
        deliveries: how often it was tried.

    Raises:
        Unavailable: nothing was kept for certain; try again.
    """
    letter = sha256(b"\0".join((consumer.encode(), subject.encode(), data)))
    line = " ".join(reason.split())[:500]
    _log.error(
        "bus.dead_letter", consumer=consumer, subject=subject, reason=line, deliveries=deliveries, bytes=len(data)
    )
    truncated, data = len(data) > _KEPT, data[:_KEPT]
    if pool is not None:
        await _record(pool, letter, consumer, subject, line, deliveries, data, truncated)
    headers = {
        "Esper-Letter": letter,
        "Esper-Consumer": consumer,
        "Esper-Subject": subject,
        "Esper-Reason": line.encode("ascii", "replace").decode(),
        "Esper-Deliveries": str(deliveries),
        "Esper-Truncated": str(int(truncated)),
    }
    await bus.publish_bytes(f"{PREFIX}dead.{consumer}", data, message_id=letter, headers=headers)


async def collect(pool: Pool, bus: Bus) -> None:
    """Write a row for everything that arrives on the dead-letter stream, for ever."""

    async def take(message: Msg) -> Verdict:
        if message.subject.startswith(ADVISORY):
            await _collect_advisory(pool, bus, message)
        else:
            await _collect_letter(pool, message)
        return DONE

    await pull(bus, stream=DEAD, durable="oona-dead", filters=DEAD.subjects, take=take)


async def replay(pool: Pool, bus: Bus, dead_letter_id: str) -> None:
    """Publish a dead letter on its subject once more; those who acted on it already drop it by its event id.

    Raises:
        NotFound: no such letter.
        Conflict: only its beginning was kept.
        Unavailable: not published.
    """
    row = await pool.fetchrow(
        "SELECT subject, data, truncated FROM bus.dead_letters WHERE dead_letter_id = $1", dead_letter_id
    )
    if row is None:
        raise NotFound(f"no dead letter {dead_letter_id}")
    if row["truncated"]:
        raise Conflict(f"dead letter {dead_letter_id} was too large to be kept whole", hint="publish it anew")
    await bus.publish_bytes(row["subject"], row["data"], message_id=new_id())
    await pool.execute("UPDATE bus.dead_letters SET replayed = now() WHERE dead_letter_id = $1", dead_letter_id)


async def _record(
    pool: Pool, letter: str, consumer: str, subject: str, reason: str, deliveries: int, data: bytes, truncated: bool
) -> None:
    await pool.execute(
        "INSERT INTO bus.dead_letters (dead_letter_id, consumer, subject, reason, deliveries, data, truncated)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (dead_letter_id) DO NOTHING",
        letter,
        consumer,
        subject,
        reason.replace("\0", "?"),
        deliveries,
        data,
        truncated,
    )


async def _collect_letter(pool: Pool, message: Msg) -> None:
    headers = message.headers or {}
    subject = headers.get("Esper-Subject", message.subject)
    consumer = headers.get("Esper-Consumer", "unknown")
    deliveries = headers.get("Esper-Deliveries", "")
    await _record(
        pool,
        headers.get("Esper-Letter") or sha256(b"\0".join((consumer.encode(), subject.encode(), message.data))),
        consumer,
        subject,
        headers.get("Esper-Reason", "no reason was given"),
        int(deliveries) if deliveries.isdecimal() else 1,
        message.data,
        headers.get("Esper-Truncated") == "1",
    )


async def _collect_advisory(pool: Pool, bus: Bus, advisory: Msg) -> None:
    try:
        said = json.loads(advisory.data)
        stream, consumer = str(said["stream"]), str(said["consumer"])
        sequence, deliveries = int(said["stream_seq"]), int(said["deliveries"])
    except (ValueError, KeyError, TypeError):
        _log.error("bus.advisory_unreadable", subject=advisory.subject)
        return
    reason = f"delivered {deliveries} times and never acknowledged: the consumer died or hung each time"
    try:
        lost = await bus.jetstream.get_msg(stream, sequence)
    except nats.js.errors.NotFoundError:
        subject, data = f"{stream}#{sequence}", b""
        reason += "; the stream no longer keeps it"
    except (nats.errors.Error, TimeoutError, OSError) as error:
        raise translated(error, f"reading message {sequence} of {stream}") from error
    else:
        subject, data = lost.subject or "", lost.data or b""
    await bury(bus, pool, consumer=consumer, subject=subject, data=data, reason=reason, deliveries=deliveries)
