"""The judge: takes kernels one after the other through static, safety and benchmark, and says what came of it.

Only what was measured on the very bytes in the library leads to VALIDATED; every way of failing leads to REJECTED,
after ``MAX_ATTEMPTS`` where the failure could be the surroundings' (a child that died or ran out of time). While the
library is away nothing is decided.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from esper_core import log
from esper_core.bus import subjects
from esper_core.bus.database import Pool
from esper_core.bus.envelope import wrap
from esper_core.bus.outbox import enqueue
from esper_core.errors import EsperError, NotFound, Unavailable
from esper_core.ids import new_id
from esper_core.kernel.record import KernelRecord, KernelStatus
from esper_core.pb.esper.bus.v1 import bus_pb2
from esper_core.pb.esper.core.v1 import kernel_pb2
from esper_core.rpc.convert import to_proto
from services.bell import Bell
from services.child import WarmChild
from services.lease import held
from services.sandbox import Limits
from services.urabrask import evaluations, experience, risk
from services.urabrask.evaluations import Claim
from services.urabrask.examination import Examination
from services.urabrask.finding import Unfit, reason_of
from services.urabrask.library import Library
from services.urabrask.retag import population
from services.urabrask.tags import bounds, tags_for
from services.urabrask.verdict import Verdict

PRINCIPAL = "urabrask"
NEWS = "urabrask"
MODULE = "services.urabrask.bench"
LIMITS = Limits(wall_seconds=240.0, cpu_seconds=60.0, memory_bytes=6 << 30)
"""Processor time is what a kernel is held to; the wall clock only ends what waits, for on a busy machine a child at the
lowest priority waits as well."""
MAX_ATTEMPTS = 3
RETRY_SECONDS, MAX_RETRY_SECONDS = 0.5, 60.0
AWAY_SECONDS = 2.0

LOG = log.get(PRINCIPAL)


class Judge:
    """One bench and its judge.

    Args:
        database: where the evaluations are.
        bell: rings when there may be a new kernel.
        library: where kernels are read and verdicts go.
        trust: path of the list of keys whose build statements count.
        limits: of the child.
        module: what the child runs.
        lease_seconds: after which another judge takes over what this one died over.
    """

    def __init__(
        self,
        database: Pool,
        bell: Bell,
        library: Library,
        trust: Path,
        limits: Limits = LIMITS,
        module: str = MODULE,
        lease_seconds: float = evaluations.LEASE_SECONDS,
    ) -> None:
        self._lease = lease_seconds
        self._database, self._bell, self._library = database, bell, library
        self._name = f"judge-{new_id()}"
        self.child = WarmChild(module, limits)
        self._examination = Examination(self.child, trust)

    async def run(self) -> None:
        """Judge until cancelled, or until the platform begins to stop.

        Raises:
            asyncpg.PostgresError, OSError: the database is away; what was claimed is taken up again by the next run.
        """
        try:
            await evaluations.release(self._database, self._name)
            while True:
                rung = self._bell.expect(NEWS)
                claim = await evaluations.claim(self._database, self._name, self._lease)
                if claim is None:
                    await self._bell.wait(rung)
                else:
                    await self._judge(claim)
        except Unavailable:
            return
        finally:
            await self.child.close()
            await evaluations.release(self._database, self._name)

    async def _judge(self, claim: Claim) -> None:
        renew = partial(evaluations.renew, self._database, claim.kernel_id, self._name, self._lease)
        try:
            async with held(renew, self._lease / 3):
                record = await self._library.find(claim.kernel_id)
                verdict = await self._examined(claim, record)
                if not verdict.standing:
                    await self._library.tell(record, verdict)
        except NotFound:
            LOG.warning("evaluation.no_such_kernel", kernel_id=claim.kernel_id)
            await evaluations.forget(self._database, claim.kernel_id, self._name)
        except EsperError as error:
            await self._postpone(claim, error)
        else:
            await self._announce(record, verdict)

    async def _examined(self, claim: Claim, record: KernelRecord) -> Verdict:
        if record.status in (KernelStatus.REJECTED, KernelStatus.RETIRED):
            return Verdict.as_it_stands(record)
        enter = partial(evaluations.enter, self._database, claim.kernel_id, self._name, lease_seconds=self._lease)
        try:
            measurement = await self._examination.of(record, self._library.fetch, enter)
        except Unfit as finding:
            return Verdict.unfit(record, finding)
        except Unavailable:
            raise
        except EsperError as error:
            if claim.attempts < MAX_ATTEMPTS:
                raise
            last = Unfit(reason_of(error), f"{MAX_ATTEMPTS} attempts ended with: {error.message}")
            return Verdict.unfit(record, last)
        limits = bounds(await population(self._database, measurement.target))
        row = risk.features(risk.design(record.manifest), measurement)
        value, model = risk.assess(await experience.current(self._database), row)
        return Verdict.fit(measurement, tags_for(record.manifest, measurement, limits, value), value, model)

    async def _announce(self, record: KernelRecord, verdict: Verdict) -> None:
        kernel_id = record.manifest.kernel_id
        message = bus_pb2.KernelCharacterized(
            kernel_id=kernel_id,
            status=kernel_pb2.KernelStatus.Name(verdict.announced),
            reason=verdict.reason[:500],
            tags=verdict.tags,
            interface_id=record.interface_id,
            rejection=None if verdict.rejection is None else kernel_pb2.RejectionReason.Name(verdict.rejection),
        )
        if verdict.measurement is not None:
            message.measurement.CopyFrom(to_proto(verdict.measurement, kernel_pb2.Measurement))
        async with self._database.acquire() as connection, connection.transaction():
            done = await evaluations.finish(
                connection,
                kernel_id,
                self._name,
                verdict=verdict.status,
                reason=verdict.reason,
                measurement=verdict.measurement,
                tags=verdict.tags,
                rejection=verdict.rejection,
                design=risk.design(record.manifest),
                risk=verdict.risk,
                risk_model=verdict.risk_model,
            )
            if done:
                await enqueue(connection, subjects.KERNEL_CHARACTERIZED.of(), wrap(message, producer=PRINCIPAL))
                await self._bell.ring(connection, experience.MODELS)
        LOG.info("kernel.judged", kernel_id=kernel_id, verdict=verdict.status.name, reason=verdict.reason, told=done)

    async def _postpone(self, claim: Claim, error: EsperError) -> None:
        reason = f"{type(error).__name__}: {error.message}"
        LOG.warning("evaluation.postponed", kernel_id=claim.kernel_id, reason=reason)
        away = isinstance(error, Unavailable)
        await evaluations.postpone(
            self._database,
            claim.kernel_id,
            self._name,
            reason=reason,
            delay_seconds=AWAY_SECONDS if away else min(RETRY_SECONDS * 2**claim.attempts, MAX_RETRY_SECONDS),
            counts=not away,
        )
