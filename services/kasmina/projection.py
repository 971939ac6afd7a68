"""Writes what training processes tell of their seeds into the schema ``kasmina``.

Every statement tolerates facts that come twice, late or out of order (see ``schema/0001_seeds.sql``): a seed's row is
derived anew from its surviving events, so no order of arrival can move it backwards. Knows neither grpc nor the wire.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from esper_core.bus.database import Connection
from esper_core.lifecycle import State
from services.fact import Fact, come_back

Json = Mapping[str, Any]

KEPT_EPOCHS = 1000
"""Vital signs are kept for this many epochs per slot."""
_ORDER = "SELECT pg_advisory_xact_lock(hashtext('kasmina.seeds'))"
_DERIVE = """
INSERT INTO kasmina.seeds AS s
    (seed_id, run_id, slot, generation, state, kernel_id, blueprint_name, alpha, epoch, sequence, changed)
SELECT DISTINCT ON (h.seed_id)
    h.seed_id, h.run_id, h.event->>'slot', coalesce((h.event->>'generation')::bigint, 0),
    (h.event->>'target')::smallint, coalesce(h.event->>'kernel_id', ''), coalesce(h.event->>'blueprint_name', ''),
    coalesce((h.event->>'alpha')::double precision, 0), h.epoch, h.sequence, h.ordinal
FROM kasmina.history h
WHERE h.run_id = $1 AND ($2::text IS NULL OR h.seed_id = $2)
ORDER BY h.seed_id, h.sequence DESC, h.ordinal DESC
ON CONFLICT (seed_id) DO UPDATE SET
    state = excluded.state, kernel_id = excluded.kernel_id, blueprint_name = excluded.blueprint_name,
    alpha = excluded.alpha, epoch = excluded.epoch, sequence = excluded.sequence, changed = excluded.changed
"""
_PLANT = """
INSERT INTO kasmina.seeds
    (seed_id, run_id, slot, generation, state, kernel_id, blueprint_name, alpha, epoch, sequence)
SELECT $1 || '/' || slot || '/' || generation, $1, slot, generation, $2, '', '', 0, max(epoch), 0
FROM (
    SELECT slot, 0 AS generation, 0 AS epoch FROM kasmina.slots WHERE run_id = $1
    UNION ALL
    SELECT slot, generation + 1, epoch FROM kasmina.seeds WHERE run_id = $1 AND state = $2 AND sequence > 0
    UNION ALL
    SELECT f.slot, f.generation + 1, f.epoch FROM kasmina.folds f
    WHERE f.run_id = $1 AND NOT EXISTS (
        SELECT FROM kasmina.registrations r WHERE r.run_id = $1 AND r.sequence > f.sequence AND r.epoch <= f.epoch)
) born
GROUP BY slot, generation ORDER BY slot, generation
ON CONFLICT DO NOTHING
"""


class Projection:
    """The writer; every method takes the connection whose transaction also notes the event id."""

    async def register(self, connection: Connection, fact: Fact, epoch: int, slots: Mapping[str, str]) -> None:
        """Note that a run has begun or come back at ``epoch``; ``slots`` maps its slots to their interfaces' ids."""
        await connection.execute(_ORDER)
        if await come_back(connection, "kasmina", fact, epoch, voids="telemetry"):
            await connection.execute("DELETE FROM kasmina.slots WHERE run_id = $1", fact.run_id)
            await connection.executemany(
                "INSERT INTO kasmina.slots VALUES ($1, $2, $3)",
                [(fact.run_id, slot, interface_id) for slot, interface_id in slots.items()],
            )
        await connection.execute("DELETE FROM kasmina.seeds WHERE run_id = $1", fact.run_id)
        await connection.execute(_DERIVE, fact.run_id, None)
        await self._plant(connection, fact.run_id)

    async def fold(self, connection: Connection, fact: Fact, slot: str, generation: int, epoch: int) -> None:
        """Note that a fossil has become part of its host: its slot offers room for the next generation."""
        await connection.execute(_ORDER)
        await connection.execute(
            "INSERT INTO kasmina.folds VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING",
            fact.event_id,
            fact.run_id,
            slot,
            generation,
            fact.sequence,
            epoch,
        )
        await self._plant(connection, fact.run_id)

    async def _plant(self, connection: Connection, run_id: str) -> None:
        """Put a dormant seed where a run has one of which nothing was told: its slots' first, and the next generation
        after an embargo or a fold."""
        await connection.execute(_PLANT, run_id, State.DORMANT)

    async def end(self, connection: Connection, fact: Fact, state: int) -> None:
        """Note that a run has ended."""
        await connection.execute(
            """
            INSERT INTO kasmina.runs AS r (run_id, ended, end_state) VALUES ($1, $2, $3)
            ON CONFLICT (run_id) DO UPDATE SET ended = excluded.ended, end_state = excluded.end_state
            WHERE r.ended < excluded.ended
            """,
            fact.run_id,
            fact.sequence,
            state,
        )

    async def change(self, connection: Connection, fact: Fact, seed_id: str, epoch: int, event: Json) -> None:
        """Note a seed's state change; ``event`` in the wire's JSON form with enums as numbers."""
        await connection.execute(_ORDER)
        await connection.execute(
            """
            INSERT INTO kasmina.seed_events (event_id, run_id, seed_id, sequence, epoch, event)
            VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING
            """,
            fact.event_id,
            fact.run_id,
            seed_id,
            fact.sequence,
            epoch,
            json.dumps(event),
        )
        await connection.execute(_DERIVE, fact.run_id, seed_id)
        await self._plant(connection, fact.run_id)

    async def measure(self, connection: Connection, fact: Fact, epoch: int, signals: Mapping[str, Json]) -> None:
        """Note the vital signs of a run's slots at ``epoch``; older ones than ``KEPT_EPOCHS`` are forgotten.

        Telemetry may be lost and has no order of its own (sequence 0): then the last that comes in counts.
        """
        rows = [(fact.run_id, slot, epoch, fact.sequence, json.dumps(signal)) for slot, signal in signals.items()]
        await connection.executemany(
            """
            INSERT INTO kasmina.telemetry AS t
            SELECT $1, $2, $3, $4, $5 WHERE $4::bigint = 0 OR NOT EXISTS (
                SELECT FROM kasmina.registrations r WHERE r.run_id = $1 AND r.sequence > $4 AND r.epoch <= $3)
            ON CONFLICT (run_id, slot, epoch) DO UPDATE SET sequence = excluded.sequence, signal = excluded.signal
            WHERE t.sequence < excluded.sequence OR excluded.sequence = 0
            """,
            rows,
        )
        await connection.execute(
            "DELETE FROM kasmina.telemetry WHERE run_id = $1 AND epoch <= $2", fact.run_id, epoch - KEPT_EPOCHS
        )
