"""The journal: everything that was said on the bus, for a while, and every run's figures, for good.

Knows neither grpc nor the wire; an event is its envelope's bytes beside the payload as JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg

from esper_core.bus.database import Connection, Pool
from esper_core.errors import NotFound, nearest
from services import page

Json = dict[str, Any]

_ORDER = "SELECT pg_advisory_xact_lock(hashtext('nissa.events'))"


@dataclass(frozen=True)
class Entry:
    """One event; ``subject`` without prefix, ``envelope`` serialised."""

    event_id: str
    subject: str
    type: str
    run_id: str
    envelope: bytes
    payload: str
    ordinal: int = 0


class Journal:
    """Writers take the connection whose transaction also notes the event; readers take the pool."""

    def __init__(self, database: Pool) -> None:
        self._database = database

    async def write(self, connection: Connection, entry: Entry) -> None:
        """Append an event."""
        await connection.execute(_ORDER)
        await connection.execute(
            """
            INSERT INTO nissa.events (event_id, subject, type, run_id, envelope, payload)
            VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING
            """,
            entry.event_id,
            entry.subject,
            entry.type,
            entry.run_id,
            entry.envelope,
            entry.payload,
        )

    async def begin(self, connection: Connection, run_id: str, sequence: int, epoch: int) -> None:
        """Note that a run has begun, or come back at ``epoch``."""
        await connection.execute(
            "INSERT INTO nissa.registrations VALUES ($1, $2, $3) ON CONFLICT DO NOTHING", run_id, sequence, epoch
        )
        await connection.execute(
            """
            INSERT INTO nissa.runs AS r (run_id, registered) VALUES ($1, $2)
            ON CONFLICT (run_id) DO UPDATE SET registered = greatest(r.registered, excluded.registered)
            """,
            run_id,
            sequence,
        )

    async def end(self, connection: Connection, run_id: str, sequence: int, state: int) -> None:
        """Note how a run ended."""
        await connection.execute(
            """
            INSERT INTO nissa.runs AS r (run_id, ended, end_state) VALUES ($1, $2, $3)
            ON CONFLICT (run_id) DO UPDATE SET ended = excluded.ended, end_state = excluded.end_state
            WHERE r.ended < excluded.ended
            """,
            run_id,
            sequence,
            state,
        )

    async def figures(
        self, connection: Connection, event_id: str, run_id: str, sequence: int, epoch: int, metrics: Json
    ) -> None:
        """Note an epoch's figures."""
        await connection.execute("INSERT INTO nissa.runs (run_id) VALUES ($1) ON CONFLICT DO NOTHING", run_id)
        await connection.execute(
            """
            INSERT INTO nissa.epochs (event_id, run_id, sequence, epoch, metrics) VALUES ($1, $2, $3, $4, $5)
            ON CONFLICT DO NOTHING
            """,
            event_id,
            run_id,
            sequence,
            epoch,
            json.dumps(metrics),
        )

    async def newest(self, *, run_id: str, kind: str, size: int, token: str) -> tuple[list[Entry], str]:
        """Events (of one run, of one type; '' for any), newest first, and the token of the next page.

        Raises:
            InvalidInput: the token is none of ours.
        """
        rows = await self._database.fetch(
            """
            SELECT * FROM nissa.events
            WHERE ($1 = '' OR run_id = $1) AND ($2 = '' OR type = $2) AND ($3 = 0 OR ordinal < $3)
            ORDER BY ordinal DESC LIMIT $4
            """,
            run_id,
            kind,
            page.before(token),
            size + 1,
        )
        kept, following = page.cut(rows, size, lambda row: int(row["ordinal"]))
        return [_entry(row) for row in kept], following

    async def after(self, ordinal: int, *, run_id: str = "", kind: str = "", size: int = 500) -> list[Entry]:
        """At most ``size`` events that came in after ``ordinal``, oldest first."""
        rows = await self._database.fetch(
            """
            SELECT * FROM nissa.events
            WHERE ordinal > $1 AND ($2 = '' OR run_id = $2) AND ($3 = '' OR type = $3) ORDER BY ordinal LIMIT $4
            """,
            ordinal,
            run_id,
            kind,
            size,
        )
        return [_entry(row) for row in rows]

    async def last_ordinal(self) -> int:
        """Of the newest event; 0 when there is none."""
        return int(await self._database.fetchval("SELECT coalesce(max(ordinal), 0) FROM nissa.events"))

    async def history(self, run_id: str) -> Sequence[Json]:
        """Every epoch's surviving figures, oldest first.

        Raises:
            NotFound: unknown run, with the nearest name.
        """
        rows = await self._database.fetch(
            "SELECT metrics FROM nissa.history WHERE run_id = $1 ORDER BY sequence", run_id
        )
        if not rows and not await self._database.fetchval("SELECT 1 FROM nissa.runs WHERE run_id = $1", run_id):
            known = await self._database.fetch("SELECT run_id FROM nissa.runs ORDER BY ordinal DESC LIMIT 50")
            raise NotFound(f"there is no run {run_id!r}", hint=nearest(run_id, [str(row["run_id"]) for row in known]))
        return [json.loads(row["metrics"]) for row in rows]

    async def dead_letters(self, size: int) -> list[tuple[str, str, str, bytes, str]]:
        """(consumer, subject, reason, data, RFC 3339 time) of what nobody could take, newest first."""
        rows = await self._database.fetch(
            "SELECT consumer, subject, reason, data, created FROM bus.dead_letters ORDER BY position DESC LIMIT $1",
            size,
        )
        return [
            (row["consumer"], row["subject"], row["reason"], row["data"], row["created"].isoformat()) for row in rows
        ]

    async def forget(self, *, keep: int, days: float) -> int:
        """Remove all but the newest ``keep`` events, and those older than ``days``; returns how many."""
        done = await self._database.execute(
            """
            DELETE FROM nissa.events
            WHERE ordinal <= (SELECT coalesce(max(ordinal), 0) FROM nissa.events) - $1
               OR created < now() - make_interval(secs => $2)
            """,
            keep,
            days * 86_400,
        )
        return int(done.rpartition(" ")[2])


def _entry(row: asyncpg.Record) -> Entry:
    return Entry(
        event_id=row["event_id"],
        subject=row["subject"],
        type=row["type"],
        run_id=row["run_id"],
        envelope=row["envelope"],
        payload=row["payload"],
        ordinal=row["ordinal"],
    )
