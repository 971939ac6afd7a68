"""What was decided, and what came of it. A decision and its orders become true in one transaction.

A packet is recognised by its digest: the same epoch of the same run, described alike, gets its stored decision again,
also when the run went back to a checkpoint and came to this epoch a second time.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from esper_core.blueprint.interface import canonical_json
from esper_core.bus.database import Connection, Pool
from esper_core.control.packet import AdaptationSignal, Command, SystemStatePacket
from esper_core.ids import sha256
from services import page

Send = Callable[[Connection, Command, AdaptationSignal], Awaitable[None]]
"""Puts an order into the outbox of the connection's transaction."""


def digest(packet: SystemStatePacket) -> str:
    """Names what a packet says; the seconds a kernel took are left out, they differ each time one looks."""
    told = packet.model_dump(mode="json")
    for slot in told["slots"]:
        slot["health"].pop("latency_seconds")
    return sha256(canonical_json(told))


class Decisions:
    """The record of decisions."""

    def __init__(self, database: Pool, send: Send) -> None:
        self._database = database
        self._send = send

    async def find(self, run_id: str, epoch: int, packet_sha256: str) -> AdaptationSignal | None:
        """The decision on that packet, when there is one."""
        found = await self._database.fetchval(
            "SELECT signal FROM tamiyo.decisions WHERE run_id = $1 AND epoch = $2 AND packet_sha256 = $3",
            run_id,
            epoch,
            packet_sha256,
        )
        return AdaptationSignal.model_validate_json(found) if found else None

    async def keep(self, signal: AdaptationSignal, packet_sha256: str) -> AdaptationSignal:
        """Record a decision and give its orders; the one recorded first when two decided on the same packet."""
        async with self._database.acquire() as connection, connection.transaction():
            kept = await connection.fetchval(
                """
                INSERT INTO tamiyo.decisions
                    (decision_id, run_id, epoch, packet_sha256, policy_version, actions, seconds, signal)
                VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
                ON CONFLICT (run_id, epoch, packet_sha256) DO NOTHING RETURNING decision_id
                """,
                signal.decision_id,
                signal.run_id,
                signal.epoch,
                packet_sha256,
                signal.policy_version,
                len(signal.actions),
                signal.seconds,
                signal.model_dump_json(),
            )
            if kept:
                for action in signal.actions:
                    await self._send(connection, action.command, signal)
        first = signal if kept else await self.find(signal.run_id, signal.epoch, packet_sha256)
        return first or signal

    async def newest(
        self, *, run_id: str, actions_only: bool, size: int, token: str
    ) -> tuple[list[AdaptationSignal], str]:
        """Decisions (of one run, or of all for ''), newest first, and the token of the next page.

        Raises:
            InvalidInput: the token is none of ours.
        """
        rows = await self._database.fetch(
            """
            SELECT ordinal, signal FROM tamiyo.decisions
            WHERE ($1 = '' OR run_id = $1) AND ($2 OR actions > 0) AND ($3 = 0 OR ordinal < $3)
            ORDER BY ordinal DESC LIMIT $4
            """,
            run_id,
            not actions_only,
            page.before(token),
            size + 1,
        )
        kept, following = page.cut(rows, size, lambda row: int(row["ordinal"]))
        return [AdaptationSignal.model_validate_json(row["signal"]) for row in kept], following

    async def last_ordinal(self) -> int:
        """Of the newest decision; 0 when there is none."""
        return int(await self._database.fetchval("SELECT coalesce(max(ordinal), 0) FROM tamiyo.decisions"))

    async def since(self, ordinal: int) -> tuple[int, float]:
        """How many decisions came after ``ordinal``, and their median seconds (0 without any)."""
        row = await self._database.fetchrow(
            """
            SELECT count(*) AS decisions, coalesce(percentile_cont(0.5) WITHIN GROUP (ORDER BY seconds), 0) AS median
            FROM tamiyo.decisions WHERE ordinal > $1
            """,
            ordinal,
        )
        return (int(row["decisions"]), float(row["median"])) if row else (0, 0.0)


class Experience:
    """What came of grafts, for policies to learn from; each report once."""

    def __init__(self, database: Pool) -> None:
        self._database = database

    async def add(self, connection: Connection, report_id: str, run_id: str, report: Mapping[str, Any]) -> None:
        """Keep a report, in the wire's JSON form, unless one of that id is kept."""
        await connection.execute(
            "INSERT INTO tamiyo.experience (report_id, run_id, report) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
            report_id,
            run_id,
            json.dumps(report),
        )

    async def count(self) -> int:
        """Reports kept so far."""
        return int(await self._database.fetchval("SELECT count(*) FROM tamiyo.experience"))
