"""The worker: takes builds one after the other, has the child forge them, signs, stores and announces them.

A build that is refused is FAILED with the reason; one that failed for reasons of its surroundings is tried again, as
often as it takes while the library is away and ``MAX_FAILURES`` times otherwise. A kernel is announced in the
transaction that marks its build DONE, so every kernel is announced once even when the forge dies at any point.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
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
from esper_core.errors import EsperError, Forbidden, InvalidInput, Unavailable, Unsupported, Untrusted
from esper_core.ids import new_id
from esper_core.kernel.manifest import KernelManifest
from esper_core.kernel.sign import sign, statement
from esper_core.pb.esper.bus.v1 import bus_pb2
from esper_core.pb.esper.core.v1 import kernel_pb2
from esper_core.pb.esper.urza.v1 import urza_pb2, urza_pb2_grpc
from esper_core.rpc.convert import to_proto
from services.bell import Bell
from services.child import WarmChild
from services.lease import held
from services.sandbox import Limits
from services.tezzeret import builds
from services.tezzeret.builds import Build, Estimate
from services.tezzeret.designs import Designs
from services.tezzeret.forges import BEAT_SECONDS, Forge
from services.tezzeret.toolchain import here

PRINCIPAL = "tezzeret"
NEWS = "tezzeret"
MODULE = "services.tezzeret.forge"
LIMITS = Limits(wall_seconds=120.0, cpu_seconds=120.0)
MAX_FAILURES = 3
RETRY_SECONDS = 0.5
AWAY_SECONDS = 2.0
"""Pause while the library is away; such attempts do not count."""
UPLOAD_SECONDS = 120.0
CHUNK_BYTES = 128 * 1024
REFUSED = (InvalidInput, Unsupported, Untrusted, Forbidden)
"""Trying again would end the same way."""

LOG = log.get(PRINCIPAL)


@dataclass(frozen=True)
class Made:
    """A kernel that is in the library."""

    kernel_id: str
    interface_id: str
    blueprint_name: str


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
    ) -> None:
        self._database, self._bell, self._urza, self._designs, self._key = database, bell, urza, designs, key
        self._lease = lease_seconds
        self._name = f"forge-{new_id()}"
        self._toolchain = here()
        self._forge = Forge(self._name, self._toolchain)
        self.child = WarmChild(MODULE, limits)

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
        path = self.child.scratch / build.build_id
        job = {
            "do": "forge",
            "blueprint": design.model_dump(mode="json"),
            "interface": build.interface.model_dump(mode="json"),
            "symbols": dict(build.symbols),
            "pipeline": build.pipeline,
            "seed": seed_of(build.build_id),
            "blob": str(path),
        }
        try:
            answer = await self.child.ask(job)
            blob = await asyncio.to_thread(path.read_bytes)
        finally:
            path.unlink(missing_ok=True)
        manifest = KernelManifest.model_validate(answer["manifest"])
        kernel_id = await self._upload(manifest, blob)
        return Made(kernel_id, manifest.interface_id, design.name)

    async def _upload(self, manifest: KernelManifest, blob: bytes) -> str:
        key = await asyncio.to_thread(self._key.read_bytes)
        attestation = sign(statement(manifest, "build", manifest.provenance.model_dump(mode="json")), key)
        header = urza_pb2.KernelHeader(
            manifest=to_proto(manifest, kernel_pb2.KernelManifest),
            attestation=to_proto(attestation, kernel_pb2.Attestation),
        )

        async def parts() -> AsyncIterator[urza_pb2.UploadKernelRequest]:
            yield urza_pb2.UploadKernelRequest(header=header)
            for start in range(0, len(blob), CHUNK_BYTES):
                yield urza_pb2.UploadKernelRequest(chunk=blob[start : start + CHUNK_BYTES])

        stored: urza_pb2.UploadKernelResponse = await self._urza.UploadKernel(parts(), timeout=UPLOAD_SECONDS)
        return stored.kernel_id

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


def seed_of(build_id: str) -> int:
    """The seed of a build's initial weights: follows from its id, so that building again gives the same bytes."""
    return int(build_id.removeprefix("build-")[:15], 16)
