"""Retagging: as more kernels are measured the tiers move, and kernels judged long ago get the tags they have by now.

Only kernels whose tags change are told to the library, each with its standing measurement and a fresh statement, for a
statement covers the tags. The bus is not told: a verdict is news, a tag is not; whoever selects by tags asks the library.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import asyncpg

from esper_core import log
from esper_core.bus.database import Connection, Pool
from esper_core.errors import Conflict, NotFound, Unavailable
from esper_core.kernel.record import KernelStatus, Measurement
from services.bell import Bell
from services.urabrask import risk
from services.urabrask.experience import MODELS
from services.urabrask.library import Library
from services.urabrask.tags import Figures, bounds, retagged
from services.urabrask.verdict import Verdict

EVERY_SECONDS = 60.0
"""Looked at least this often, in case a ring was lost."""
SETTLE_SECONDS = 2.0
"""Between two passes: kernels come in bursts, and one pass serves them all."""

LOG = log.get("urabrask")

_VALIDATED = """SELECT kernel_id, measurement, tags, design, risk FROM urabrask.evaluations
    WHERE verdict = 2 AND measurement IS NOT NULL"""
_STANDING = f"{_VALIDATED} AND phase = 5"


@dataclass(frozen=True)
class Standing:
    """A validated kernel as it was last judged."""

    kernel_id: str
    measurement: Measurement
    tags: tuple[str, ...]
    parameters: int
    risk: float

    @property
    def figures(self) -> Figures:
        return Figures.of(self.measurement, self.parameters)


@dataclass(frozen=True)
class Change:
    """Other tags for a kernel."""

    kernel: Standing
    tags: tuple[str, ...]

    @property
    def removed(self) -> list[str]:
        return sorted(set(self.kernel.tags) - set(self.tags))

    @property
    def added(self) -> list[str]:
        return sorted(set(self.tags) - set(self.kernel.tags))


def changes(kernels: Iterable[Standing]) -> list[Change]:
    """Those whose tags are not what they would be given today, each among its own kind of machine."""
    kinds = defaultdict[str, list[Standing]](list)
    for kernel in kernels:
        kinds[kernel.measurement.target].append(kernel)
    found = []
    for kind in kinds.values():
        limits = bounds([kernel.figures for kernel in kind])
        for kernel in kind:
            tags = tuple(retagged(kernel.tags, kernel.figures, limits, kernel.risk))
            if set(tags) != set(kernel.tags):
                found.append(Change(kernel, tags))
    return found


class Retag:
    """The pass over all validated kernels.

    Args:
        database: where the evaluations are.
        bell: rings when there may be something to do.
        library: which is told.
    """

    def __init__(self, database: Pool, bell: Bell, library: Library) -> None:
        self._database, self._bell, self._library = database, bell, library

    async def run(self) -> None:
        """Retag whenever the population or the model of risk has changed, until the platform begins to stop.

        Raises:
            Unavailable: the library is away.
        """
        quiet = await self._expect_quiet()
        while quiet:
            rung = self._bell.expect(MODELS)
            await self.once()
            try:
                await self._bell.wait(rung, timeout=EVERY_SECONDS)
            except Unavailable:
                return
            quiet = await self._expect_quiet()

    async def once(self, *, dry_run: bool = False) -> tuple[int, list[Change]]:
        """How many kernels were looked at, and what changed or, with ``dry_run``, would.

        Raises:
            Unavailable: the library is away; what was changed by then stays.
        """
        await self._backfill()
        kernels = [_standing(row) for row in await self._database.fetch(f"{_STANDING} AND design IS NOT NULL")]
        wanted = changes(kernels)
        if dry_run:
            return len(kernels), wanted
        done = [change for change in wanted if await self._apply(change)]
        if done:
            LOG.info("kernels.retagged", examined=len(kernels), changed=len(done))
        return len(kernels), done

    async def _expect_quiet(self) -> bool:
        """Let a burst pass; False when the platform stops meanwhile."""
        try:
            await self._bell.wait(self._bell.expect("urabrask-nothing"), timeout=SETTLE_SECONDS)
        except Unavailable:
            return False
        return True

    async def _apply(self, change: Change) -> bool:
        """Tell the library, unless the kernel is being judged anew or was withdrawn meanwhile."""
        kernel = change.kernel
        async with self._database.acquire() as connection, connection.transaction():
            held = await connection.fetchval(
                f"""{_STANDING} AND kernel_id = $1 AND tags = $2 FOR UPDATE SKIP LOCKED""",
                kernel.kernel_id,
                list(kernel.tags),
            )
            if held is None:
                return False
            try:
                record = await self._library.find(kernel.kernel_id)
                if record.status is KernelStatus.VALIDATED:
                    await self._library.tell(record, Verdict.fit(kernel.measurement, change.tags))
            except (Conflict, NotFound) as error:
                LOG.warning("kernel.not_retagged", kernel_id=kernel.kernel_id, reason=error.message)
                return False
            if record.status is not KernelStatus.VALIDATED:
                await _withdrawn(connection, kernel.kernel_id, record.status, record.reason)
                return False
            await connection.execute(
                "UPDATE urabrask.evaluations SET tags = $2 WHERE kernel_id = $1", kernel.kernel_id, list(change.tags)
            )
        return True

    async def _backfill(self) -> None:
        """Note what the papers say of kernels that were judged before that was kept."""
        rows = await self._database.fetch(f"{_STANDING} AND design IS NULL")
        for row in rows:
            try:
                record = await self._library.find(row["kernel_id"])
            except NotFound:
                continue
            await self._database.execute(
                "UPDATE urabrask.evaluations SET design = $2, risk = coalesce(risk, $3) WHERE kernel_id = $1",
                row["kernel_id"],
                json.dumps(risk.design(record.manifest)),
                risk.UNKNOWN,
            )


async def population(pool: Pool, target: str) -> list[Figures]:
    """Figures of every kernel found VALIDATED on machines of kind ``target``."""
    rows = await pool.fetch(f"{_VALIDATED} AND design IS NOT NULL AND measurement ->> 'target' = $1", target)
    return [_standing(row).figures for row in rows]


async def _withdrawn(connection: Connection, kernel_id: str, status: KernelStatus, reason: str) -> None:
    """A kernel that the library withdrew counts no longer among those that tiers are cut from."""
    await connection.execute(
        "UPDATE urabrask.evaluations SET verdict = $2, reason = $3 WHERE kernel_id = $1", kernel_id, int(status), reason
    )


def _standing(row: asyncpg.Record) -> Standing:
    return Standing(
        kernel_id=row["kernel_id"],
        measurement=Measurement.model_validate_json(row["measurement"]),
        tags=tuple(row["tags"]),
        parameters=int(json.loads(row["design"])["parameters"]),
        risk=risk.UNKNOWN if row["risk"] is None else row["risk"],
    )
