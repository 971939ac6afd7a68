"""A kernel as the library knows it: its manifest, what was measured of it, and who vouches for it.

Field names and numbers equal those of ``esper.core.v1``. Free of torch.
"""

from __future__ import annotations

import enum

from pydantic import BaseModel, ConfigDict, Field

from esper_core.kernel.manifest import KernelManifest
from esper_core.kernel.sign import Attestation


class KernelStatus(enum.IntEnum):
    """What is known of a kernel's fitness."""

    COMPILED = 1
    """Built and stored; nothing measured yet."""
    VALIDATED = 2
    """Measured and fit for use. Only Urabrask sets this."""
    REJECTED = 3
    """Measured and unfit. Only Urabrask sets this."""
    RETIRED = 4
    """Withdrawn after it had been validated."""


class RejectionReason(enum.IntEnum):
    """What was wrong with a kernel; numbers and meanings are those of ``esper.core.v1.RejectionReason``."""

    UNTRUSTED = 1
    MANIFEST = 2
    OVERSIZED = 3
    ARTIFACT = 4
    WEIGHTS_NOT_FINITE = 5
    SHAPE = 6
    NOT_SILENT = 7
    MUTATES_INPUT = 8
    OUTPUT_NOT_FINITE = 9
    GRADIENT_NOT_FINITE = 10
    EXPLODES = 11
    VANISHES = 12
    UNREACHED = 13
    CANNOT_LEARN = 14
    NONDETERMINISTIC = 15
    LEAKS_ROWS = 16
    LEAKS_FUTURE = 17
    LEAKS_MEMORY = 18
    TIMEOUT = 19
    MEMORY = 20
    FAILS = 21


class Lesson(BaseModel):
    """How well a kernel learned one standard exercise for its interface."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(min_length=1, max_length=64)
    level: int = Field(ge=1)
    """How hard it is, from 1."""
    explained: float = Field(le=1)
    """Share of the held-back variance explained after training; below 0 is worse than adding nothing."""
    steps: int = Field(ge=0)
    """Training steps it took."""


class Measurement(BaseModel):
    """What Urabrask measured on the artifact itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    batch: int = Field(ge=1)
    """Rows in the measured batch."""
    forward_seconds: float = Field(ge=0)
    """Median forward seconds for one batch."""
    forward_seconds_p99: float = Field(ge=0)
    """99th percentile of the same."""
    backward_seconds: float = Field(ge=0)
    """Median forward and backward seconds for one batch."""
    peak_memory_bytes: int = Field(ge=0)
    """Peak resident bytes above the idle child."""
    precision_drift: float = Field(ge=0)
    """Largest |float32 - float64| of the output, relative to its scale."""
    gradient_norm: float = Field(ge=0)
    """Norm of the parameters' gradient for a unit-scale loss."""
    deterministic: bool
    """Whether two equal calls gave equal bytes."""
    repetitions: int = Field(ge=1)
    """Timed repetitions."""
    target: str = Field(max_length=120)
    """Fingerprint of the machine kind it was measured on."""
    lessons: tuple[Lesson, ...] = Field((), max_length=32)
    """How well it learned the standard exercises; empty when none was given."""
    backward_seconds_p99: float | None = Field(None, ge=0)
    """99th percentile of the forward and backward seconds. None, like the fields below, in older measurements."""
    rows_per_second: float | None = Field(None, ge=0)
    """Rows per second over all timed forward passes, the slow ones included."""
    counted_flops: int | None = Field(None, ge=0)
    """FLOPs of one sample's forward pass as counted on the artifact: matrix products, convolutions and attention."""
    input_gradient_norm: float | None = Field(None, ge=0)
    """Norm of the gradient at the input for a unit-scale loss."""
    gradient_ratio: float | None = Field(None, ge=0)
    """Norm of the gradient at the first layer's weights over that at the last layer's."""

    @property
    def learned(self) -> float | None:
        """Mean share of the exercises that it learned; None when none was given."""
        if not self.lessons:
            return None
        return sum(lesson.explained for lesson in self.lessons) / len(self.lessons)


class KernelRecord(BaseModel):
    """A kernel in the library."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    manifest: KernelManifest
    status: KernelStatus = KernelStatus.COMPILED
    reason: str = ""
    """Why it has that status."""
    tags: tuple[str, ...] = ()
    """What selection may ask for."""
    measurement: Measurement | None = None
    """Unset until Urabrask has spoken."""
    attestations: tuple[Attestation, ...] = ()
    """Signed statements: the build's, then the validation's."""
    interface_id: str = ""
    """Content id of the interface, for lookups."""
    born_of: str = ""
    """Principal that brought its blueprint to the library; set by the library."""
