"""Searches: what is to be bred, how far it has got, and what each generation brought. Rows only; breeding is the gardener's."""

from __future__ import annotations

import datetime as dt
import enum
from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg

from esper_core.bus.database import Connection, Pool
from esper_core.errors import AlreadyExists, NotFound

LATEST = "latest"


class SearchState(enum.IntEnum):
    """How a search is getting on; the numbers equal those of ``esper.karn.v1.SearchState``."""

    RUNNING = 1
    FINISHED = 2
    STOPPED = 3
    GAVE_UP = 4


@dataclass(frozen=True)
class Wish:
    """What to breed; equal ids must ask for equal things."""

    search_id: str
    interface_ids: tuple[str, ...]
    generations: int
    population: int
    seed: int


@dataclass(frozen=True)
class Progress:
    """How an interface's archive stood at the end of a generation."""

    interface_id: str
    level: int
    best: float
    coverage: float
    score: float
    measured: int


@dataclass(frozen=True)
class Search:
    """A search as it stands."""

    wish: Wish
    generation: int
    state: SearchState
    created: dt.datetime
    proposed: int
    waiting: int
    unfit: int
    unjudged: int
    reason: str
    """Why it gave up."""
    progress: tuple[Progress, ...]


_SELECT = """
SELECT s.*, count(d.form) AS proposed, count(d.form) FILTER (WHERE d.state IN (1, 2)) AS waiting,
       count(d.form) FILTER (WHERE d.state IN (4, 5)) AS unfit, count(d.form) FILTER (WHERE d.state = 6) AS unjudged
FROM karn.searches s LEFT JOIN karn.designs d ON d.search_id = s.search_id
"""


class Searches:
    """Reads and moves them."""

    def __init__(self, database: Pool) -> None:
        self._database = database

    async def start(self, connection: Connection, wish: Wish) -> None:
        """Begin, unless it has begun.

        Raises:
            AlreadyExists: the id names a different search.
        """
        await connection.execute(
            """INSERT INTO karn.searches (search_id, interface_ids, generations, population, seed)
               VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING""",
            wish.search_id,
            list(wish.interface_ids),
            wish.generations,
            wish.population,
            wish.seed,
        )
        row = await connection.fetchrow("SELECT * FROM karn.searches WHERE search_id = $1", wish.search_id)
        if row is None or _wish(row) != wish:
            raise AlreadyExists(f"search {wish.search_id} is a different one", hint="choose another id, or none")

    async def get(self, search_id: str) -> Search:
        """That search, or the latest.

        Raises:
            NotFound: there is none.
        """
        rows = await self._database.fetch(
            f"{_SELECT} WHERE s.search_id = $1 OR $1 = $2 GROUP BY s.search_id ORDER BY s.serial DESC LIMIT 1",
            search_id,
            LATEST,
        )
        if not rows:
            raise NotFound(f"no search {search_id!r}", hint="start one: `esperctl karn run`")
        return (await self._told(rows))[0]

    async def newest(self, size: int) -> list[Search]:
        """Newest first."""
        rows = await self._database.fetch(f"{_SELECT} GROUP BY s.search_id ORDER BY s.serial DESC LIMIT $1", size)
        return await self._told(rows)

    async def running(self) -> list[Search]:
        """Those that are not over, oldest first."""
        rows = await self._database.fetch(f"{_SELECT} WHERE s.state = 1 GROUP BY s.search_id ORDER BY s.serial")
        return await self._told(rows)

    async def stop(self, connection: Connection, search_id: str) -> None:
        """End it, unless it is over, and forget what it proposed and nobody has begun to build."""
        await self._end(connection, search_id, SearchState.STOPPED)

    async def give_up(self, connection: Connection, search_id: str, reason: str) -> None:
        """As ``stop``, but not by a person's wish."""
        await self._end(connection, search_id, SearchState.GAVE_UP, reason)

    async def _end(self, connection: Connection, search_id: str, state: SearchState, reason: str = "") -> None:
        await connection.execute(
            "UPDATE karn.searches SET state = $2, reason = $3 WHERE search_id = $1 AND state = 1",
            search_id,
            int(state),
            reason[:500],
        )
        await connection.execute("DELETE FROM karn.designs WHERE search_id = $1 AND state = 1", search_id)

    async def bred(self, search_id: str, generation: int) -> set[str]:
        """Interfaces for which that generation has been bred."""
        rows = await self._database.fetch(
            "SELECT interface_id FROM karn.generations WHERE search_id = $1 AND generation = $2", search_id, generation
        )
        return {row["interface_id"] for row in rows}

    async def note_bred(self, connection: Connection, search_id: str, generation: int, interface_id: str) -> bool:
        """Note that a generation has been bred; False when it had been."""
        tag = await connection.execute(
            """INSERT INTO karn.generations (search_id, generation, interface_id) VALUES ($1, $2, $3)
               ON CONFLICT DO NOTHING""",
            search_id,
            generation,
            interface_id,
        )
        return bool(tag == "INSERT 0 1")

    async def close(self, connection: Connection, search: Search, progress: Sequence[Progress]) -> None:
        """End a search's present generation, and with the last one the search."""
        for each in progress:
            await connection.execute(
                """UPDATE karn.generations SET level = $4, best = $5, coverage = $6, score = $7, measured = $8
                   WHERE search_id = $1 AND generation = $2 AND interface_id = $3""",
                search.wish.search_id,
                search.generation,
                each.interface_id,
                each.level,
                each.best,
                each.coverage,
                each.score,
                each.measured,
            )
        await connection.execute(
            """UPDATE karn.searches SET generation = generation + 1,
                   state = CASE WHEN state = 1 AND generation + 1 >= generations THEN 2 ELSE state END
               WHERE search_id = $1 AND generation = $2""",
            search.wish.search_id,
            search.generation,
        )

    async def _told(self, rows: Sequence[asyncpg.Record]) -> list[Search]:
        found = []
        for row in rows:
            figures = await self._database.fetch(
                """SELECT interface_id, level, best, coverage, score, measured FROM karn.generations
                   WHERE search_id = $1 AND generation = $2 AND best IS NOT NULL ORDER BY interface_id""",
                row["search_id"],
                row["generation"] - 1,
            )
            found.append(
                Search(
                    _wish(row),
                    row["generation"],
                    SearchState(row["state"]),
                    row["created"],
                    row["proposed"],
                    row["waiting"],
                    row["unfit"],
                    row["unjudged"],
                    row["reason"],
                    tuple(Progress(**dict(each)) for each in figures),
                )
            )
        return found


def _wish(row: asyncpg.Record) -> Wish:
    return Wish(row["search_id"], tuple(row["interface_ids"]), row["generations"], row["population"], row["seed"])
