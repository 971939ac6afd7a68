"""A verdict: what becomes of a kernel, and on what grounds. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from esper_core.kernel.record import KernelRecord, KernelStatus, Measurement, RejectionReason
from services.urabrask.finding import Unfit

PASSED = "passed static, safety and benchmark"


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Attributes:
        status: what the kernel becomes.
        rejection: which fault it has; None when it has none.
        risk: how likely a graft of it is to fail, and `risk_model`, what told that; None when it is not fit.
        standing: the library says so already and need not be told.
    """

    status: KernelStatus
    reason: str
    measurement: Measurement | None = None
    tags: tuple[str, ...] = ()
    rejection: RejectionReason | None = None
    risk: float | None = None
    risk_model: str = ""
    standing: bool = False

    @classmethod
    def fit(
        cls, measurement: Measurement, tags: Sequence[str], risk: float | None = None, risk_model: str = ""
    ) -> Verdict:
        """Every phase was passed."""
        return cls(KernelStatus.VALIDATED, PASSED, measurement, tuple(tags), risk=risk, risk_model=risk_model)

    @classmethod
    def unfit(cls, record: KernelRecord, finding: Unfit) -> Verdict:
        """A phase was not passed: REJECTED, or RETIRED when it had been validated before."""
        before = record.status is KernelStatus.VALIDATED
        status = KernelStatus.RETIRED if before else KernelStatus.REJECTED
        return cls(status, finding.message[:500], rejection=finding.reason)

    @classmethod
    def as_it_stands(cls, record: KernelRecord) -> Verdict:
        """What is rejected or retired stays so, whatever another measurement might say."""
        return cls(record.status, record.reason, record.measurement, record.tags, standing=True)

    @property
    def announced(self) -> KernelStatus:
        """What the bus is told: VALIDATED or REJECTED; a retired kernel is as little for use as a rejected one."""
        fit = self.status is KernelStatus.VALIDATED
        return KernelStatus.VALIDATED if fit else KernelStatus.REJECTED
