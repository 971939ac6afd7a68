"""The worker: takes builds one after the other, has the child forge them, signs, stores and announces them.

A build that is refused is FAILED with the reason; one that failed for reasons of its surroundings is tried again, as
often as it takes while the library is away and ``MAX_FAILURES`` times otherwise. A kernel is announced in the
transaction that marks its build DONE, so every kernel is announced once even when the forge dies at any point.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import asyncpg

from esper_core import log
from esper_core.blueprint.refusal import code_of
from esper_core.bus import subjects
from esper_core.bus.database import Pool
from esper_core.bus.envelope import wrap
from esper_core.bus.outbox import enqueue
from esper_core.errors import (
    DeadlineExceeded,
    EsperError,
    Exhausted,
    Forbidden,
    Internal,
    InvalidInput,
    Unavailable,
    Unsupported,
    Untrusted,
)
from esper_core.ids import new_id, sha256
from esper_core.kernel.manifest import KernelManifest, NativeFigures
from esper_core.kernel.native import NativeRecord, convention
from esper_core.pb.esper.bus.v1 import bus_pb2
from esper_core.pb.esper.urza.v1 import urza_pb2_grpc
from services.bell import Bell
from services.child import WarmChild
from services.lease import held
from services.sandbox import Job, Limits
from services.tezzeret import builds
from services.tezzeret.builds import Build, Estimate
from services.tezzeret.designs import Designs
from services.tezzeret.forges import BEAT_SECONDS, Forge
from services.tezzeret.toolchain import here
from services.tezzeret.upload import Upload

PRINCIPAL = "tezzeret"
NEWS = "tezzeret"
MODULE = "services.tezzeret.forge"
PACED_NICE = 10
"""Enough standing to use its budget up, and far too little to take more from others in the meantime."""
LIMITS = Limits(wall_seconds=120.0, cpu_seconds=120.0, nice=PACED_NICE)
COMPILER_MODULE = "services.tezzeret.native"
COMPILER_LIMITS = Limits(wall_seconds=600.0, cpu_seconds=300.0, open_files=256, nice=PACED_NICE)
"""Compiling takes some 15 s of a core alone, and the C++ compiler's memory is its own."""
MAX_FAILURES = 3
RETRY_SECONDS = 0.5
AWAY_SECONDS = 2.0
"""Pause while the library is away; such attempts do not count."""
REFUSED = (InvalidInput, Unsupported, Untrusted, Forbidden)
"""Trying again would end the same way."""

POLITE = "ESPER_FORGE_POLITE"
"""Environment variable: with 0 the forge of this process takes what its priority gives it, as on a machine of its own."""

LOG = log.get(PRINCIPAL)


@dataclass(frozen=True)
class Made:
    """A kernel that is in the library."""

    kernel_id: str
    interface_id: str
    blueprint_name: str
    native: NativeFigures | None
    """What came of compiling it; None where nobody tried."""


class Worker:
    """One forge.

    Args:
        database: where the builds are.
        bell: rings when there may be a new one.
        urza: the library.
        designs: where blueprints are read.
        key: path of the signing key (PEM).
        limits: of the child.
        lease_seconds: how long a claim lasts without a sign of life.
        polite: whether it gives way to others on this machine; see ``services.pace``.
    """

    def __init__(
        self,
        database: Pool,
        bell: Bell,
        urza: urza_pb2_grpc.UrzaServiceStub,
        designs: Designs,
        key: Path,
        limits: Limits = LIMITS,
        lease_seconds: float = builds.LEASE_SECONDS,
        *,
        polite: bool = True,
    ) -> None:
        self._database, self._bell, self._designs = database, bell, designs
        self._upload = Upload(urza, key)
        self._lease = lease_seconds
        self._name = f"forge-{new_id()}"
        self._toolchain = here()
        self._forge = Forge(self._name, self._toolchain)
        self.child = WarmChild(MODULE, limits, polite=polite)
        self.compiler = WarmChild(COMPILER_MODULE, COMPILER_LIMITS, polite=polite)

    async def run(self) -> None:
        """Work until cancelled, or until the platform begins to stop.

        Raises:
            asyncpg.PostgresError, OSError: the database is away; what was claimed is taken up again by the next run.
        """
        beating = asyncio.create_task(self._beat())
        try:
            await builds.release(self._database, self._name)
            while True:
                rung = self._bell.expect(NEWS)
                build = await builds.claim(self._database, self._name, self._toolchain, self._lease)
                if build is None:
                    await self._bell.wait(rung)
                else:
                    await self._work(build)
        except Unavailable:
            return
        finally:
            beating.cancel()
            await self.child.close()
            await self.compiler.close()
            await builds.release(self._database, self._name)
            await self._forge.leave(self._database)

    async def _beat(self) -> None:
        """Signs of life, whatever the work is doing; one that gets lost is made good by the next."""
        while True:
            try:
                await self._forge.beat(self._database)
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
                LOG.warning("forge.beat_lost", reason=str(error))
            await asyncio.sleep(BEAT_SECONDS)

    async def _work(self, build: Build) -> None:
        started = time.monotonic()
        renew = partial(builds.renew, self._database, build.build_id, self._name, self._lease)
        try:
            async with held(renew, self._lease / 3):
                made = await self._make(build)
        except EsperError as error:
            await self._give_up(build, error, time.monotonic() - started)
            return
        await self._announce(build, made, time.monotonic() - started)

    async def _make(self, build: Build) -> Made:
        builds.check_pipeline(build.pipeline)
        design = await self._designs.get(build.blueprint_id)
        if not build.parameters:
            estimate = Estimate.of(design, build.interface, build.symbols)
            await builds.note_estimate(self._database, build.build_id, self._name, estimate)
        job = {
            "blueprint": design.model_dump(mode="json"),
            "interface": build.interface.model_dump(mode="json"),
            "symbols": dict(build.symbols),
            "pipeline": build.pipeline,
            "seed": seed_of(build.build_id),
        }
        answer, blob = await _forged(self.child, {**job, "do": "forge"}, "blob", build.build_id)
        assert blob is not None  # noqa: S101 - the forge answers only when it has written it
        manifest = KernelManifest.model_validate(answer["manifest"])
        figures, native = None, None
        if build.pipeline == builds.COMPILING:
            figures, native = await self._compile(job, build.build_id)
            manifest = _with_figures(manifest, figures)
        kernel_id = await self._upload.kernel(manifest, blob)
        if figures is not None and native is not None:
            await self._upload.native(self._record(kernel_id, figures, native), native)
        return Made(kernel_id, manifest.interface_id, design.name, figures)

    async def _compile(self, job: Job, build_id: str) -> tuple[NativeFigures, bytes | None]:
        """What came of compiling natively; a compiler that fails or dies leaves the kernel as it is."""
        order = {**job, "do": "native", "rows": builds.ROWS}
        try:
            answer, native = await _forged(self.compiler, order, "native", build_id)
        except (DeadlineExceeded, Exhausted, Internal) as error:
            return NativeFigures(rows=builds.ROWS, reason=error.message[:200]), None
        return NativeFigures.model_validate(answer["figures"]), native

    def _record(self, kernel_id: str, figures: NativeFigures, native: bytes) -> NativeRecord:
        return NativeRecord(
            kernel_id=kernel_id,
            target=self._toolchain.target,
            toolchain=convention(),
            blob_sha256=sha256(native),
            blob_bytes=len(native),
            rows=figures.rows,
            step_ratio=figures.step_ratio,
        )

    async def _announce(self, build: Build, made: Made, seconds: float) -> None:
        ready = bus_pb2.KernelReady(
            kernel_id=made.kernel_id, interface_id=made.interface_id, blueprint_name=made.blueprint_name
        )
        envelope = wrap(ready, producer=PRINCIPAL)
        async with self._database.acquire() as connection, connection.transaction():
            done = await builds.finish(
                connection,
                build.build_id,
                self._name,
                kernel_id=made.kernel_id,
                name=made.blueprint_name,
                seconds=seconds,
                native=made.native,
            )
            if done:
                await enqueue(connection, subjects.KERNEL_READY.of(), envelope)
        if done:
            await self._forge.count(self._database, done=True)
        LOG.info("build.done" if done else "build.taken_over", build_id=build.build_id, kernel_id=made.kernel_id)

    async def _give_up(self, build: Build, error: EsperError, seconds: float) -> None:
        reason = f"{type(error).__name__}: {error.message}"
        away = isinstance(error, Unavailable)
        final = isinstance(error, REFUSED) or (not away and build.failures + 1 >= MAX_FAILURES)
        LOG.warning("build.failed" if final else "build.postponed", build_id=build.build_id, reason=reason)
        if final:
            fail = partial(builds.fail, self._database, build.build_id, self._name)
            if await fail(reason=reason, seconds=seconds, refusal=code_of(error)):
                await self._forge.count(self._database, done=False)
            return
        pause = AWAY_SECONDS if away else RETRY_SECONDS
        await builds.postpone(
            self._database, build.build_id, self._name, reason=reason, delay_seconds=pause, counts=not away
        )


async def _forged(child: WarmChild, order: Job, what: str, build_id: str) -> tuple[Job, bytes | None]:
    """The child's answer to ``order`` and the file that it wrote, if it wrote one; ``what`` is the path's name in the job."""
    path = child.scratch / f"{build_id}.{what}"
    try:
        answer = await child.ask({**order, what: str(path)})
        return answer, await asyncio.to_thread(path.read_bytes) if path.exists() else None
    finally:
        path.unlink(missing_ok=True)


def _with_figures(manifest: KernelManifest, figures: NativeFigures) -> KernelManifest:
    provenance = manifest.provenance.model_copy(update={"native": figures})
    return manifest.model_copy(update={"provenance": provenance})


def seed_of(build_id: str) -> int:
    """The seed of a build's initial weights: follows from its id, so that building again gives the same bytes."""
    return int(build_id.removeprefix("build-")[:15], 16)
