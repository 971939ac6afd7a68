"""The manifest of a compiled kernel: a blueprint bound to one interface, with the digest of its initial weights.

Field names equal those of ``KernelManifest`` and ``Provenance`` in ``esper.core.v1``. A manifest says
what a kernel is; whether anyone vouches for it is :mod:`esper_core.kernel.trust`'s question, and the weights themselves
are :mod:`esper_core.kernel.pack`'s. Free of torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from esper_core.blueprint.analyse import analyse
from esper_core.blueprint.interface import SlotInterface, canonical_json
from esper_core.blueprint.ir import BlueprintIR
from esper_core.errors import Corrupt
from esper_core.ids import content_id, sha256

MAX_BLOB_BYTES = 1 << 30
REBUILD = "fetch the kernel again, or have it compiled anew"


class NativeFigures(BaseModel):
    """What came of compiling a kernel natively. Ratios are native over eager seconds on the machine of the build."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rows: int = Field(ge=1)
    """Batch it was timed at."""
    build_seconds: float = Field(default=0.0, ge=0)
    """Wall seconds of tracing, partitioning and compiling."""
    load_seconds: float = Field(default=0.0, ge=0)
    """Of loading both objects."""
    first_call_seconds: float = Field(default=0.0, ge=0)
    """Of the first forward and backward pass after loading."""
    forward_ratio: float = Field(default=0.0, ge=0)
    """Forward pass, steady state; 0 when it was not compiled."""
    step_ratio: float = Field(default=0.0, ge=0)
    """Forward and backward pass, likewise."""
    repetitions: int = Field(default=0, ge=0)
    """Interleaved rounds that the ratios are medians of."""
    parity: float = Field(default=0.0, ge=0)
    """Largest |native - eager| of outputs and all gradients, each relative to the eager's scale."""
    shipped: bool = False
    """Whether the native part was stored: only where it was right and faster."""
    reason: str = Field(default="", max_length=200)
    """Why it was not."""


_YOUNGER = frozenset({"graph_sha256", "graph_ops", "joint_ops", "graph_max_abs_diff", "native"})
"""Fields of the provenance that came after the first kernels had been signed."""


class Provenance(BaseModel):
    """How a kernel came to be."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    compiler: str = Field(default="", max_length=120)
    """Compiler and its version."""
    toolchain: dict[str, str] = Field(default={}, max_length=16)
    """Toolchain versions by name."""
    target: str = Field(default="", max_length=120)
    """Fingerprint of the machine kind it was built on."""
    build_seconds: float = Field(default=0.0, ge=0)
    """Wall seconds of the build."""
    peak_memory_bytes: int = Field(default=0, ge=0)
    """Peak resident bytes of the build process."""
    parity_max_abs_diff: float = Field(default=0.0, ge=0)
    """Largest |eager - rebuilt from the artifact| over the parity batch."""
    graph_sha256: str = Field(default="", max_length=64)
    """Digest of the exported graph; empty where the pipeline exports none."""
    graph_ops: int = Field(default=0, ge=0)
    """ATen operations of the exported graph."""
    joint_ops: int = Field(default=0, ge=0)
    """ATen operations of forward and backward together; 0 where the kernel keeps statistics."""
    graph_max_abs_diff: float = Field(default=0.0, ge=0)
    """Largest |eager - exported graph| of outputs and all gradients over the parity batch."""
    native: NativeFigures | None = None
    """Unset where the pipeline compiles nothing."""

    @model_serializer(mode="wrap")
    def _sparing(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out younger fields that say nothing: signatures from before them stay valid."""
        values: dict[str, Any] = handler(self)
        return {name: value for name, value in values.items() if name not in _YOUNGER or value}


class KernelManifest(BaseModel):
    """What a kernel is.

    Raises:
        Corrupt: from the constructor, when the ids do not follow from the contents.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kernel_id: str = Field(pattern=r"^kernel-[0-9a-f]{64}$")
    """Content id over the identity fields."""
    blueprint_id: str = Field(pattern=r"^blueprint-[0-9a-f]{64}$")
    blueprint: BlueprintIR
    interface: SlotInterface
    symbols: dict[str, int] = {}
    """Values of all the blueprint's symbols."""
    pipeline: str = Field(default="standard", min_length=1, max_length=32)
    """Name of the build pipeline."""
    seed: int = Field(default=0, ge=0, lt=1 << 64)
    """Seed of the initial weights."""
    parameters: int = Field(default=0, ge=0)
    """Trainable parameters."""
    flops: int = Field(default=0, ge=0)
    """Of one sample's forward pass."""
    blob_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Hex SHA-256 of the safetensors blob."""
    blob_bytes: int = Field(default=0, ge=0, le=MAX_BLOB_BYTES)
    """Size of the blob."""
    provenance: Provenance

    @classmethod
    def describe(
        cls,
        blueprint: BlueprintIR,
        interface: SlotInterface,
        blob: bytes,
        provenance: Provenance,
        *,
        symbols: Mapping[str, int] | None = None,
        seed: int = 0,
        pipeline: str = "standard",
    ) -> KernelManifest:
        """The manifest of freshly built ``blob``.

        Raises:
            InvalidInput: when the blueprint does not fit the interface.
        """
        analysis = analyse(blueprint, interface, symbols)
        bound = blueprint.bind(symbols)
        digest = sha256(blob)
        return cls(
            kernel_id=identity(blueprint.id, interface.id, bound, digest),
            blueprint_id=blueprint.id,
            blueprint=blueprint,
            interface=interface,
            symbols=bound,
            pipeline=pipeline,
            seed=seed,
            parameters=analysis.parameters,
            flops=analysis.flops,
            blob_sha256=digest,
            blob_bytes=len(blob),
            provenance=provenance,
        )

    @property
    def interface_id(self) -> str:
        return self.interface.id

    def canonical(self) -> bytes:
        """The one byte string of this manifest; signatures cover its digest."""
        return canonical_json(self.model_dump(mode="json"))

    def check(self) -> None:
        """Refuse a manifest whose ids do not follow from its contents.

        Raises:
            Corrupt: when the blueprint or the kernel is not what its id says.
        """
        if self.blueprint.id != self.blueprint_id:
            raise Corrupt(f"blueprint {self.blueprint_id} does not have the contents its id says", hint=REBUILD)
        if self.kernel_id != identity(self.blueprint_id, self.interface.id, self.symbols, self.blob_sha256):
            raise Corrupt(f"{self.kernel_id} does not have the contents its id says", hint=REBUILD)

    @model_validator(mode="after")
    def _consistent(self) -> KernelManifest:
        self.check()
        return self


def identity(blueprint_id: str, interface_id: str, symbols: Mapping[str, int], blob_sha256: str) -> str:
    """The kernel id: what it does is settled by these four."""
    fields = {
        "blueprint_id": blueprint_id,
        "interface_id": interface_id,
        "symbols": dict(symbols),
        "blob_sha256": blob_sha256,
    }
    return content_id("kernel", canonical_json(fields))
