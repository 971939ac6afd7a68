"""The nursery: every interface Karn has met and every design it knows there, in PostgreSQL. The rows are the truth."""

from __future__ import annotations

import datetime as dt
import enum
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import asyncpg

from esper_core.blueprint.interface import SlotInterface
from esper_core.blueprint.ir import BlueprintIR
from esper_core.bus.database import Connection, Pool
from esper_core.errors import InvalidInput, NotFound
from esper_core.kernel.record import KernelRecord, KernelStatus, Lesson
from services import page
from services.karn.design import UNTRIED, Design, Fieldwork, Specimen


class State(enum.IntEnum):
    """How a design is getting on; the numbers equal those of ``esper.karn.v1.ProposalState``."""

    PROPOSED = 1
    BUILDING = 2
    MEASURED = 3
    FAILED = 4
    REJECTED = 5
    UNJUDGED = 6
    """Built, and not judged in time; a verdict that comes later still counts."""


@dataclass(frozen=True)
class Known:
    """An interface."""

    interface: SlotInterface
    run_id: str = ""
    level: int = 1
    measured: int = 0


@dataclass(frozen=True)
class Tale:
    """Where a design comes from: what made it, why it was chosen, what was expected of it."""

    operator: str
    why: str = ""
    search_id: str = ""
    generation: int = 0
    expected: dict[str, list[float]] = field(default_factory=dict)
    """``worth`` and ``learned`` as [mean, half width of the 90 % interval]."""


@dataclass(frozen=True)
class Row:
    """A design as it stands."""

    design: Design
    symbols: dict[str, int]
    tale: Tale
    state: State
    serial: int = 0
    build_id: str = ""
    kernel_id: str = ""
    lessons: tuple[Lesson, ...] = ()
    forward_seconds: float | None = None
    reason: str = ""
    field: Fieldwork = UNTRIED
    created: dt.datetime | None = None

    @property
    def specimen(self) -> Specimen | None:
        """For the archive, once it was measured, found fit and taught."""
        if self.state is not State.MEASURED or not self.lessons:
            return None
        return Specimen(self.design, self.lessons, self.forward_seconds, self.field)


_SELECT = """
SELECT d.*, i.interface, coalesce(r.grafts, 0) AS grafts, coalesce(r.kept, 0) AS kept,
       coalesce(r.rolled_back, 0) AS rolled_back
FROM karn.designs d JOIN karn.interfaces i USING (interface_id)
LEFT JOIN LATERAL (
    SELECT count(*) AS grafts, count(*) FILTER (WHERE kept) AS kept, count(*) FILTER (WHERE rolled_back) AS rolled_back
    FROM karn.reports WHERE kernel_id = d.kernel_id
) r ON true
"""


class Nursery:
    """Writers take the connection of their transaction, readers the pool."""

    def __init__(self, database: Pool) -> None:
        self._database = database

    async def meet(self, connection: Connection, interface: SlotInterface, run_id: str = "") -> bool:
        """Note an interface; True when it is new."""
        tag = await connection.execute(
            "INSERT INTO karn.interfaces (interface_id, interface, run_id) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
            interface.id,
            interface.model_dump_json(),
            run_id,
        )
        return bool(tag == "INSERT 0 1")

    async def interfaces(self, size: int = 1000) -> list[Known]:
        """Newest first."""
        rows = await self._database.fetch(
            """SELECT i.interface, i.run_id, i.level, count(d.form) FILTER (WHERE d.state = 3) AS measured
               FROM karn.interfaces i LEFT JOIN karn.designs d USING (interface_id)
               GROUP BY i.interface_id ORDER BY i.serial DESC LIMIT $1""",
            size,
        )
        return [Known(_interface(row), row["run_id"], row["level"], row["measured"]) for row in rows]

    async def interface(self, given: str) -> Known:
        """The interface of that id or prefix; without one, that with most designs.

        Raises:
            NotFound: there is none.
            InvalidInput: several begin so.
        """
        known = await self.interfaces()
        if not known:
            raise NotFound(
                "no slot interface is known yet", hint="train a run first, for example: `esperctl train digits`"
            )
        if not given:
            return max(known, key=lambda each: each.measured)
        wanted = given if given.startswith("interface-") else f"interface-{given}"
        found = [each for each in known if each.interface.id.startswith(wanted)]
        if len(found) > 1:
            raise InvalidInput(f"interface {given!r} is ambiguous", hint="type more of it")
        if not found:
            raise NotFound(f"no interface {given[:40]!r}", hint="`esperctl karn interfaces` lists them")
        return found[0]

    async def raise_level(self, connection: Connection, interface_id: str, level: int) -> None:
        """Ask for harder exercises from now on; never for easier ones."""
        await connection.execute(
            "UPDATE karn.interfaces SET level = greatest(level, $2) WHERE interface_id = $1", interface_id, level
        )

    async def propose(self, connection: Connection, row: Row) -> bool:
        """Keep a proposal; False when its form was tried, or is being tried, already."""
        design = row.design
        tag = await connection.execute(
            """INSERT INTO karn.designs (interface_id, form, ir, blueprint_id, symbols, state, search_id, generation,
                   operator, why, expected, units)
               VALUES ($1, $2, $3, $4, $5, 1, $6, $7, $8, $9, $10, $11) ON CONFLICT DO NOTHING""",
            design.interface.id,
            design.form,
            design.ir.model_dump_json(),
            design.blueprint_id,
            json.dumps(row.symbols),
            row.tale.search_id,
            row.tale.generation,
            row.tale.operator,
            row.tale.why,
            json.dumps(row.tale.expected),
            design.units,
        )
        return bool(tag == "INSERT 0 1")

    async def judged(self, connection: Connection, record: KernelRecord) -> Design | None:
        """Note what Urabrask said of a kernel, whoever had it built; None while it has said nothing."""
        state = {
            KernelStatus.VALIDATED: State.MEASURED,
            KernelStatus.REJECTED: State.REJECTED,
            KernelStatus.RETIRED: State.REJECTED,
        }.get(record.status)
        if state is None:
            return None
        manifest, found = record.manifest, record.measurement
        bound = manifest.blueprint.bind(manifest.symbols)
        source = manifest.blueprint.id
        own = manifest.blueprint.model_copy(update={"symbols": bound})
        design = Design(own, manifest.interface, source if own.id != source else "")
        lessons = [lesson.model_dump() for lesson in found.lessons] if found else []
        await self.meet(connection, manifest.interface)
        await connection.execute(
            """INSERT INTO karn.designs AS d (interface_id, form, ir, blueprint_id, symbols, state, operator, units,
                   kernel_id, lessons, forward_seconds, reason, judged)
               VALUES ($1, $2, $3, $4, $5, $6, 'found', $7, $8, $9, $10, $11, now())
               ON CONFLICT (interface_id, form) DO UPDATE SET state = excluded.state, kernel_id = excluded.kernel_id,
                   lessons = excluded.lessons, forward_seconds = excluded.forward_seconds, reason = excluded.reason,
                   judged = excluded.judged""",
            design.interface.id,
            design.form,
            own.model_dump_json(),
            source,
            json.dumps(bound),
            int(state),
            design.units,
            manifest.kernel_id,
            json.dumps(lessons),
            found.forward_seconds / found.batch if found else None,
            record.reason[:500],
        )
        return design

    async def submitted(self, row: Row, build_id: str) -> None:
        """The forge has it."""
        await self._move(row, "state = 2, build_id = $3", build_id)

    async def failed(self, row: Row, reason: str) -> None:
        """It cannot be built."""
        await self._move(row, "state = 4, reason = $3", reason[:500])

    async def overdue(self, row: Row, kernel_id: str, patience_seconds: float) -> bool:
        """Note that its kernel is there and has no verdict; whether that has been so for longer than the patience."""
        found = await self._database.fetchval(
            """UPDATE karn.designs SET kernel_id = $3, built = coalesce(built, now())
               WHERE interface_id = $1 AND form = $2 AND state = 2
               RETURNING built + make_interval(secs => $4) < now()""",
            row.design.interface.id,
            row.design.form,
            kernel_id,
            patience_seconds,
        )
        return bool(found)

    async def wait_anew(self) -> None:
        """Count the patience from now on: while nobody looked, or the library was away, no verdict could be seen."""
        await self._database.execute("UPDATE karn.designs SET built = now() WHERE state = 2 AND built IS NOT NULL")

    async def unjudged(self, connection: Connection, row: Row, reason: str) -> bool:
        """Wait for its verdict no longer; whether no verdict on any kernel has come in since it was built."""
        silent = await connection.fetchval(
            """UPDATE karn.designs d SET state = 6, reason = $3 WHERE interface_id = $1 AND form = $2 AND state = 2
               RETURNING NOT EXISTS (SELECT FROM karn.designs other WHERE other.judged >= d.built)""",
            row.design.interface.id,
            row.design.form,
            reason[:500],
        )
        return bool(silent)

    async def report(
        self, connection: Connection, report_id: str, kernel_id: str, *, kept: bool, rolled_back: bool
    ) -> None:
        """Note what became of a kernel in a run."""
        await connection.execute(
            "INSERT INTO karn.reports VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING",
            report_id,
            kernel_id,
            kept,
            rolled_back,
        )

    async def open(self, state: State, size: int) -> list[Row]:
        """The oldest designs in that state."""
        rows = await self._database.fetch(f"{_SELECT} WHERE d.state = $1 ORDER BY d.serial LIMIT $2", int(state), size)
        return [_row(row) for row in rows]

    async def all(self, interface_id: str) -> list[Row]:
        """Everything known at an interface, oldest first."""
        rows = await self._database.fetch(f"{_SELECT} WHERE d.interface_id = $1 ORDER BY d.serial", interface_id)
        return [_row(row) for row in rows]

    async def newest(
        self, *, search_id: str = "", interface_id: str = "", state: int = 0, size: int = page.DEFAULT, token: str = ""
    ) -> tuple[Sequence[Row], str]:
        """A page of designs, newest first; empty and 0 do not restrict.

        Raises:
            InvalidInput: the token is none of ours.
        """
        rows = await self._database.fetch(
            f"""{_SELECT} WHERE ($1 = '' OR d.search_id = $1) AND ($2 = '' OR d.interface_id = $2)
                AND ($3 = 0 OR d.state = $3) AND ($4 = 0 OR d.serial < $4) ORDER BY d.serial DESC LIMIT $5""",
            search_id,
            interface_id,
            state,
            page.before(token),
            size + 1,
        )
        return page.cut([_row(row) for row in rows], size, lambda row: row.serial)

    async def _move(self, row: Row, change: str, *values: str) -> None:
        await self._database.execute(
            f"UPDATE karn.designs SET {change} WHERE interface_id = $1 AND form = $2 AND state IN (1, 2)",  # noqa: S608
            row.design.interface.id,
            row.design.form,
            *values,
        )


def _interface(row: asyncpg.Record) -> SlotInterface:
    return SlotInterface.model_validate_json(row["interface"])


def _row(row: asyncpg.Record) -> Row:
    ir = BlueprintIR.model_validate_json(row["ir"])
    symbols: dict[str, int] = json.loads(row["symbols"])
    source = row["blueprint_id"] if row["blueprint_id"] != ir.id else ""
    return Row(
        design=Design(ir, _interface(row), source),
        symbols=symbols,
        tale=Tale(
            row["operator"],
            row["why"],
            row["search_id"],
            row["generation"],
            json.loads(row["expected"] or "null") or {},
        ),
        state=State(row["state"]),
        serial=row["serial"],
        build_id=row["build_id"] or "",
        kernel_id=row["kernel_id"] or "",
        lessons=tuple(Lesson.model_validate(lesson) for lesson in json.loads(row["lessons"])),
        forward_seconds=row["forward_seconds"],
        reason=row["reason"],
        field=Fieldwork(row["grafts"], row["kept"], row["rolled_back"]),
        created=row["created"],
    )
