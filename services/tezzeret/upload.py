"""What a forge has made, signed and brought to the library: kernels and their native parts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from esper_core.kernel.manifest import KernelManifest
from esper_core.kernel.native import NativeRecord, native_statement
from esper_core.kernel.sign import Attestation, Statement, sign, statement
from esper_core.pb.esper.core.v1 import kernel_pb2
from esper_core.pb.esper.urza.v1 import native_pb2, urza_pb2, urza_pb2_grpc
from esper_core.rpc.convert import to_proto

UPLOAD_SECONDS = 120.0
CHUNK_BYTES = 128 * 1024


class Upload:
    """The way to the library.

    Args:
        urza: the library.
        key: path of the signing key (PEM), read anew for every signature.
    """

    def __init__(self, urza: urza_pb2_grpc.UrzaServiceStub, key: Path) -> None:
        self._urza, self._key = urza, key

    async def kernel(self, manifest: KernelManifest, blob: bytes) -> str:
        """Bring a kernel; its id.

        Raises:
            EsperError: what the library has against it, or that it is away.
        """
        said = await self._signed(statement(manifest, "build", manifest.provenance.model_dump(mode="json")))
        header = urza_pb2.KernelHeader(
            manifest=to_proto(manifest, kernel_pb2.KernelManifest), attestation=to_proto(said, kernel_pb2.Attestation)
        )

        async def parts() -> AsyncIterator[urza_pb2.UploadKernelRequest]:
            yield urza_pb2.UploadKernelRequest(header=header)
            for chunk in _chunks(blob):
                yield urza_pb2.UploadKernelRequest(chunk=chunk)

        stored: urza_pb2.UploadKernelResponse = await self._urza.UploadKernel(parts(), timeout=UPLOAD_SECONDS)
        return stored.kernel_id

    async def native(self, record: NativeRecord, blob: bytes) -> None:
        """Bring a kernel's native part; whoever was first for that machine kind and torch stays.

        Raises:
            EsperError: as ``kernel``.
        """
        said = await self._signed(native_statement(record))
        header = native_pb2.NativeHeader(
            record=to_proto(record, kernel_pb2.NativeRecord), attestation=to_proto(said, kernel_pb2.Attestation)
        )

        async def parts() -> AsyncIterator[native_pb2.UploadNativeRequest]:
            yield native_pb2.UploadNativeRequest(header=header)
            for chunk in _chunks(blob):
                yield native_pb2.UploadNativeRequest(chunk=chunk)

        await self._urza.UploadNative(parts(), timeout=UPLOAD_SECONDS)

    async def _signed(self, what: Statement) -> Attestation:
        return sign(what, await asyncio.to_thread(self._key.read_bytes))


def _chunks(blob: bytes) -> Iterator[bytes]:
    return (blob[start : start + CHUNK_BYTES] for start in range(0, len(blob), CHUNK_BYTES))
