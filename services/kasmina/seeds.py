"""The seeds of all runs, as last told by their training processes: the questions asked of the projection.

Knows neither grpc nor the wire.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg

from esper_core.bus.database import Pool
from esper_core.errors import NotFound, nearest
from esper_core.lifecycle import State

Json = dict[str, Any]

RUNNING = 1
_SELECT = """
SELECT s.*, t.signal->>'health' AS health
FROM kasmina.seeds s
LEFT JOIN LATERAL (
    SELECT signal FROM kasmina.telemetry t
    WHERE t.run_id = s.run_id AND t.slot = s.slot AND t.signal ? 'health'
      AND (t.epoch <= s.epoch OR NOT EXISTS (
        SELECT FROM kasmina.seeds n WHERE n.run_id = s.run_id AND n.slot = s.slot AND n.generation > s.generation))
    ORDER BY t.epoch DESC LIMIT 1
) t ON true
"""
_PRESENT = f"""
(s.state = {State.FOSSILIZED:d} OR NOT EXISTS (
    SELECT FROM kasmina.seeds n WHERE n.run_id = s.run_id AND n.slot = s.slot AND n.generation > s.generation))
"""


@dataclass(frozen=True)
class SeedRow:
    """A seed as it stands; ``health`` is -1 when it was never measured."""

    seed_id: str
    run_id: str
    slot: str
    generation: int
    state: State
    kernel_id: str
    blueprint_name: str
    alpha: float
    epoch: int
    health: float


@dataclass(frozen=True)
class Place:
    """A slot of a run, with the last known state of its latest seed."""

    run_id: str
    slot: str
    interface_id: str
    run_ended: bool
    state: State


class Seeds:
    """Questions about seeds; reads the projection that ``services.kasmina.projection`` writes."""

    def __init__(self, database: Pool) -> None:
        self._database = database

    async def place(self, run_id: str, slot: str) -> Place:
        """Where an order would go.

        Raises:
            NotFound: unknown run or slot, with the nearest name.
        """
        row = await self._database.fetchrow(
            """
            SELECT p.interface_id, r.state AS run_state, s.state
            FROM kasmina.slots p JOIN kasmina.runs r USING (run_id) JOIN kasmina.seeds s USING (run_id, slot)
            WHERE p.run_id = $1 AND p.slot = $2 ORDER BY s.generation DESC LIMIT 1
            """,
            run_id,
            slot,
        )
        if row is None:
            raise await self._unknown(run_id, slot)
        return Place(run_id, slot, row["interface_id"], row["run_state"] != RUNNING, State(row["state"]))

    async def ended(self, run_id: str) -> bool:
        """Whether a run is known to have ended."""
        state = await self._database.fetchval("SELECT state FROM kasmina.runs WHERE run_id = $1", run_id)
        return state is not None and state != RUNNING

    async def get(self, run_id: str, slot: str, generation: int | None) -> tuple[SeedRow, list[Json]]:
        """A seed and its surviving history, oldest first; the latest that ever left DORMANT (or else the latest)
        without ``generation``.

        Raises:
            NotFound: unknown run, slot or generation, with the nearest name.
        """
        row = await self._database.fetchrow(
            f"""
            {_SELECT} WHERE s.run_id = $1 AND s.slot = $2 AND ($3::bigint IS NULL OR s.generation = $3)
            ORDER BY s.sequence > 0 DESC, s.generation DESC LIMIT 1
            """,
            run_id,
            slot,
            generation,
        )
        if row is None:
            if generation is not None and await self._has_slot(run_id, slot):
                raise NotFound(f"slot {slot!r} of run {run_id!r} has no seed of generation {generation}")
            raise await self._unknown(run_id, slot)
        history = await self._database.fetch(
            "SELECT event FROM kasmina.history WHERE run_id = $1 AND seed_id = $2 ORDER BY sequence",
            run_id,
            row["seed_id"],
        )
        return _seed(row), [json.loads(event["event"]) for event in history]

    async def present(self, run_id: str, states: Sequence[int], size: int) -> list[SeedRow]:
        """Each slot's latest seed and the fossils before it, most recently changed first."""
        rows = await self._database.fetch(
            f"""
            {_SELECT}
            WHERE {_PRESENT} AND ($1 = '' OR s.run_id = $1) AND (cardinality($2::int[]) = 0 OR s.state = ANY ($2))
            ORDER BY s.changed DESC LIMIT $3
            """,
            run_id,
            list(states),
            size,
        )
        return [_seed(row) for row in rows]

    async def stats(self, run_id: str, slot: str, epochs: int) -> list[Json]:
        """A slot's vital signs over the last ``epochs`` measured epochs, oldest first.

        Raises:
            NotFound: unknown run or slot, with the nearest name.
        """
        if not await self._has_slot(run_id, slot):
            raise await self._unknown(run_id, slot)
        rows = await self._database.fetch(
            "SELECT signal FROM kasmina.telemetry WHERE run_id = $1 AND slot = $2 ORDER BY epoch DESC LIMIT $3",
            run_id,
            slot,
            epochs,
        )
        return [json.loads(row["signal"]) for row in reversed(rows)]

    async def events_after(self, run_id: str, ordinal: int) -> tuple[list[Json], int]:
        """Surviving state changes (of one run, or of all for '') that came in after ``ordinal``, at most 500, and the
        ordinal to go on from."""
        rows = await self._database.fetch(
            """
            SELECT ordinal, event FROM kasmina.history
            WHERE ($1 = '' OR run_id = $1) AND ordinal > $2 ORDER BY ordinal LIMIT 500
            """,
            run_id,
            ordinal,
        )
        return [json.loads(row["event"]) for row in rows], rows[-1]["ordinal"] if rows else ordinal

    async def _has_slot(self, run_id: str, slot: str) -> bool:
        return bool(
            await self._database.fetchval("SELECT 1 FROM kasmina.slots WHERE run_id = $1 AND slot = $2", run_id, slot)
        )

    async def _unknown(self, run_id: str, slot: str) -> NotFound:
        rows = await self._database.fetch("SELECT slot FROM kasmina.slots WHERE run_id = $1", run_id)
        if rows:
            return NotFound(
                f"run {run_id!r} has no slot {slot!r}", hint=nearest(slot, [str(row["slot"]) for row in rows])
            )
        runs = await self._database.fetch("SELECT run_id FROM kasmina.runs ORDER BY ordinal DESC LIMIT 50")
        return NotFound(f"there is no run {run_id!r}", hint=nearest(run_id, [str(row["run_id"]) for row in runs]))


def _seed(row: asyncpg.Record) -> SeedRow:
    return SeedRow(
        seed_id=row["seed_id"],
        run_id=row["run_id"],
        slot=row["slot"],
        generation=row["generation"],
        state=State(row["state"]),
        kernel_id=row["kernel_id"],
        blueprint_name=row["blueprint_name"],
        alpha=row["alpha"],
        epoch=row["epoch"],
        health=-1.0 if row["health"] is None else float(row["health"]),
    )
