"""Writes what training processes tell of their units and plans into the schema ``emrakul``. Knows neither grpc nor the wire."""

from __future__ import annotations

from esper_core.bus.database import Connection
from esper_core.control.carve.papers import CarveEvent, CarveSurvey, Proposal
from services.emrakul.plans import Plans
from services.fact import Fact, come_back

_ORDER = "SELECT pg_advisory_xact_lock(hashtext('emrakul.plans'))"


class Projection:
    """The writer; every method takes the connection whose transaction also notes the event id."""

    def __init__(self, plans: Plans) -> None:
        self._plans = plans

    async def register(self, connection: Connection, fact: Fact, epoch: int) -> None:
        """Note that a run has begun or come back at ``epoch``: what it had told of later epochs is void."""
        await connection.execute(_ORDER)
        await come_back(connection, "emrakul", fact, epoch, voids="surveys")
        rows = await connection.fetch(
            "SELECT DISTINCT plan_id FROM emrakul.events WHERE run_id = $1 AND epoch >= $2", fact.run_id, epoch
        )
        for row in rows:
            await self._plans.settle(connection, row["plan_id"])

    async def end(self, connection: Connection, fact: Fact) -> None:
        """Note that a run has ended."""
        await connection.execute(
            """
            INSERT INTO emrakul.runs AS r (run_id, ended) VALUES ($1, $2)
            ON CONFLICT (run_id) DO UPDATE SET ended = greatest(r.ended, excluded.ended)
            """,
            fact.run_id,
            fact.sequence,
        )

    async def measured(self, connection: Connection, fact: Fact, survey: CarveSurvey) -> None:
        """Note what a run's units are worth, and follow the rules where the run wants that and it is news."""
        await connection.execute(_ORDER)
        news = await connection.fetchval(
            """
            INSERT INTO emrakul.surveys AS s
            SELECT $1, $2::bigint, $3::bigint, $4::jsonb WHERE NOT EXISTS (
                SELECT FROM emrakul.registrations r WHERE r.run_id = $1 AND r.sequence > $2 AND r.epoch <= $3)
            ON CONFLICT (run_id) DO UPDATE SET
                sequence = excluded.sequence, epoch = excluded.epoch, survey = excluded.survey
            WHERE s.sequence < excluded.sequence
            RETURNING 1
            """,
            fact.run_id,
            fact.sequence,
            survey.epoch,
            survey.model_dump_json(),
        )
        if news:
            await self._plans.follow_the_rules(connection, survey, fact.event_id)

    async def carved(self, connection: Connection, fact: Fact, event: CarveEvent) -> None:
        """Note what became of a plan; one that is not known here is taken from the event."""
        await connection.execute(_ORDER)
        if event.cuts:
            proposal = Proposal(
                cuts=event.cuts,
                expected_change=event.expected_change or 0.0,
                parameters=event.parameters,
                flops=event.flops,
            )
            await connection.execute(
                """
                INSERT INTO emrakul.plans (plan_id, run_id, state, epoch, proposal, issued_by, reason)
                VALUES ($1, $2, $3, $4, $5, 'tolaria', $6) ON CONFLICT DO NOTHING
                """,
                event.plan_id,
                fact.run_id,
                event.state,
                event.epoch,
                proposal.model_dump_json(),
                event.reason,
            )
        await connection.execute(
            "INSERT INTO emrakul.events VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING",
            fact.event_id,
            fact.run_id,
            event.plan_id,
            fact.sequence,
            event.epoch,
            event.model_dump_json(),
        )
        await self._plans.settle(connection, event.plan_id)
