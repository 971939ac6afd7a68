"""Fill streams again whose contents were wiped or damaged.

PostgreSQL is the system of record and JetStream can be lost: the outbox keeps what it sent, and where a stream turns
out to be another incarnation than the one it was sent to, or to lack what it acknowledged, the rows of the stream's
age are marked unsent, so that the relay publishes them again, in order and under the same ids. Consumers drop through
their inbox what they have acted on already.

Does not know about events that training processes drained from their spools: those send them again themselves.
"""

from __future__ import annotations

import nats.errors
import nats.js.errors
from nats.js.api import StreamInfo

from esper_core import log
from esper_core.bus.bus import Bus, translated
from esper_core.bus.database import Pool
from esper_core.bus.subjects import STREAMS, Stream

_MARGIN = 3600.0  # seconds by which the server's ageing and our clocks may disagree
_log = log.get("bus")


async def rebuild(pool: Pool, bus: Bus) -> dict[str, int]:
    """Make the streams, and mark for publishing again what a wiped or damaged one has lost.

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
        if why := await _damage(pool, bus, stream, info):
            found[stream.name] = await _unsend(pool, stream)
            _log.error("bus.stream_damaged", stream=stream.name, why=why, events=found[stream.name])
        await pool.execute(
            "INSERT INTO bus.streams (name, created, deleted) VALUES ($1, $2, $3)"
            " ON CONFLICT (name) DO UPDATE SET created = excluded.created, deleted = excluded.deleted",
            stream.name,
            info.created,
            info.state.num_deleted or 0,
        )
    return found


async def _damage(pool: Pool, bus: Bus, stream: Stream, info: StreamInfo) -> str:
    """What is wrong with a stream, in words; empty when nothing is."""
    known = await pool.fetchrow("SELECT created, deleted FROM bus.streams WHERE name = $1", stream.name)
    if known is None:
        return ""
    if known["created"] != info.created:
        return "it was made anew"
    if (info.state.num_deleted or 0) > known["deleted"]:
        return "messages within it are gone"
    kept = stream.max_age - _MARGIN
    lost = await pool.fetchval(
        "SELECT count(*) FROM bus.outbox WHERE stream = $1 AND stream_sequence < $2"
        " AND sent > now() - make_interval(secs => $3)",
        stream.name,
        info.state.first_seq,
        kept,
    )
    if lost and not stream.shed:
        return "its beginning is gone"
    last = await pool.fetchrow(
        "SELECT event_id, stream_sequence FROM bus.outbox WHERE stream = $1 AND stream_sequence IS NOT NULL"
        " AND sent > now() - make_interval(secs => $2) ORDER BY stream_sequence DESC LIMIT 1",
        stream.name,
        kept,
    )
    if last and await _message_id(bus, stream, last["stream_sequence"]) != last["event_id"]:
        return "its end is gone"
    return ""


async def _message_id(bus: Bus, stream: Stream, sequence: int) -> str:
    try:
        message = await bus.jetstream.get_msg(stream.name, sequence)
    except nats.js.errors.NotFoundError:
        return ""
    except (nats.errors.Error, TimeoutError, OSError) as error:
        raise translated(error, f"reading message {sequence} of {stream.name}") from error
    return str((message.headers or {}).get("Nats-Msg-Id", ""))


async def _unsend(pool: Pool, stream: Stream) -> int:
    status = await pool.execute(
        "UPDATE bus.outbox SET sent = NULL, stream_sequence = NULL"
        " WHERE stream = $1 AND sent > now() - make_interval(secs => $2)",
        stream.name,
        stream.max_age,
    )
    return int(status.rpartition(" ")[2])
