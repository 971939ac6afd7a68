"""Native parts in the library: signed code beside a kernel, one per machine kind and torch, never changed once stored.

The library hashes the bytes and checks the signature; it neither runs nor judges them. Whoever loads one checks again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import asyncpg
import grpc

from esper_core.bus.database import Connection, Pool
from esper_core.errors import Corrupt, InvalidInput, NotFound
from esper_core.kernel.native import NativeRecord, verify_native
from esper_core.kernel.sign import Attestation
from esper_core.kernel.trust import TrustList
from esper_core.pb.esper.core.v1 import kernel_pb2
from esper_core.pb.esper.urza.v1 import native_pb2
from esper_core.rpc.auth import principal
from esper_core.rpc.convert import from_proto, to_proto
from esper_core.store.blobs import Blobs
from services.urza.copies import Copies

CHUNK_BYTES = 128 * 1024
Context = grpc.aio.ServicerContext[object, object]


class Natives:
    """The shelf of native parts.

    Args:
        database: where the rows are.
        blobs: where the bytes are.
        trust: path of the list of keys whose statements count; read anew for every statement.
    """

    def __init__(self, database: Pool, blobs: Blobs, trust: Path) -> None:
        self._database, self._blobs, self._trust = database, blobs, trust
        self._copies = Copies(database)

    def check(self, record: NativeRecord, attestation: Attestation) -> None:
        """Raises: Untrusted: the statement is not by a listed build key about this native part."""
        verify_native(record, attestation, TrustList.load(self._trust))

    async def put(self, record: NativeRecord, attestation: Attestation, blob: bytes, created_by: str) -> bool:
        """Keep a checked native part; False when the kernel has one for that machine kind and torch.

        Raises:
            Corrupt: record and bytes disagree.
            NotFound: the library has no such kernel.
            Unavailable: the blob store is away.
        """
        record.check(blob)
        known = await self._database.fetchval("SELECT true FROM urza.kernels WHERE kernel_id = $1", record.kernel_id)
        if not known:
            raise NotFound(f"no kernel {record.kernel_id}", hint="upload the kernel first")
        values = (
            record.kernel_id,
            record.target,
            record.toolchain,
            record.model_dump_json(),
            record.blob_sha256,
            attestation.payload_type,
            attestation.payload,
            attestation.key_id,
            attestation.signature,
            created_by,
        )

        async def write(connection: Connection) -> bool:
            tag = await connection.execute(
                """INSERT INTO urza.natives (kernel_id, target, toolchain, record, blob_sha256,
                       payload_type, payload, key_id, signature, created_by)
                   VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) ON CONFLICT DO NOTHING""",
                *values,
            )
            return bool(tag == "INSERT 0 1")

        return await self._copies.store(self._blobs, blob, write)

    async def get(self, kernel_id: str, target: str, toolchain: str) -> tuple[NativeRecord, Attestation, bytes]:
        """The native part of a kernel for a machine kind and a torch.

        Raises:
            NotFound: there is none.
            Corrupt: the stored bytes do not match their digest, or are gone.
        """
        row = await self._database.fetchrow(
            """SELECT record, payload_type, payload, key_id, signature FROM urza.natives
               WHERE kernel_id = $1 AND target = $2 AND toolchain = $3""",
            kernel_id,
            target,
            toolchain,
        )
        if row is None:
            raise NotFound(f"{kernel_id} has no native part for this machine and torch", hint="it runs without")
        record, attestation = _papers(row)
        number = await self._copies.live(record.blob_sha256)
        try:
            if number is None:
                raise NotFound(f"no blob {record.blob_sha256}")
            blob = await self._blobs.get(record.blob_sha256, number)
        except NotFound:
            raise Corrupt(f"the native part of {kernel_id} is gone", hint="have the kernel built anew") from None
        return record, attestation, blob

    async def of(self, kernel_ids: Sequence[str]) -> list[tuple[NativeRecord, Attestation]]:
        """The papers of these kernels' native parts."""
        rows = await self._database.fetch(
            """SELECT record, payload_type, payload, key_id, signature FROM urza.natives
               WHERE kernel_id = ANY($1) ORDER BY kernel_id, target, toolchain""",
            kernel_ids,
        )
        return [_papers(row) for row in rows]


def _papers(row: asyncpg.Record) -> tuple[NativeRecord, Attestation]:
    fields = ("payload_type", "payload", "key_id", "signature")
    return (
        NativeRecord.model_validate_json(row["record"]),
        Attestation.model_validate({name: row[name] for name in fields}),
    )


class NativeServing:
    """The calls about native parts; see ``protos/esper/urza/v1/urza.proto``."""

    natives: Natives

    async def UploadNative(
        self, requests: AsyncIterator[native_pb2.UploadNativeRequest], _: Context
    ) -> native_pb2.UploadNativeResponse:
        first = await anext(aiter(requests), None)
        if first is None or not first.HasField("header"):
            raise InvalidInput("the upload does not begin with a header", hint="send record and attestation first")
        record = from_proto(first.header.record, NativeRecord)
        attestation = from_proto(first.header.attestation, Attestation)
        self.natives.check(record, attestation)
        blob = bytearray()
        async for request in requests:
            if not request.HasField("chunk"):
                raise InvalidInput("a second header in one upload", hint="one native part per call")
            blob += request.chunk
            if len(blob) > record.blob_bytes:
                raise Corrupt(f"more than the {record.blob_bytes} bytes promised", hint="upload it again")
        created = await self.natives.put(record, attestation, bytes(blob), principal())
        return native_pb2.UploadNativeResponse(created=created)

    async def StreamNative(
        self, request: native_pb2.StreamNativeRequest, _: Context
    ) -> AsyncIterator[native_pb2.StreamNativeResponse]:
        record, attestation, blob = await self.natives.get(request.kernel_id, request.target, request.toolchain)
        yield native_pb2.StreamNativeResponse(header=_header(record, attestation))
        for start in range(0, len(blob), CHUNK_BYTES):
            yield native_pb2.StreamNativeResponse(chunk=blob[start : start + CHUNK_BYTES])

    async def ListNatives(self, request: native_pb2.ListNativesRequest, _: Context) -> native_pb2.ListNativesResponse:
        found = await self.natives.of(request.kernel_ids)
        return native_pb2.ListNativesResponse(natives=[_header(*papers) for papers in found])


def _header(record: NativeRecord, attestation: Attestation) -> native_pb2.NativeHeader:
    return native_pb2.NativeHeader(
        record=to_proto(record, kernel_pb2.NativeRecord),
        attestation=to_proto(attestation, kernel_pb2.Attestation),
    )
