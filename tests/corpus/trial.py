"""A kernel of the corpus before Urabrask's examination in a real child process."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from esper_core.errors import EsperError
from esper_core.kernel.manifest import KernelManifest
from esper_core.kernel.record import Measurement, RejectionReason
from services.child import WarmChild
from services.sandbox import Limits
from services.urabrask.evaluations import Phase
from services.urabrask.examination import Examination
from services.urabrask.finding import Unfit, reason_of
from tests.corpus.kernels import Forge, Kernel

CHILD = "tests.corpus.child"


class Trial:
    """One bench and the forge whose kernels it trusts."""

    def __init__(self, child: WarmChild, forge: Forge) -> None:
        self.child, self._forge = child, forge
        self._examination = Examination(child, forge.trust)

    async def of(self, kernel: Kernel) -> tuple[RejectionReason | None, str, Measurement | None]:
        """Reason and words of the rejection, or neither and what was measured."""

        async def fetch(_: KernelManifest) -> bytes:
            return kernel.blob

        async def enter(_: Phase) -> None:
            return None

        try:
            found = await self._examination.of(self._forge.record(kernel), fetch, enter)
        except Unfit as finding:
            return finding.reason, finding.message, None
        except EsperError as error:
            return reason_of(error), error.message, None
        return None, "", found


@contextlib.asynccontextmanager
async def trial(folder: Path, limits: Limits, module: str = CHILD) -> AsyncIterator[Trial]:
    """A bench that runs ``module`` under ``limits``; ended afterwards."""
    child = WarmChild(module, limits)
    try:
        yield Trial(child, Forge(folder))
    finally:
        await child.close()
