"""Plans: made of what runs tell of their units, ordered once, followed to their end.

Knows neither grpc nor the wire. A plan's state is derived anew from its orders and the run's surviving events, so no order of arrival
can move it backwards.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import asyncpg

from esper_core.bus.database import Connection, Pool
from esper_core.control.carve.papers import Act, CarveEvent, CarveOrder, CarveSurvey, PlanState, Proposal
from esper_core.control.carve.rules import propose
from esper_core.errors import AlreadyExists, Conflict, NotFound, nearest
from esper_core.ids import new_id
from services import page

SCULPTOR = "emrakul"
OPEN = (PlanState.ORDERED, PlanState.SEDATED)
"""States in which a run is, or is about to be, at work on a plan."""
Send = Callable[[Connection, CarveOrder], Awaitable[None]]
"""Puts an order into the outbox of the connection's transaction."""


@dataclass(frozen=True)
class PlanRow:
    """A plan as it stands."""

    plan_id: str
    ordinal: int
    run_id: str
    state: PlanState
    epoch: int
    proposal: Proposal
    issued_by: str
    reason: str


@dataclass(frozen=True)
class Wish:
    """What somebody wants planned.

    Attributes:
        plan_id: names the plan; made here when empty.
        max_parameters, max_loss: room; the run's settings' when None.
        issued_by: who wants it.
    """

    run_id: str
    plan_id: str = ""
    max_parameters: int | None = None
    max_loss: float | None = None
    issued_by: str = SCULPTOR
    reason: str = ""


class Plans:
    """The plans of all runs."""

    def __init__(self, database: Pool, send: Send) -> None:
        self._database = database
        self._send = send

    async def plan(self, wish: Wish) -> PlanRow:
        """Make a plan; the stored one when one with this ``plan_id`` exists.

        Raises:
            NotFound: unknown run.
            Conflict: it has told nothing, has ended, cannot be carved now, or nothing in it fails to pay.
            AlreadyExists: another run's plan has this ``plan_id``.
        """
        if wish.plan_id and (row := await self._row(self._database, wish.plan_id)) is not None:
            if row["run_id"] != wish.run_id:
                raise AlreadyExists(f"another run's plan is named {wish.plan_id!r}", hint="leave plan_id empty")
            return _plan(row)
        async with self._database.acquire() as connection, connection.transaction():
            await self._running(connection, wish.run_id)
            survey = await self.survey(wish.run_id, connection)
            if survey.obstacle:
                raise Conflict(f"run {wish.run_id!r} cannot be carved: {survey.obstacle}")
            proposal = propose(survey, wish.max_parameters, wish.max_loss)
            if proposal is None:
                raise Conflict(
                    f"at epoch {survey.epoch}, everything in run {wish.run_id!r} pays",
                    hint=f"ask for more: --max-loss above {survey.room_loss:.3g}",
                )
            return await self._keep(connection, wish, survey, proposal)

    async def apply(self, plan_id: str, issued_by: str, reason: str) -> CarveOrder:
        """Order a plan to be carried out; the order that was given when it is under way.

        Raises:
            NotFound: unknown plan.
            Conflict: its units are gone, or its run has ended.
        """
        async with self._database.acquire() as connection, connection.transaction():
            plan = await self._get(connection, plan_id, lock=True)
            if plan.state in OPEN and (given := await self._last(connection, plan_id, Act.SEDATE)):
                return given
            if plan.state is PlanState.REMOVED:
                raise Conflict(
                    f"the units of {plan_id} are gone already", hint="make another plan: `esperctl carve plan`"
                )
            await self._running(connection, plan.run_id)
            return await self._order(connection, plan, Act.SEDATE, issued_by, reason)

    async def undo(self, plan_id: str, issued_by: str, reason: str) -> CarveOrder:
        """Order a plan's units to be woken; the order that was given when the run has not answered it yet.

        Raises:
            NotFound: unknown plan.
            Conflict: its units are gone for good, nobody has ordered it, they are awake, or its run has ended.
        """
        async with self._database.acquire() as connection, connection.transaction():
            plan = await self._get(connection, plan_id, lock=True)
            if plan.state is PlanState.REMOVED:
                raise Conflict(
                    f"the units of {plan_id} are gone for good",
                    hint="start another run from a checkpoint of before; a finished run is carved as a copy",
                )
            if plan.state not in OPEN:
                raise Conflict(f"plan {plan_id} is {plan.state.name}: there is nothing to undo")
            await self._running(connection, plan.run_id)
            given = await self._last(connection, plan_id, Act.WAKE)
            if given is not None and given.order_id not in await self._answered(connection, plan_id):
                return given
            return await self._order(connection, plan, Act.WAKE, issued_by, reason)

    async def get(self, plan_id: str) -> tuple[PlanRow, list[CarveEvent]]:
        """A plan with what its run told of it, oldest first.

        Raises:
            NotFound: there is none, with the nearest name.
        """
        async with self._database.acquire() as connection:
            return await self._get(connection, plan_id), await self._events(connection, plan_id)

    async def page(self, run_id: str, size: int, before: int) -> tuple[Sequence[PlanRow], str]:
        """Plans (of one run, or of all for ''), newest first, and the next page's token."""
        rows = await self._database.fetch(
            """
            SELECT * FROM emrakul.plans WHERE ($1 = '' OR run_id = $1) AND ($2 = 0 OR ordinal < $2)
            ORDER BY ordinal DESC LIMIT $3
            """,
            run_id,
            before,
            size + 1,
        )
        return page.cut([_plan(row) for row in rows], size, lambda plan: plan.ordinal)

    async def survey(self, run_id: str, connection: Connection | None = None) -> CarveSurvey:
        """What a run last told of its units.

        Raises:
            NotFound: unknown run.
            Conflict: it has told nothing.
        """
        asked = connection or self._database
        body = await asked.fetchval("SELECT survey FROM emrakul.surveys WHERE run_id = $1", run_id)
        if body is None:
            if await asked.fetchval("SELECT 1 FROM emrakul.runs WHERE run_id = $1", run_id):
                raise Conflict(
                    f"run {run_id!r} has told nothing of its units",
                    hint="it does once morphogenetic.carve.enabled is set and warmup_epochs are over",
                )
            raise await self._unknown(run_id)
        return CarveSurvey.model_validate_json(body)

    async def follow_the_rules(self, connection: Connection, survey: CarveSurvey, cause: str) -> CarveOrder | None:
        """Plan and order for a run that wants to be carved without being asked; None when there is nothing to do.

        Args:
            connection: in the transaction that notes the survey.
            survey: the run's latest.
            cause: names the fact that brought it; equal causes give equal plans.
        """
        wish = Wish(survey.run_id, f"plan-{cause}"[:64], reason="worth the least per parameter")
        if not survey.autonomous or await self._busy(connection, survey.run_id):
            return None
        proposal = propose(survey)
        if proposal is None:
            return None
        plan = await self._keep(connection, wish, survey, proposal)
        return await self._order(connection, plan, Act.SEDATE, SCULPTOR, wish.reason)

    async def settle(self, connection: Connection, plan_id: str) -> None:
        """Derive a plan's state from its orders and the run's surviving events."""
        orders = await connection.fetch(
            "SELECT order_id, act FROM emrakul.orders WHERE plan_id = $1 ORDER BY ordinal", plan_id
        )
        events = await self._events(connection, plan_id)
        waking = {row["order_id"] for row in orders if row["act"] == Act.WAKE}
        # A refused order to wake says nothing about the plan.
        told = [event for event in events if event.state is not PlanState.REFUSED or event.order_id not in waking]
        sedating = [row["order_id"] for row in orders if row["act"] == Act.SEDATE]
        if sedating and sedating[-1] not in {event.order_id for event in told}:
            state = PlanState.ORDERED
        else:
            state = told[-1].state if told else PlanState.PROPOSED
        await connection.execute("UPDATE emrakul.plans SET state = $2 WHERE plan_id = $1", plan_id, state)

    async def _keep(self, connection: Connection, wish: Wish, survey: CarveSurvey, proposal: Proposal) -> PlanRow:
        plan_id = wish.plan_id or new_id()
        await connection.execute(
            """
            INSERT INTO emrakul.plans (plan_id, run_id, state, epoch, proposal, issued_by, reason)
            VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT DO NOTHING
            """,
            plan_id,
            wish.run_id,
            PlanState.PROPOSED,
            survey.epoch,
            proposal.model_dump_json(),
            wish.issued_by,
            wish.reason,
        )
        return await self._get(connection, plan_id)

    async def _order(self, connection: Connection, plan: PlanRow, act: Act, issued_by: str, reason: str) -> CarveOrder:
        order = CarveOrder.model_validate(
            {
                "order_id": new_id(),
                "run_id": plan.run_id,
                "plan_id": plan.plan_id,
                "act": act,
                "cuts": plan.proposal.cuts if act is Act.SEDATE else (),
                "expected_change": plan.proposal.expected_change,
                "issued_by": issued_by,
                "reason": reason,
            }
        )
        await connection.execute(
            "INSERT INTO emrakul.orders (order_id, plan_id, act, body) VALUES ($1, $2, $3, $4)",
            order.order_id,
            plan.plan_id,
            act,
            order.model_dump_json(),
        )
        await self._send(connection, order)
        await self.settle(connection, plan.plan_id)
        return order

    async def _busy(self, connection: Connection, run_id: str) -> bool:
        return bool(
            await connection.fetchval(
                "SELECT 1 FROM emrakul.plans WHERE run_id = $1 AND state = ANY ($2) LIMIT 1", run_id, list(OPEN)
            )
        )

    async def _running(self, connection: Connection, run_id: str) -> None:
        row = await connection.fetchrow("SELECT * FROM emrakul.runs WHERE run_id = $1", run_id)
        if row is None:
            raise await self._unknown(run_id)
        if row["ended"] > row["registered"]:
            raise Conflict(f"run {run_id!r} has ended", hint="carve a copy of its network: `esperctl carve copy RUN`")

    async def _get(self, connection: Connection, plan_id: str, lock: bool = False) -> PlanRow:
        row = await self._row(connection, plan_id, lock)
        if row is None:
            rows = await connection.fetch("SELECT plan_id FROM emrakul.plans ORDER BY ordinal DESC LIMIT 50")
            raise NotFound(f"there is no plan {plan_id!r}", hint=nearest(plan_id, [row["plan_id"] for row in rows]))
        return _plan(row)

    async def _row(self, asked: Connection | Pool, plan_id: str, lock: bool = False) -> asyncpg.Record | None:
        """The plan's row; locked, on demand, until the transaction ends, so that two callers give one order."""
        if lock:
            return await asked.fetchrow("SELECT * FROM emrakul.plans WHERE plan_id = $1 FOR UPDATE", plan_id)
        return await asked.fetchrow("SELECT * FROM emrakul.plans WHERE plan_id = $1", plan_id)

    async def _last(self, connection: Connection, plan_id: str, act: Act) -> CarveOrder | None:
        body = await connection.fetchval(
            "SELECT body FROM emrakul.orders WHERE plan_id = $1 AND act = $2 ORDER BY ordinal DESC LIMIT 1",
            plan_id,
            act,
        )
        return None if body is None else CarveOrder.model_validate_json(body)

    async def _events(self, connection: Connection, plan_id: str) -> list[CarveEvent]:
        rows = await connection.fetch("SELECT event FROM emrakul.history WHERE plan_id = $1 ORDER BY sequence", plan_id)
        return [CarveEvent.model_validate_json(row["event"]) for row in rows]

    async def _answered(self, connection: Connection, plan_id: str) -> set[str]:
        return {event.order_id for event in await self._events(connection, plan_id)}

    async def _unknown(self, run_id: str) -> NotFound:
        rows = await self._database.fetch("SELECT run_id FROM emrakul.runs ORDER BY ordinal DESC LIMIT 50")
        return NotFound(f"there is no run {run_id!r}", hint=nearest(run_id, [str(row["run_id"]) for row in rows]))


def _plan(row: asyncpg.Record) -> PlanRow:
    return PlanRow(
        plan_id=row["plan_id"],
        ordinal=row["ordinal"],
        run_id=row["run_id"],
        state=PlanState(row["state"]),
        epoch=row["epoch"],
        proposal=Proposal.model_validate(json.loads(row["proposal"])),
        issued_by=row["issued_by"],
        reason=row["reason"],
    )
