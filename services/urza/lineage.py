"""Who descends from whom among blueprints: ancestors and descendants to a depth, by recursive queries.

Contents name a blueprint, so an honest child cannot be its own ancestor; rows that say so all the same are walked once
round and no further, because a query counts generations and stops at the wished one.
"""

from __future__ import annotations

from dataclasses import dataclass

import asyncpg

from esper_core.bus.database import Connection, Pool
from esper_core.errors import Exhausted

DEEPEST = 64
"""Generations that can be asked for, each way; also in the contract."""
LIMIT = 1000
PATIENCE = "5s"
"""How long one walk may take in the database."""

_WALK = """
WITH RECURSIVE walk (blueprint_id, distance) AS (
    SELECT $1::text, 0
    UNION
    SELECT l.{there}, w.distance + 1 FROM walk w JOIN urza.lineage l ON l.{here} = w.blueprint_id WHERE w.distance < $2
)
SELECT blueprint_id, min(distance) AS distance FROM walk GROUP BY blueprint_id ORDER BY 2, 1 LIMIT $3
"""


@dataclass(frozen=True)
class Relative:
    """A blueprint among its relatives; name and uploader are empty when it is not in this library."""

    blueprint_id: str
    generation: int
    """Generations from the one asked for, by the shortest way: below 0 for ancestors, above for descendants."""
    name: str = ""
    created_by: str = ""


@dataclass(frozen=True)
class Lineage:
    """A blueprint's relatives, nearest first, and who descends from whom among them."""

    relatives: tuple[Relative, ...]
    descents: tuple[tuple[str, str], ...]
    """(parent, child), sorted."""
    truncated: bool


async def lineage(database: Pool, blueprint_id: str, ancestors: int, descendants: int, limit: int = LIMIT) -> Lineage:
    """The relatives of ``blueprint_id``, itself included, at most ``limit``.

    Of two ways between the same blueprints the shorter one counts; one that is both ancestor and descendant, which only
    forged rows can say, counts as the nearer, at equal distance as ancestor.

    Raises:
        Exhausted: there are so many that the walk takes too long.
    """
    try:
        async with database.acquire() as connection, connection.transaction(isolation="repeatable_read", readonly=True):
            await connection.execute(f"SET LOCAL statement_timeout = '{PATIENCE}'")
            up = await _walked(connection, blueprint_id, ancestors, limit, here="child_id", there="parent_id")
            down = await _walked(connection, blueprint_id, descendants, limit, here="parent_id", there="child_id")
            generations = _nearest(up, down)
            chosen = sorted(generations, key=lambda one: (abs(generations[one]), generations[one], one))
            kept = chosen[:limit]
            known = await connection.fetch(
                "SELECT blueprint_id, name, created_by FROM urza.blueprints WHERE blueprint_id = ANY($1)", kept
            )
            edges = await connection.fetch(
                """SELECT parent_id, child_id FROM urza.lineage
                   WHERE child_id = ANY($1) AND parent_id = ANY($1) ORDER BY 1, 2""",
                kept,
            )
    except asyncpg.QueryCanceledError:
        raise Exhausted(
            f"the lineage of {blueprint_id} is too large to walk so far", hint="ask for fewer generations"
        ) from None
    names = {row["blueprint_id"]: (row["name"], row["created_by"]) for row in known}
    return Lineage(
        tuple(Relative(one, generations[one], *names.get(one, ())) for one in kept),
        tuple((row["parent_id"], row["child_id"]) for row in edges),
        len(chosen) > limit,
    )


async def _walked(
    connection: Connection, start: str, depth: int, limit: int, *, here: str, there: str
) -> dict[str, int]:
    rows = await connection.fetch(_WALK.format(here=here, there=there), start, depth, limit + 1)
    return {row["blueprint_id"]: row["distance"] for row in rows}


def _nearest(up: dict[str, int], down: dict[str, int]) -> dict[str, int]:
    found = {one: -distance for one, distance in up.items()}
    for one, distance in down.items():
        if one not in found or distance < -found[one]:
            found[one] = distance
    return found
