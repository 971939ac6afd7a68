"""An examination: one kernel through static, safety and benchmark. What is tried on it is tried in a child process.

Knows neither queue nor library: who examines what, and what follows from a finding, is the judge's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from esper_core.blueprint.analyse import Limits as KernelLimits
from esper_core.blueprint.analyse import analyse
from esper_core.errors import InvalidInput, Untrusted
from esper_core.kernel.manifest import KernelManifest
from esper_core.kernel.record import KernelRecord, Measurement, RejectionReason
from esper_core.kernel.trust import TrustList, verify_statement
from services.child import WarmChild
from services.sandbox import Job
from services.urabrask.evaluations import Phase
from services.urabrask.finding import Unfit

Fetch = Callable[[KernelManifest], Awaitable[bytes]]
Enter = Callable[[Phase], Awaitable[object]]

UNBOUNDED = KernelLimits(parameters=1 << 80, activation_elements=1 << 80, flops=1 << 80)


class Examination:
    """One bench.

    Args:
        child: runs ``services.urabrask.bench``.
        trust: path of the list of keys whose build statements count.
    """

    def __init__(self, child: WarmChild, trust: Path) -> None:
        self._child, self._trust = child, trust

    async def of(self, record: KernelRecord, fetch: Fetch, enter: Enter) -> Measurement:
        """Take a kernel through all three phases.

        Args:
            record: its papers.
            fetch: gives the bytes that a manifest names.
            enter: is told of each phase in the child before it begins.

        Raises:
            Unfit: it is.
            EsperError: it could not be found out; whatever ``fetch`` or the child raised.
        """
        manifest = record.manifest
        self._papers(record)
        blob = await fetch(manifest)
        path = self._child.scratch / manifest.kernel_id
        await asyncio.to_thread(path.write_bytes, blob)
        try:
            await enter(Phase.SAFETY)
            await self._ask(manifest, "safety", path)
            await enter(Phase.BENCHMARK)
            answer = await self._ask(manifest, "benchmark", path)
        finally:
            path.unlink(missing_ok=True)
        measurement = Measurement.model_validate(answer["measurement"])
        if not measurement.deterministic:
            raise Unfit(RejectionReason.NONDETERMINISTIC, "two equal calls give different results")
        return measurement

    def _papers(self, record: KernelRecord) -> None:
        """The static phase: nothing of the kernel is run."""
        manifest = record.manifest
        try:
            analysis = analyse(manifest.blueprint, manifest.interface, manifest.symbols)
        except InvalidInput as error:
            raise Unfit(_too_large_or_wrong(manifest), error.message) from None
        if (manifest.parameters, manifest.flops) != (analysis.parameters, analysis.flops):
            raise Unfit(RejectionReason.MANIFEST, "the manifest's figures are not those of its blueprint")
        if not record.attestations:
            raise Unfit(RejectionReason.UNTRUSTED, "there is no build statement")
        try:
            verify_statement(manifest, record.attestations[0], TrustList.load(self._trust), "build")
        except Untrusted as error:
            raise Unfit(RejectionReason.UNTRUSTED, error.message) from None

    async def _ask(self, manifest: KernelManifest, work: str, path: Path) -> Job:
        job = {"do": work, "manifest": manifest.model_dump(mode="json"), "blob": str(path)}
        try:
            answer = await self._child.ask(job)
        except InvalidInput as error:  # what torch says of shapes that do not fit: the kernel's own fault
            raise Unfit(RejectionReason.FAILS, error.message) from None
        if finding := answer.get("unfit"):
            raise Unfit(RejectionReason[answer["reason"]], finding)
        return answer


def _too_large_or_wrong(manifest: KernelManifest) -> RejectionReason:
    try:
        analyse(manifest.blueprint, manifest.interface, manifest.symbols, UNBOUNDED)
    except InvalidInput:
        return RejectionReason.MANIFEST
    return RejectionReason.OVERSIZED
