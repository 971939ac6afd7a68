"""Whether a kernel is what it says it is, and whether those who must vouch for it did.

Checks the manifest's ids, the weights' digest, and that a listed build key and a different listed validation key have
signed for exactly this kernel. Does not open the weights: what they compute is Urabrask's judgement, signed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper_core.errors import Corrupt
from esper_core.ids import sha256
from esper_core.kernel.manifest import REBUILD, KernelManifest
from esper_core.kernel.sign import Attestation
from esper_core.kernel.trust import TrustList, verify_kernel
from esper_core.pb.esper.core.v1.kernel_pb2 import KernelRecord
from esper_core.rpc.convert import from_proto

TRUST_FILE = "trust.json"
_ROLES = ("build", "validation")


@dataclass(frozen=True)
class Proof:
    """A kernel that passed."""

    kernel_id: str
    blob_sha256: str
    signers: dict[str, str]
    """Key id by role."""

    def document(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "verified": True,
            "kernel_id": self.kernel_id,
            "blob_sha256": self.blob_sha256,
            "signers": self.signers,
        }


def verified(record: KernelRecord, blob: bytes, keys_dir: Path) -> Proof:
    """The proof that ``blob`` is the kernel of ``record`` and that both parties vouch for it.

    Raises:
        Corrupt: ids or digest do not match the contents.
        Untrusted: a statement is missing, wrong, or by a key that does not count.
        NotFound, InvalidInput: the trust list is missing or malformed.
    """
    manifest = from_proto(record.manifest, KernelManifest)
    if len(blob) != manifest.blob_bytes or sha256(blob) != manifest.blob_sha256:
        raise Corrupt(f"{manifest.kernel_id}: the weights do not match their digest", hint=REBUILD)
    attestations = [from_proto(attestation, Attestation) for attestation in record.attestations]
    verify_kernel(manifest, attestations, TrustList.load(keys_dir / TRUST_FILE))
    signers = {role: attestation.key_id for role, attestation in zip(_ROLES, attestations, strict=True)}
    return Proof(manifest.kernel_id, manifest.blob_sha256, signers)
