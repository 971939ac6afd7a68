"""The library as Urabrask uses it: fetch a kernel with its bytes, tell a signed verdict."""

from __future__ import annotations

import asyncio
from pathlib import Path

from esper_core.errors import Corrupt
from esper_core.ids import sha256
from esper_core.kernel.manifest import KernelManifest
from esper_core.kernel.record import KernelRecord, Measurement
from esper_core.kernel.sign import sign, statement
from esper_core.pb.esper.core.v1 import kernel_pb2
from esper_core.pb.esper.urza.v1 import urza_pb2, urza_pb2_grpc
from esper_core.rpc.convert import from_proto, to_proto
from services.urabrask.verdict import Verdict

FETCH_SECONDS = 120.0


class Library:
    """Urza, from here.

    Args:
        urza: a stub on Urabrask's channel.
        key: path of Urabrask's signing key (PEM).
    """

    def __init__(self, urza: urza_pb2_grpc.UrzaServiceStub, key: Path) -> None:
        self._urza = urza
        self._key = key

    async def find(self, kernel_id: str) -> KernelRecord:
        """Raises: NotFound, Unavailable."""
        answer = await self._urza.GetKernel(urza_pb2.GetKernelRequest(kernel_id=kernel_id))
        return from_proto(answer.kernel, KernelRecord)

    async def fetch(self, manifest: KernelManifest) -> bytes:
        """The bytes that ``manifest`` names.

        Raises:
            NotFound: no such kernel.
            Corrupt: the bytes are not those the manifest names.
            Unavailable: the library is away.
        """
        blob = bytearray()
        request = urza_pb2.StreamKernelRequest(kernel_id=manifest.kernel_id)
        async for part in self._urza.StreamKernel(request, timeout=FETCH_SECONDS):
            blob += part.chunk.data  # empty in the first part, which carries the record
        if sha256(bytes(blob)) != manifest.blob_sha256:
            raise Corrupt(f"{manifest.kernel_id}: what arrived is not what its manifest names", hint="fetch it again")
        return bytes(blob)

    async def tell(self, record: KernelRecord, verdict: Verdict) -> None:
        """Sign ``verdict`` and have the library act on it.

        Raises:
            Conflict: the kernel's status has moved on meanwhile.
            Unavailable: the library is away.
        """
        said = {
            "verdict": verdict.status.name,
            "reason": verdict.reason,
            "rejection": verdict.rejection and verdict.rejection.name,
            "tags": list(verdict.tags),
            "measurement": None if verdict.measurement is None else verdict.measurement.model_dump(mode="json"),
        }
        key = await asyncio.to_thread(self._key.read_bytes)
        attestation = sign(statement(record.manifest, "validation", said), key)
        await self._urza.UpdateKernelStatus(
            urza_pb2.UpdateKernelStatusRequest(
                kernel_id=record.manifest.kernel_id,
                status=kernel_pb2.KernelStatus.Name(verdict.status),
                reason=verdict.reason,
                tags=verdict.tags,
                measurement=_measurement(verdict.measurement),
                attestation=to_proto(attestation, kernel_pb2.Attestation),
            )
        )


def _measurement(found: Measurement | None) -> kernel_pb2.Measurement | None:
    return None if found is None else to_proto(found, kernel_pb2.Measurement)
