"""Orders to runs: checked against what is known, made durable, sent once.

An order is one row and one outbox event in one transaction; the run applies it at its next epoch boundary and answers
with the seed's state change. The last known state may be an epoch old: the run has the last word and refuses what has
become illegal, and only the run knows its embargoes, its budget and whether another graft is in flight.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import asyncpg

from esper_core import lifecycle
from esper_core.bus.database import Connection, Pool
from esper_core.control.packet import Command, RampStyle
from esper_core.errors import AlreadyExists, Conflict
from esper_core.ids import new_id
from esper_core.lifecycle import State
from services.kasmina.seeds import Place, Seeds

VALIDATED = 2


@dataclass(frozen=True)
class Kernel:
    """What an order must know of a kernel; ``status`` has the numbers of ``esper.core.v1.KernelStatus``."""

    kernel_id: str
    status: int
    status_name: str
    interface_id: str
    reason: str


FindKernel = Callable[[str], Awaitable[Kernel]]
"""Asks the library; raises ``NotFound`` or ``Unavailable``."""
Send = Callable[[Connection, Command], Awaitable[None]]
"""Puts a command into the outbox of the connection's transaction."""


class Orders:
    """Takes orders for seeds."""

    def __init__(self, database: Pool, seeds: Seeds, find: FindKernel, send: Send) -> None:
        self._database = database
        self._seeds = seeds
        self._find = find
        self._send = send

    async def germinate(self, wish: Command) -> Command:
        """Order a seed to germinate; the stored order when one with this ``command_id`` exists.

        Raises:
            NotFound: unknown run, slot or kernel.
            Conflict: the run has ended, the seed's state, the kernel's status or its interface forbid it.
            AlreadyExists: another order has this ``command_id``.
        """
        if stored := await self._stored(wish):
            return stored
        place = await self._seeds.place(wish.run_id, wish.slot)
        _check_place(place, State.GERMINATED)
        kernel = await self._find(wish.kernel_id)
        if kernel.status != VALIDATED:
            raise Conflict(
                f"kernel {kernel.kernel_id} is {kernel.status_name}, not VALIDATED",
                hint=kernel.reason or "wait for its evaluation, or choose a validated one: `esperctl kernel list`",
            )
        if kernel.interface_id != place.interface_id:
            raise Conflict(
                f"kernel {kernel.kernel_id} was built for another interface than slot {place.slot!r} offers",
                hint=f"choose one with interface {place.interface_id}",
            )
        return await self._keep(wish)

    async def transition(self, wish: Command) -> Command:
        """Order a seed to be culled or rolled back; the stored order when one with this ``command_id`` exists.

        Raises:
            NotFound, Conflict, AlreadyExists: as ``germinate``; IllegalTransition when the lifecycle has no such edge.
        """
        if stored := await self._stored(wish):
            return stored
        _check_place(await self._seeds.place(wish.run_id, wish.slot), wish.target)
        return await self._keep(wish)

    async def _stored(self, wish: Command) -> Command | None:
        if not wish.command_id:
            return None
        row = await self._database.fetchrow("SELECT * FROM kasmina.commands WHERE command_id = $1", wish.command_id)
        return _same(row, wish) if row else None

    async def _keep(self, wish: Command) -> Command:
        command = wish if wish.command_id else wish.model_copy(update={"command_id": new_id()})
        async with self._database.acquire() as connection, connection.transaction():
            row = await connection.fetchrow(
                """
                INSERT INTO kasmina.commands (command_id, run_id, slot, target, kernel_id, issued_by, reason, style)
                VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT DO NOTHING RETURNING *
                """,
                command.command_id,
                command.run_id,
                command.slot,
                command.target,
                command.kernel_id,
                command.issued_by,
                command.reason,
                command.style,
            )
            if row is not None:
                await self._send(connection, command)
                return command
        stored = await self._stored(command)
        if stored is None:
            raise Conflict(f"order {command.command_id} was withdrawn while it was given", hint="give it again")
        return stored


def _check_place(place: Place, target: State) -> None:
    if place.run_ended:
        raise Conflict(f"run {place.run_id!r} has ended", hint="resume it, or name one that runs: `esperctl runs list`")
    if (place.state, target) not in lifecycle.TABLE:
        lifecycle.check(place.state, target)


def _same(row: asyncpg.Record, wish: Command) -> Command:
    stored = Command(
        command_id=row["command_id"],
        run_id=row["run_id"],
        slot=row["slot"],
        target=State(row["target"]),
        kernel_id=row["kernel_id"],
        issued_by=row["issued_by"],
        reason=row["reason"],
        style=RampStyle(row["style"]),
    )
    told = {"run_id", "slot", "target", "kernel_id", "style"}
    if stored.model_dump(include=told) != wish.model_dump(include=told):
        raise AlreadyExists(
            f"another order is named {wish.command_id!r}", hint="leave command_id empty, or choose a fresh one"
        )
    return stored
