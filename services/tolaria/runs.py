"""The platform's book of runs: a projection of what training processes tell, and the questions asked of it.

Every statement tolerates facts that come twice, late or out of order (see ``schema/0001_runs.sql``). Knows neither grpc
nor the wire: descriptions and figures are plain mappings in the wire's own JSON form.
"""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import dataclass
from typing import Any

import asyncpg

from esper_core.bus.database import Connection, Pool
from esper_core.errors import NotFound, nearest
from services import page
from services.fact import Fact

Json = dict[str, Any]

RUNNING = 1
LATEST = "latest"
_ORDER = "SELECT pg_advisory_xact_lock(hashtext('tolaria.epochs'))"


@dataclass(frozen=True)
class RunRow:
    """A run as it stands; ``latest`` is ``None`` before its first epoch."""

    run_id: str
    ordinal: int
    state: int
    description: Json
    outcome: Json
    latest: Json | None
    started: dt.datetime
    updated: dt.datetime

    @property
    def ended(self) -> bool:
        return self.state != RUNNING


_SELECT = """
SELECT r.run_id, r.ordinal, r.state, r.description, r.outcome, r.started, r.updated, h.metrics AS latest
FROM tolaria.runs r
LEFT JOIN LATERAL (
    SELECT metrics FROM tolaria.history h WHERE h.run_id = r.run_id ORDER BY h.sequence DESC LIMIT 1
) h ON true
WHERE r.description IS NOT NULL
"""


class Runs:
    """The book. Writers take the connection whose transaction also notes the event; readers take the pool."""

    def __init__(self, database: Pool) -> None:
        self._database = database

    async def register(self, connection: Connection, fact: Fact, epoch: int, description: Json) -> None:
        """Note that a run has begun, or come back at ``epoch``."""
        await connection.execute(
            "INSERT INTO tolaria.registrations VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
            fact.run_id,
            fact.sequence,
            epoch,
        )
        await connection.execute(
            """
            INSERT INTO tolaria.runs AS r (run_id, registered, description, started, updated)
            VALUES ($1, $2, $3, $4, $4)
            ON CONFLICT (run_id) DO UPDATE SET
                description = CASE WHEN $2 >= r.registered THEN excluded.description ELSE r.description END,
                registered = greatest(r.registered, excluded.registered),
                started = least(r.started, excluded.started),
                updated = greatest(r.updated, excluded.updated)
            """,
            fact.run_id,
            fact.sequence,
            json.dumps(description),
            fact.created,
        )

    async def complete_epoch(self, connection: Connection, fact: Fact, epoch: int, metrics: Json) -> None:
        """Note an epoch's figures."""
        await connection.execute(_ORDER)
        await connection.execute(
            """
            INSERT INTO tolaria.epochs (event_id, run_id, sequence, epoch, metrics) VALUES ($1, $2, $3, $4, $5)
            ON CONFLICT DO NOTHING
            """,
            fact.event_id,
            fact.run_id,
            fact.sequence,
            epoch,
            json.dumps(metrics),
        )
        await self._touch(connection, fact)

    async def end(self, connection: Connection, fact: Fact, state: int, outcome: Json) -> None:
        """Note how a run ended; ``outcome`` holds results, reason and report."""
        await self._touch(connection, fact)
        await connection.execute(
            """
            UPDATE tolaria.runs SET ended = $2, end_state = $3, outcome = $4 WHERE run_id = $1 AND ended < $2
            """,
            fact.run_id,
            fact.sequence,
            state,
            json.dumps(outcome),
        )

    async def _touch(self, connection: Connection, fact: Fact) -> None:
        await connection.execute(
            """
            INSERT INTO tolaria.runs AS r (run_id, updated) VALUES ($1, $2)
            ON CONFLICT (run_id) DO UPDATE SET updated = greatest(r.updated, excluded.updated)
            """,
            fact.run_id,
            fact.created,
        )

    async def get(self, run_id: str) -> RunRow:
        """The run of that name, or the newest for ``latest``.

        Raises:
            NotFound: with the nearest known name.
        """
        if run_id == LATEST:
            row = await self._database.fetchrow(f"{_SELECT} ORDER BY r.ordinal DESC LIMIT 1")
            if row is None:
                raise NotFound("there is no run yet", hint="start one with `esperctl train RUN.yaml`")
            return _run(row)
        row = await self._database.fetchrow(f"{_SELECT} AND r.run_id = $1", run_id)
        if row is None:
            known = await self._database.fetch("SELECT run_id FROM tolaria.runs ORDER BY ordinal DESC LIMIT 50")
            raise NotFound(f"there is no run {run_id!r}", hint=nearest(run_id, [other["run_id"] for other in known]))
        return _run(row)

    async def newest(self, *, state: int, size: int, token: str) -> tuple[list[RunRow], str]:
        """Runs, newest first, in ``state`` (0: any), and the token of the page after; empty on the last.

        Raises:
            InvalidInput: the token is none of ours.
        """
        rows = await self._database.fetch(
            f"{_SELECT} AND ($1 = 0 OR r.state = $1) AND ($2 = 0 OR r.ordinal < $2) ORDER BY r.ordinal DESC LIMIT $3",
            state,
            page.before(token),
            size + 1,
        )
        kept, following = page.cut(rows, size, lambda row: int(row["ordinal"]))
        return [_run(row) for row in kept], following

    async def epochs_after(self, run_id: str, ordinal: int) -> tuple[list[Json], int]:
        """Figures that came in after ``ordinal`` (at most 1000), in epoch order, and the ordinal to go on from."""
        rows = await self._database.fetch(
            """
            SELECT ordinal, sequence, metrics FROM tolaria.history
            WHERE run_id = $1 AND ordinal > $2 ORDER BY ordinal LIMIT 1000
            """,
            run_id,
            ordinal,
        )
        figures = [json.loads(row["metrics"]) for row in sorted(rows, key=lambda row: int(row["sequence"]))]
        return figures, rows[-1]["ordinal"] if rows else ordinal


def _run(row: asyncpg.Record) -> RunRow:
    return RunRow(
        run_id=row["run_id"],
        ordinal=row["ordinal"],
        state=row["state"],
        description=json.loads(row["description"]),
        outcome=json.loads(row["outcome"]) if row["outcome"] else {},
        latest=json.loads(row["latest"]) if row["latest"] else None,
        started=row["started"],
        updated=row["updated"],
    )
