"""The gardener: breeds what searches ask for, hands proposals to library and forge, and notes what becomes of them.

One works at a time (an advisory lock chooses it), others stand by. Every step is written down before the next and may be repeated:
uploads and builds are idempotent, a generation is bred once. At most ``OPEN_BUILDS`` proposals are with the forge at once, so that a
run's own kernels never wait long behind inventions.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from esper_core import log
from esper_core.blueprint.interface import SlotInterface
from esper_core.bus.database import Pool
from esper_core.errors import Conflict, InvalidInput, NotFound, Unavailable
from services.bell import Bell
from services.karn.design import Design, Specimen, level_for
from services.karn.dice import Dice
from services.karn.nursery import Known, Nursery, Row, State, Tale
from services.karn.searches import Progress, Search, Searches
from services.karn.trade import Trade

if TYPE_CHECKING:
    from services.karn.breed import Proposal

NEWS = "karn"
LOCK = 0x6B61726E  # "karn"
OPEN_BUILDS = 4
POLL_SECONDS = 1.0
AWAY_SECONDS = 2.0
TRANSPLANTS = 4
"""Elites of other interfaces that a new one is offered first."""

LOG = log.get("karn")


class Gardener:
    """Karn's hands.

    Args:
        database: where everything is written.
        bell: rings when there is news.
        nursery, searches: the rows.
        trade: library and forge.
        patience_seconds: how long a kernel that is built is waited for; one that is judged later still counts.
    """

    def __init__(
        self,
        database: Pool,
        bell: Bell,
        nursery: Nursery,
        searches: Searches,
        trade: Trade,
        patience_seconds: float,
    ) -> None:
        self._patience = patience_seconds
        self._database, self._bell = database, bell
        self._nursery, self._searches, self._trade = nursery, searches, trade

    async def run(self) -> None:
        """Work until cancelled, or until the platform begins to stop.

        Raises:
            asyncpg.PostgresError, OSError: the database is away; the next run goes on where this one was.
        """
        async with self._database.acquire() as connection:
            try:
                while not await connection.fetchval("SELECT pg_try_advisory_lock($1)", LOCK):
                    await self._bell.wait(self._bell.expect(NEWS), AWAY_SECONDS)
                await self._work()
            except Unavailable:
                return  # the platform is stopping
            finally:
                connection.terminate()  # ends the lock for certain

    async def _work(self) -> None:
        await self._nursery.wait_anew()
        while True:
            rung = self._bell.expect(NEWS)
            try:
                moved = await self.round()
            except Unavailable as error:
                LOG.warning("away", error=error.message)
                await self._nursery.wait_anew()
                await self._bell.wait(rung, AWAY_SECONDS)
                continue
            if not moved:
                await self._bell.wait(rung, POLL_SECONDS)

    async def round(self) -> bool:
        """Do what can be done now; whether anything moved.

        Raises:
            Unavailable: library or forge are away.
        """
        moved = await self._look()
        moved |= await self._sow()
        for search in await self._searches.running():
            moved |= await self._advance(search)
        return moved

    async def propose(self, interface: Known, count: int, seed: int) -> list[Row]:
        """Breed for an interface, apart from any search; nothing is kept."""
        return await self._breed(interface, count, Dice(seed), 0, "")

    async def keep(self, rows: list[Row]) -> None:
        """Have proposals built."""
        async with self._database.acquire() as connection, connection.transaction():
            for row in rows:
                await self._nursery.propose(connection, row)
            await self._bell.ring(connection, NEWS)

    async def _sow(self) -> bool:
        """Hand proposals over, as many as may be open."""
        room = OPEN_BUILDS - len(await self._nursery.open(State.BUILDING, OPEN_BUILDS))
        rows = await self._nursery.open(State.PROPOSED, room) if room > 0 else []
        for row in rows:
            try:
                await self._nursery.submitted(row, await self._trade.submit(row))
            except (InvalidInput, Conflict) as error:
                await self._nursery.failed(row, error.message)
        return bool(rows)

    async def _look(self) -> bool:
        """See what came of what is with the forge; events may be late or lost, rows are not."""
        moved = False
        for row in await self._nursery.open(State.BUILDING, OPEN_BUILDS):
            try:
                record, reason = await self._trade.look(row)
            except NotFound as error:
                record, reason = None, error.message
            if reason:
                await self._nursery.failed(row, reason)
                moved = True
            elif record is not None:
                async with self._database.acquire() as connection, connection.transaction():
                    judged = await self._nursery.judged(connection, record) is not None
                moved |= judged or await self._waited(row, record.manifest.kernel_id)
        return moved

    async def _waited(self, row: Row, kernel_id: str) -> bool:
        """Wait no longer for a verdict that is overdue; where the bench is silent altogether, its search ends."""
        if not await self._nursery.overdue(row, kernel_id, self._patience):
            return False
        reason = f"built, and not judged by Urabrask within {self._patience:g} s; a later verdict still counts"
        async with self._database.acquire() as connection, connection.transaction():
            silent = await self._nursery.unjudged(connection, row, reason)
            if silent and row.tale.search_id:
                why = f"Urabrask judged nothing for {self._patience:g} s while {row.design.ir.name} and others waited"
                await self._searches.give_up(connection, row.tale.search_id, why)
            await self._bell.ring(connection, NEWS)
        LOG.warning("verdict.overdue", kernel_id=kernel_id, search_id=row.tale.search_id, silent=silent)
        return True

    async def _advance(self, search: Search) -> bool:
        wish, generation = search.wish, search.generation
        bred = await self._searches.bred(wish.search_id, generation)
        missing = [each for each in wish.interface_ids if each not in bred]
        for interface_id in missing:
            known = await self._nursery.interface(interface_id)
            dice = Dice(wish.seed, interface_id, generation)
            rows = await self._breed(known, wish.population, dice, generation, wish.search_id)
            async with self._database.acquire() as connection, connection.transaction():
                if await self._searches.note_bred(connection, wish.search_id, generation, interface_id):
                    for row in rows:
                        await self._nursery.propose(connection, row)
        if missing:
            return True
        if search.waiting:
            return False
        progress = [await self._standing(interface_id) for interface_id in wish.interface_ids]
        async with self._database.acquire() as connection, connection.transaction():
            await self._searches.close(connection, search, progress)
            await self._bell.ring(connection, NEWS)
        best = max((each.best for each in progress), default=0.0)
        LOG.info("generation.over", search_id=wish.search_id, generation=generation + 1, best=round(best, 4))
        return True

    async def _breed(self, known: Known, count: int, dice: Dice, generation: int, search_id: str) -> list[Row]:
        rows = await self._nursery.all(known.interface.id)
        specimens = [specimen for row in rows if (specimen := row.specimen)]
        level = max(known.level, level_for(specimens))
        async with self._database.acquire() as connection:
            await self._nursery.raise_level(connection, known.interface.id, level)
        transplants = [] if specimens else await self._transplants(known.interface)
        barred = {row.design.form for row in rows}
        found = await asyncio.to_thread(
            _bred, known.interface, specimens, barred, level, transplants, count, dice, generation
        )
        return [_proposed(proposal, generation, search_id) for proposal in found]

    async def _standing(self, interface_id: str) -> Progress:
        known = await self._nursery.interface(interface_id)
        rows = await self._nursery.all(interface_id)
        specimens = [specimen for row in rows if (specimen := row.specimen)]
        return await asyncio.to_thread(standing, interface_id, specimens, known.level)

    async def _transplants(self, interface: SlotInterface) -> list[Design]:
        """The best of other interfaces of the same layout, for one where nothing is known yet."""
        found: list[tuple[float, Design]] = []
        for other in await self._nursery.interfaces():
            if other.interface.layout is interface.layout and other.interface.id != interface.id and other.measured:
                rows = await self._nursery.all(other.interface.id)
                found += [(specimen.worth(other.level), specimen.design) for row in rows if (specimen := row.specimen)]
        found.sort(key=lambda each: -each[0])
        return [design for _, design in found[:TRANSPLANTS]]


def standing(interface_id: str, specimens: list[Specimen], level: int) -> Progress:
    """How an archive stands."""
    from services.karn.archive import Archive  # ribs costs seconds to import: not paid when the platform starts

    archive = Archive(specimens, level)
    return Progress(interface_id, level, archive.best, archive.coverage, archive.score, len(specimens))


def _bred(
    interface: SlotInterface,
    specimens: list[Specimen],
    barred: set[str],
    level: int,
    transplants: list[Design],
    count: int,
    dice: Dice,
    generation: int,
) -> list[Proposal]:
    from services.karn.breed import Breeder  # scikit-learn and ribs, likewise

    breeder = Breeder(interface, specimens, barred=barred, level=level, transplants=transplants)
    return breeder.propose(count, dice, generation)


def _proposed(proposal: Proposal, generation: int, search_id: str) -> Row:
    guesses = {"worth": proposal.worth, "learned": proposal.expected.learned if proposal.expected else None}
    expected = {name: [guess.mean, guess.half_width] for name, guess in guesses.items() if guess is not None}
    design = proposal.design
    return Row(
        design,
        design.ir.symbols if design.source_id else {},
        Tale(proposal.operator, proposal.why, search_id, generation, expected),
        State.PROPOSED,
    )
