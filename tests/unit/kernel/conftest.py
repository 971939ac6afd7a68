"""One kernel, packed and signed by the two parties."""

from dataclasses import dataclass

import pytest

from esper_core.blueprint.build import build
from esper_core.blueprint.catalogue import catalogue
from esper_core.blueprint.interface import SlotInterface
from esper_core.kernel.manifest import KernelManifest, Provenance
from esper_core.kernel.pack import pack
from esper_core.kernel.sign import Attestation, generate_key, public_pem, sign, statement
from esper_core.kernel.trust import TrustList, trust_entry


@dataclass(frozen=True)
class Signed:
    """A kernel with all that vouches for it."""

    blob: bytes
    manifest: KernelManifest
    build: Attestation
    validation: Attestation
    build_key: bytes
    validation_key: bytes
    trust: TrustList

    @property
    def attestations(self) -> list[Attestation]:
        return [self.build, self.validation]


INTERFACE = SlotInterface(layout=1, in_width=12, out_width=10, hidden_width=3, activation="relu", foldable=True)


def describe(seed: int) -> tuple[bytes, KernelManifest]:
    ir = catalogue()["bottleneck_mlp"]
    blob = pack(build(ir, INTERFACE, {"width": 5}, seed).state_dict())
    provenance = Provenance(
        compiler="eager 1", toolchain={"torch": "2"}, target="cpu", build_seconds=0.1, peak_memory_bytes=7
    )
    return blob, KernelManifest.describe(ir, INTERFACE, blob, provenance, symbols={"width": 5}, seed=seed)


@pytest.fixture(scope="session")
def keys() -> tuple[bytes, bytes, TrustList]:
    """(build key, validation key, the list that trusts both)."""
    builder, validator = generate_key(), generate_key()
    entries = (trust_entry("build", public_pem(builder)), trust_entry("validation", public_pem(validator)))
    return builder, validator, TrustList(keys=entries)


def _signed(seed: int, keys: tuple[bytes, bytes, TrustList]) -> Signed:
    blob, manifest = describe(seed)
    builder, validator, trust = keys
    built = sign(statement(manifest, "build", {"compiler": "eager 1"}), builder)
    validated = sign(statement(manifest, "validation", {"verdict": "VALIDATED"}), validator)
    return Signed(blob, manifest, built, validated, builder, validator, trust)


@pytest.fixture(scope="session")
def kernel(keys: tuple[bytes, bytes, TrustList]) -> Signed:
    """The kernel under test."""
    return _signed(1, keys)


@pytest.fixture(scope="session")
def other(keys: tuple[bytes, bytes, TrustList]) -> Signed:
    """Another one by the same parties, for swapping parts."""
    return _signed(2, keys)
