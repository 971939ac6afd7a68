"""What became of kernels in the field, and how interesting that makes them.

Every deed has a number: a training process fetched the kernel, or a graft of it ended. A kernel's interest is the sum of
its deeds' weights, each halved for every ``HALF_LIFE`` deeds that have been done since with any kernel: fetched 1, graft
ended 1, became part of its host 4 more. Age is counted in deeds because clocks are not trusted, and a logarithm is
stored, because then the order of two kernels changes only when something is done with one of them ("forward decay",
Cormode, Shkapenyuk, Srivastava and Xu 2009): an index can be sorted by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import asyncpg

from esper_core.bus.database import Connection, Pool
from esper_core.bus.envelope import Event
from esper_core.pb.esper.core.v1 import lifecycle_pb2

HALF_LIFE = 1000
"""Deeds after which a deed counts half."""
FETCHED, ENDED, FOSSILIZED = 1.0, 1.0, 4.0
READER = "tolaria"
"""The principal whose fetching counts: training processes; others look at kernels for other reasons."""

_OUTCOMES = {
    lifecycle_pb2.SEED_STATE_FOSSILIZED: "fossilized",
    lifecycle_pb2.SEED_STATE_CULLED: "culled",
    lifecycle_pb2.SEED_STATE_ROLLED_BACK: "rolled_back",
}
_LEAST = -60  # powers of two below this are nothing beside 1


@dataclass(frozen=True)
class Usage:
    """What became of a kernel."""

    streams: int = 0
    fossilized: int = 0
    culled: int = 0
    rolled_back: int = 0
    contribution: float | None = None
    """Mean, in loss units, of the grafts whose contribution was measured."""
    interest: float = 0.0
    """At present."""

    @property
    def tried(self) -> int:
        return self.fossilized + self.culled + self.rolled_back


class Field:
    """Keeps count."""

    def __init__(self, database: Pool) -> None:
        self._database = database

    async def fetched(self, kernel_id: str) -> None:
        """A training process has fetched it."""
        async with self._database.acquire() as connection, connection.transaction():
            await _count(connection, kernel_id, FETCHED, "streams", None)

    async def handle(self, connection: Connection, event: Event) -> None:
        """Count a field report, in the transaction that notes it as counted. Kernels that are not here are passed over."""
        report = event.message
        column = _OUTCOMES[report.outcome]
        weight = ENDED + (FOSSILIZED if column == "fossilized" else 0.0)
        contribution = report.contribution if report.HasField("contribution") else None
        await _count(connection, report.kernel_id, weight, column, contribution)


async def _count(
    connection: Connection, kernel_id: str, weight: float, column: str, contribution: float | None
) -> None:
    found = await connection.fetchval(
        f"""WITH deed AS (SELECT nextval('urza.deeds') / {HALF_LIFE}.0::double precision + $2 AS worth)
            UPDATE urza.kernels k SET interest = CASE WHEN k.interest = '-infinity' THEN d.worth
                ELSE greatest(k.interest, d.worth)
                   + ln(1 + power(2::double precision, greatest(-abs(k.interest - d.worth), {_LEAST}))) / ln(2::double precision)
                END
            FROM deed d WHERE k.kernel_id = $1 RETURNING true""",  # noqa: S608
        kernel_id,
        math.log2(weight),
    )
    if not found:
        return
    given = contribution is not None and math.isfinite(contribution)
    await connection.execute(
        f"""INSERT INTO urza.usage AS u (kernel_id, {column}, measured, contribution) VALUES ($1, 1, $2, $3)
            ON CONFLICT (kernel_id) DO UPDATE SET {column} = u.{column} + 1,
                measured = u.measured + excluded.measured, contribution = u.contribution + excluded.contribution""",  # noqa: S608
        kernel_id,
        int(given),
        contribution if given else 0.0,
    )


def usage(row: asyncpg.Record) -> Usage:
    """What stands in a row of ``KERNEL``."""
    present = row["interest"] - row["deeds"] / HALF_LIFE
    if row["streams"] is None:
        return Usage(interest=2.0**present)
    mean = row["contribution"] / row["measured"] if row["measured"] else None
    return Usage(row["streams"], row["fossilized"], row["culled"], row["rolled_back"], mean, 2.0**present)
