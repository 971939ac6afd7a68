"""Blueprints in the library: immutable, named by their contents, with their lineage. Knows neither gRPC nor torch.

A blueprint that can be constructed at all has known operations, no cycles and bounded size; what it costs at a slot is
only settled when a kernel is built of it.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

import asyncpg

from esper_core.blueprint.catalogue import catalogue
from esper_core.blueprint.ir import BlueprintIR
from esper_core.bus.database import Pool
from esper_core.errors import InvalidInput, NotFound, nearest
from services import page

CATALOGUE = "catalogue"
"""Uploader's name of the built-in designs."""
SHORTEST_PREFIX = 12

_FIELDS = "blueprint_id, serial, ir, created, created_by"


@dataclass(frozen=True)
class StoredBlueprint:
    """A blueprint, when it came and who brought it."""

    blueprint_id: str
    serial: int
    """Counts up from upload to upload."""
    blueprint: BlueprintIR
    created: dt.datetime
    created_by: str


class Blueprints:
    """The shelf of blueprints."""

    def __init__(self, database: Pool) -> None:
        self._database = database

    async def seed(self) -> int:
        """Put the built-in catalogue on the shelf; the number that was not there yet."""
        return sum([await self.put(ir, CATALOGUE) for ir in catalogue().values()])

    async def put(self, ir: BlueprintIR, created_by: str) -> bool:
        """Keep ``ir``; False when it was there already."""
        async with self._database.acquire() as connection, connection.transaction():
            tag = await connection.execute(
                """INSERT INTO urza.blueprints (blueprint_id, name, ir, created_by) VALUES ($1, $2, $3, $4)
                   ON CONFLICT DO NOTHING""",
                ir.id,
                ir.name,
                ir.canonical().decode(),
                created_by,
            )
            await connection.executemany(
                "INSERT INTO urza.lineage (child_id, parent_id) VALUES ($1, $2) ON CONFLICT DO NOTHING",
                [(ir.id, parent) for parent in ir.parent_ids],
            )
        return bool(tag == "INSERT 0 1")

    async def get(self, wanted: str) -> StoredBlueprint:
        """The blueprint of that id, prefix or name; of several with one name, the newest.

        Raises:
            NotFound: none.
            InvalidInput: a prefix that several share.
        """
        rows = await self._database.fetch(
            f"""SELECT {_FIELDS} FROM urza.blueprints
                WHERE blueprint_id = $1 OR name = $1
                   OR ($2 AND starts_with(blueprint_id, $1)) ORDER BY serial DESC LIMIT 20""",  # noqa: S608
            wanted,
            wanted.startswith("blueprint-") and len(wanted) >= SHORTEST_PREFIX,
        )
        if not rows:
            names = await self._database.fetch("SELECT DISTINCT name FROM urza.blueprints LIMIT 200")
            raise NotFound(f"no blueprint {wanted!r}", hint=nearest(wanted, [row["name"] for row in names]))
        found = [_stored(row) for row in rows]
        if len(found) > 1 and found[0].blueprint.name != wanted:
            some = ", ".join(sorted(other.blueprint_id[:24] for other in found)[:4])
            raise InvalidInput(f"several blueprints begin with {wanted!r}", hint=f"give more digits: {some}")
        return found[0]

    async def newest(self, size: int, token: str) -> tuple[list[StoredBlueprint], bool]:
        """Blueprints, newest first, and whether there are more.

        Raises:
            InvalidInput: the token is none of ours.
        """
        rows = await self._database.fetch(
            f"SELECT {_FIELDS} FROM urza.blueprints WHERE $1 = 0 OR serial < $1 ORDER BY serial DESC LIMIT $2",  # noqa: S608
            page.before(token),
            size + 1,
        )
        return [_stored(row) for row in rows[:size]], len(rows) > size


def _stored(row: asyncpg.Record) -> StoredBlueprint:
    ir = BlueprintIR.model_validate_json(row["ir"])
    return StoredBlueprint(row["blueprint_id"], row["serial"], ir, row["created"], row["created_by"])
