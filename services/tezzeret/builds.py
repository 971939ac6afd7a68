"""Builds: the wishes for kernels, who works on which, and what came of them. Knows PostgreSQL, neither gRPC nor torch.

The rows are the work queue. Wishes arrive on JetStream's (a durable pull consumer that acknowledges after the row is
committed); from there on the row alone says who works on what, for four reasons:

- A claim's outcome and the event that announces it are one transaction. A message acknowledged after that commit can be
  delivered again, one acknowledged before can be lost: the row would have to arbitrate anyway, and two queues can disagree.
- The most useful build is next whenever it was wished, and a build that waits for its surroundings waits for its own time;
  a stream hands out what came first and counts deliveries.
- A forge works on while NATS is away, and a wiped NATS forgets no wish.
- What is queued, who holds it and for how long can be asked for in SQL.

A claim is a lease: it must be renewed while the work goes on, and a build whose lease ran out (its forge died) is
claimed again by whoever asks next. Every write after a claim is guarded by the claimant's name, so that a forge which
lost its lease cannot overwrite the outcome of the one that took over. A forge claims only what is for its own kind of
machine and toolchain.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from typing import Any

import asyncpg
from pydantic import BaseModel, ConfigDict

from esper_core.blueprint.analyse import analyse
from esper_core.blueprint.interface import SlotInterface, canonical_json
from esper_core.blueprint.ir import BlueprintIR
from esper_core.bus.database import Connection, Pool
from esper_core.errors import NotFound, Unsupported, nearest
from esper_core.ids import content_id
from esper_core.kernel.manifest import NativeFigures
from services.tezzeret.toolchain import Toolchain

PIPELINE = "standard"
COMPILING = "aggressive"
PIPELINES = ("fast", PIPELINE, COMPILING)
"""Ever more is done to a kernel: built and compared; exported as a graph and compared; compiled for this machine."""
ROWS = 64
"""Batch that memory is estimated for, and that native kernels are timed at."""
LEASE_SECONDS = 12.0
"""After its last sign of life a forge's builds are anybody's; it gives three signs in that time."""


class BuildState(enum.IntEnum):
    """How a build is getting on; the numbers equal those of ``esper.tezzeret.v1.BuildState``."""

    QUEUED = 1
    """Waits for a forge."""
    RUNNING = 2
    """A forge works on it and renews its lease."""
    DONE = 3
    """The kernel is in the library."""
    FAILED = 4
    """It cannot be built; asking for it again queues it again."""


class Estimate(BaseModel):
    """What static analysis says of a kernel; zeros where nothing was analysed yet."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters: int = 0
    """Trainable parameters."""
    flops: int = 0
    """Of one sample's forward pass."""
    memory_bytes: int = 0
    """Of training it on a batch of ``ROWS``; see ``Analysis.memory_bytes``."""

    @classmethod
    def of(cls, ir: BlueprintIR, interface: SlotInterface, symbols: Mapping[str, int]) -> Estimate:
        """Raises: Refused: static analysis does; its code says why."""
        found = analyse(ir, interface, symbols)
        return cls(parameters=found.parameters, flops=found.flops, memory_bytes=found.memory_bytes(ROWS))


class Wish(BaseModel):
    """What is to be built. ``rank``: 0 is built before 1, and so on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    blueprint_id: str
    blueprint_name: str = ""
    interface: SlotInterface
    symbols: Mapping[str, int] = {}
    pipeline: str = PIPELINE
    target: str = ""
    """Machine kind it is for; empty in wishes of those who do not know the forges."""
    toolchain: str = ""
    """Name of the toolchain; empty with ``target``."""
    rank: int = 0
    estimate: Estimate = Estimate()

    @property
    def build_id(self) -> str:
        """``build-<sha256>``: equal wishes for one kind of machine and one toolchain are one build."""
        parts = [self.blueprint_id, self.interface.id, dict(self.symbols), self.pipeline]
        if self.target or self.toolchain:
            parts += [self.target, self.toolchain]
        return content_id("build", canonical_json(parts))

    def on(self, toolchain: Toolchain) -> Wish:
        """The same for forges of that toolchain, unless it is for certain ones already."""
        if self.target or self.toolchain:
            return self
        return self.model_copy(update={"target": toolchain.target, "toolchain": toolchain.name})


class Build(BaseModel):
    """A wish and how it is getting on; field names equal those of ``esper.tezzeret.v1.Build``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    build_id: str
    blueprint_id: str
    blueprint_name: str
    interface: SlotInterface
    interface_id: str
    symbols: Mapping[str, int]
    pipeline: str
    state: BuildState
    kernel_id: str = ""
    reason: str = ""
    attempts: int = 0
    failures: int = 0
    seconds: float = 0.0
    target: str = ""
    toolchain: str = ""
    refusal: int = 0
    """See ``esper_core.blueprint.refusal``; 0 where it was not refused."""
    parameters: int = 0
    flops: int = 0
    memory_bytes: int = 0
    native_ratio: float | None = None
    """Native over eager seconds of a step; None where nothing was compiled."""
    native_shipped: bool = False
    note: str = ""
    """Why the pipeline stopped short of what was asked, though the kernel is whole."""


_FIELDS = """build_id, blueprint_id, blueprint_name, interface, interface_id, symbols, pipeline, state,
    coalesce(kernel_id, '') AS kernel_id, reason, attempts, failures, seconds, target, toolchain,
    refusal, parameters, flops, memory_bytes, native_ratio, native_shipped, note"""


def check_pipeline(name: str) -> None:
    """Raises: Unsupported: no pipeline of that name."""
    if name not in PIPELINES:
        raise Unsupported(f"no build pipeline {name!r}", hint=nearest(name, PIPELINES))


async def add(connection: Connection, wish: Wish) -> bool:
    """Queue ``wish`` unless it is known; a failed one is queued again. True when there is new work."""
    again = """ON CONFLICT (build_id) DO UPDATE
        SET state = 1, reason = '', refusal = 0, attempts = 0, failures = 0, not_before = now(), updated = now() WHERE builds.state = 4"""
    return await _insert(connection, wish, again)


async def expect(connection: Connection, wish: Wish) -> bool:
    """Queue ``wish`` unless it was ever known, whatever came of it. True when there is new work."""
    return await _insert(connection, wish, "ON CONFLICT (build_id) DO NOTHING")


async def _insert(connection: Connection, wish: Wish, otherwise: str) -> bool:
    row = await connection.fetchrow(
        f"""INSERT INTO tezzeret.builds
               (build_id, blueprint_id, blueprint_name, interface, interface_id, symbols, pipeline, rank,
                target, toolchain, parameters, flops, memory_bytes)
           VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13) {otherwise} RETURNING build_id""",  # noqa: S608
        wish.build_id,
        wish.blueprint_id,
        wish.blueprint_name,
        wish.interface.model_dump_json(),
        wish.interface.id,
        json.dumps(dict(wish.symbols)),
        wish.pipeline,
        wish.rank,
        wish.target,
        wish.toolchain,
        wish.estimate.parameters,
        wish.estimate.flops,
        wish.estimate.memory_bytes,
    )
    return row is not None


async def get(pool: Pool, build_id: str) -> Build:
    """Raises: NotFound."""
    row = await pool.fetchrow(f"SELECT {_FIELDS} FROM tezzeret.builds WHERE build_id = $1", build_id)  # noqa: S608
    if row is None:
        raise NotFound(f"no build {build_id[:18]}…", hint="`esperctl blueprint submit` queues one")
    return _build(row)


async def newest(pool: Pool, *, state: int, interface_id: str, size: int) -> list[Build]:
    """Builds, newest first; 0 and empty do not restrict."""
    rows = await pool.fetch(
        f"""SELECT {_FIELDS} FROM tezzeret.builds
            WHERE ($1 = 0 OR state = $1) AND ($2 = '' OR interface_id = $2) ORDER BY serial DESC LIMIT $3""",  # noqa: S608
        state,
        interface_id,
        size,
    )
    return [_build(row) for row in rows]


async def claim(pool: Pool, forge: str, toolchain: Toolchain, lease_seconds: float = LEASE_SECONDS) -> Build | None:
    """Take the most useful build for ``toolchain`` that nobody works on, or ``None`` when there is none."""
    row = await pool.fetchrow(
        f"""UPDATE tezzeret.builds
            SET state = 2, claimed_by = $1, lease_until = now() + make_interval(secs => $2),
                attempts = attempts + 1, begun = now(), updated = now()
            WHERE build_id = (
                SELECT build_id FROM tezzeret.builds
                WHERE ((state = 1 AND not_before <= now()) OR (state = 2 AND lease_until < now()))
                  AND target IN ('', $3) AND toolchain IN ('', $4)
                ORDER BY rank, serial LIMIT 1 FOR UPDATE SKIP LOCKED)
            RETURNING {_FIELDS}""",  # noqa: S608
        forge,
        lease_seconds,
        toolchain.target,
        toolchain.name,
    )
    return None if row is None else _build(row)


async def renew(pool: Pool, build_id: str, forge: str, lease_seconds: float = LEASE_SECONDS) -> bool:
    """Keep a claim; False when it was lost."""
    return await _guarded(pool, "lease_until = now() + make_interval(secs => $3)", build_id, forge, lease_seconds)


async def finish(
    connection: Connection,
    build_id: str,
    forge: str,
    *,
    kernel_id: str,
    name: str,
    seconds: float,
    native: NativeFigures | None = None,
) -> bool:
    """Mark a claimed build DONE; False when the claim was lost.

    ``native``: what came of compiling it, where that was tried; why it was not shipped becomes the build's note.
    """
    change = """state = 3, kernel_id = $3, blueprint_name = $4, seconds = $5, reason = '',
        native_ratio = $6, native_shipped = $7, note = $8"""
    ratio = native.step_ratio if native is not None and native.repetitions else None
    outcome = (ratio, native is not None and native.shipped, native.reason if native is not None else "")
    return await _guarded(connection, f"{change}, {_FREE}", build_id, forge, kernel_id, name, seconds, *outcome)


async def fail(
    on: Connection | Pool, build_id: str, forge: str, *, reason: str, seconds: float, refusal: int = 0
) -> bool:
    """Mark a claimed build FAILED; False when the claim was lost."""
    change = "state = 4, reason = $3, seconds = $4, refusal = $5"
    return await _guarded(on, f"{change}, {_FREE}", build_id, forge, reason[:500], seconds, refusal)


async def note_estimate(on: Connection | Pool, build_id: str, forge: str, estimate: Estimate) -> bool:
    """Note what static analysis says of a claimed build; False when the claim was lost."""
    change = "parameters = $3, flops = $4, memory_bytes = $5"
    values = (estimate.parameters, estimate.flops, estimate.memory_bytes)
    return await _guarded(on, change, build_id, forge, *values)


async def postpone(
    on: Connection | Pool, build_id: str, forge: str, *, reason: str, delay_seconds: float, counts: bool
) -> bool:
    """Put a claimed build back into the queue, not to be tried for a while; False when the claim was lost.

    ``counts``: whether the attempt just made is held against it.
    """
    count = "attempts = attempts - $5, failures = failures + 1 - $5"
    change = f"state = 1, reason = $3, not_before = now() + make_interval(secs => $4), {count}"
    return await _guarded(on, f"{change}, {_FREE}", build_id, forge, reason[:500], delay_seconds, 0 if counts else 1)


async def release(pool: Pool, forge: str) -> None:
    """Put everything that ``forge`` holds back into the queue, as if it had not been begun."""
    await pool.execute(
        f"""UPDATE tezzeret.builds SET state = 1, attempts = greatest(attempts - 1, 0), updated = now(), {_FREE}
            WHERE claimed_by = $1""",  # noqa: S608
        forge,
    )


_FREE = "claimed_by = NULL, lease_until = NULL"


async def _guarded(on: Connection | Pool, change: str, build_id: str, forge: str, *values: Any) -> bool:
    tag = await on.execute(
        f"""UPDATE tezzeret.builds SET {change}, updated = now()
            WHERE build_id = $1 AND claimed_by = $2""",  # noqa: S608
        build_id,
        forge,
        *values,
    )
    return bool(tag == "UPDATE 1")


def _build(row: asyncpg.Record) -> Build:
    fields = dict(row)
    fields["interface"] = json.loads(fields["interface"])
    fields["symbols"] = json.loads(fields["symbols"])
    return Build.model_validate(fields)
