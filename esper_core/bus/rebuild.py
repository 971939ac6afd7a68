"""Fill streams again whose contents were wiped or damaged.

PostgreSQL is the system of record and JetStream can be lost: the outbox keeps what it sent, and where a stream turns
out to be another incarnation than the one it was sent to, or to lack what it acknowledged, the rows of the stream's
age are marked unsent, so that the relay publishes them again, in order and under the same ids. Consumers drop through
their inbox what they have acted on already.

Does not know about events that training processes drained from their spools: those send them again themselves.
"""

from __future__ import annotations

from nats.js.api import StreamInfo

from esper_core import log
from esper_core.bus.bus import Bus
from esper_core.bus.database import Pool
from esper_core.bus.mark import MARGIN, Mark, damage, generation_id
from esper_core.bus.subjects import STREAMS, Stream

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
    last = await pool.fetchrow(
        "SELECT event_id, generation, stream_sequence, sent FROM bus.outbox"
        " WHERE stream = $1 AND stream_sequence IS NOT NULL AND sent IS NOT NULL ORDER BY stream_sequence DESC LIMIT 1",
        stream.name,
    )
    mark = Mark(known["created"])
    if last:
        message_id = generation_id(last["event_id"], last["generation"])
        mark = Mark(known["created"], last["stream_sequence"], message_id, last["sent"])
    if why := await damage(bus, stream, info, mark):
        return why
    if stream.shed:
        return ""
    if (info.state.num_deleted or 0) > known["deleted"]:
        return "messages within it are gone"
    lost = await pool.fetchval(
        "SELECT count(*) FROM bus.outbox WHERE stream = $1 AND stream_sequence < $2"
        " AND sent > now() - make_interval(secs => $3)",
        stream.name,
        info.state.first_seq,
        stream.max_age - MARGIN,
    )
    return "its beginning is gone" if lost else ""


async def _unsend(pool: Pool, stream: Stream) -> int:
    status = await pool.execute(
        "UPDATE bus.outbox SET sent = NULL, stream_sequence = NULL, generation = generation + 1"
        " WHERE stream = $1 AND sent > now() - make_interval(secs => $2)",
        stream.name,
        stream.max_age,
    )
    return int(status.rpartition(" ")[2])
