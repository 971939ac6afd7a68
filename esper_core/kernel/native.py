"""The papers of a kernel's native part: which bytes, for which kernel, machine kind and torch, and who vouches for them.

A native part is a cache: a kernel is whole without it, and whoever may load one may as well decline. Loading it is
executing code, so it needs more than the kernel itself: the signature of a listed build key over exactly these bytes for
exactly this kernel, machine and torch, and a run that was told to trust native code. Free of torch.
"""

from __future__ import annotations

from importlib.metadata import version

from pydantic import BaseModel, ConfigDict, Field

from esper_core.clock import SYSTEM, Clock
from esper_core.errors import Corrupt, Untrusted
from esper_core.ids import sha256
from esper_core.kernel.sign import Attestation, Statement, Subject, check_signature
from esper_core.kernel.trust import REFETCH, TrustList

PREDICATE = "urn:esper:attestation:native:v1"
MAX_BYTES = 128 << 20
FORM = 2
"""Of the blob: 1 took one batch size, 2 takes a range."""


class NativeRecord(BaseModel):
    """What a native part is; field names equal those of ``esper.core.v1.NativeRecord``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kernel_id: str = Field(pattern=r"^kernel-[0-9a-f]{64}$")
    target: str = Field(min_length=1, max_length=120)
    """Fingerprint of the machine kind it runs on."""
    toolchain: str = Field(min_length=1, max_length=120)
    """The torch whose calling convention it has; see ``convention``."""
    blob_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    blob_bytes: int = Field(ge=1, le=MAX_BYTES)
    rows: int = Field(ge=1)
    """Batch size it was timed at; which sizes it takes, the blob says."""
    step_ratio: float = Field(ge=0)
    """Native over eager seconds of forward and backward where it was built."""

    def check(self, blob: bytes) -> None:
        """Raises: Corrupt: these are other bytes."""
        if len(blob) != self.blob_bytes or sha256(blob) != self.blob_sha256:
            raise Corrupt(f"the native part of {self.kernel_id} does not match its digest", hint=REFETCH)


def convention() -> str:
    """What must be equal where a native part is built and where it is loaded: this process's torch, and the form of the blob."""
    return f"torch/{version('torch')} native/{FORM}"


def native_statement(record: NativeRecord) -> Statement:
    """A statement about the native part as a whole."""
    return Statement(
        subject=(Subject(name=record.kernel_id, digest={"sha256": record.blob_sha256}),),
        predicate_type=PREDICATE,
        predicate=record.model_dump(mode="json"),
    )


def verify_native(record: NativeRecord, attestation: Attestation, trust: TrustList, *, clock: Clock = SYSTEM) -> None:
    """Return only when a listed build key vouches for exactly ``record``.

    Raises:
        Untrusted: the key does not count, the signature does not hold, or the statement is of another kind or about
            something else.
    """
    key = trust.find(attestation.key_id, "build", clock.now())
    found = check_signature(attestation, key.public_key_pem)
    if found.predicate_type != PREDICATE:
        raise Untrusted(f"{found.predicate_type[:80]!r} is no native statement", hint=f"expected {PREDICATE}")
    if found.canonical() != native_statement(record).canonical():
        raise Untrusted(f"the native statement is not about this native part of {record.kernel_id}", hint=REFETCH)
