"""Urza's wire edge: blueprints and kernels over gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from esper_core.blueprint.ir import BlueprintIR
from esper_core.errors import Corrupt, InvalidInput
from esper_core.ids import sha256
from esper_core.kernel.manifest import KernelManifest
from esper_core.kernel.record import KernelRecord, KernelStatus, Measurement
from esper_core.kernel.sign import Attestation
from esper_core.pb.esper.core.v1 import blueprint_pb2, kernel_pb2
from esper_core.pb.esper.urza.v1 import urza_pb2, urza_pb2_grpc
from esper_core.rpc.auth import principal
from esper_core.rpc.convert import from_proto, to_proto
from services import page
from services.urza.blueprints import Blueprints, StoredBlueprint
from services.urza.library import Library, Query, Verdict, token_after
from services.urza.native import Natives, NativeServing

M = TypeVar("M", bound=Message)
PAGE_BYTES = 3 * 1024 * 1024
"""What a page may weigh: below gRPC's limit of 4 MiB for one message, whatever is on it."""

Context = grpc.aio.ServicerContext[object, object]


class UrzaServicer(NativeServing, urza_pb2_grpc.UrzaServiceServicer):
    """See ``protos/esper/urza/v1/urza.proto`` for what each call promises."""

    def __init__(self, blueprints: Blueprints, library: Library, natives: Natives) -> None:
        self._blueprints = blueprints
        self._library = library
        self.natives = natives

    async def UploadBlueprint(
        self, request: urza_pb2.UploadBlueprintRequest, _: Context
    ) -> urza_pb2.UploadBlueprintResponse:
        ir = from_proto(request.blueprint, BlueprintIR)
        return urza_pb2.UploadBlueprintResponse(blueprint_id=ir.id, created=await self._blueprints.put(ir, principal()))

    async def GetBlueprint(self, request: urza_pb2.GetBlueprintRequest, _: Context) -> urza_pb2.GetBlueprintResponse:
        return _blueprint(await self._blueprints.get(request.blueprint_id))

    async def ListBlueprints(
        self, request: urza_pb2.ListBlueprintsRequest, _: Context
    ) -> urza_pb2.ListBlueprintsResponse:
        found, more = await self._blueprints.newest(page.wanted(request.page_size), request.page_token)
        fit = _fitting(_blueprint(one) for one in found)
        more = more or len(fit) < len(found)
        token = str(found[len(fit) - 1].serial) if more else ""
        return urza_pb2.ListBlueprintsResponse(blueprints=fit, next_page_token=token)

    async def UploadKernel(
        self, requests: AsyncIterator[urza_pb2.UploadKernelRequest], _: Context
    ) -> urza_pb2.UploadKernelResponse:
        header = await _header(requests)
        manifest = from_proto(header.manifest, KernelManifest)
        attestation = from_proto(header.attestation, Attestation)
        await self._library.check(manifest, attestation)
        blob = await _gather(requests, manifest.blob_bytes)
        created = await self._library.put(manifest, attestation, blob, principal())
        return urza_pb2.UploadKernelResponse(kernel_id=manifest.kernel_id, created=created)

    async def GetKernel(self, request: urza_pb2.GetKernelRequest, _: Context) -> urza_pb2.GetKernelResponse:
        return urza_pb2.GetKernelResponse(kernel=_kernel(await self._library.get(request.kernel_id)))

    async def QueryKernels(self, request: urza_pb2.QueryKernelsRequest, _: Context) -> urza_pb2.QueryKernelsResponse:
        query = Query(
            interface_id=request.interface_id,
            status=request.status,
            required_tags=request.required_tags,
            excluded_tags=request.excluded_tags,
            max_parameters=request.max_parameters,
            max_forward_seconds=request.max_forward_seconds,
            blueprint_id=request.blueprint_id,
            size=page.wanted(request.page_size),
            token=request.page_token,
        )
        found, more = await self._library.query(query)
        fit = _fitting(_kernel(one) for one in found)
        more = more or len(fit) < len(found)
        token = token_after(found[len(fit) - 1]) if more else ""
        return urza_pb2.QueryKernelsResponse(kernels=fit, next_page_token=token)

    async def StreamKernel(
        self, request: urza_pb2.StreamKernelRequest, _: Context
    ) -> AsyncIterator[urza_pb2.StreamKernelResponse]:
        record = await self._library.get(request.kernel_id)
        chunks = self._library.stream(record.manifest, request.offset)
        yield urza_pb2.StreamKernelResponse(record=_kernel(record))
        async for offset, data in chunks:
            chunk = urza_pb2.KernelChunk(offset=offset, data=data, sha256=sha256(data))
            yield urza_pb2.StreamKernelResponse(chunk=chunk)

    async def UpdateKernelStatus(
        self, request: urza_pb2.UpdateKernelStatusRequest, _: Context
    ) -> urza_pb2.UpdateKernelStatusResponse:
        verdict = Verdict(
            status=KernelStatus(request.status),
            reason=request.reason,
            tags=tuple(request.tags),
            measurement=from_proto(request.measurement, Measurement) if request.HasField("measurement") else None,
            attestation=from_proto(request.attestation, Attestation) if request.HasField("attestation") else None,
        )
        changed = await self._library.judge(request.kernel_id, verdict, principal())
        return urza_pb2.UpdateKernelStatusResponse(kernel=_kernel(changed))


def _fitting(messages: Iterable[M]) -> list[M]:
    """As many from the front as one answer can carry; at least one."""
    fit: list[M] = []
    size = 0
    for message in messages:
        size += message.ByteSize()
        if fit and size > PAGE_BYTES:
            break
        fit.append(message)
    return fit


async def _header(requests: AsyncIterator[urza_pb2.UploadKernelRequest]) -> urza_pb2.KernelHeader:
    first = await anext(aiter(requests), None)
    if first is None or not first.HasField("header"):
        raise InvalidInput("the upload does not begin with a header", hint="send manifest and attestation first")
    return first.header


async def _gather(requests: AsyncIterator[urza_pb2.UploadKernelRequest], size: int) -> bytes:
    blob = bytearray()
    async for request in requests:
        if not request.HasField("chunk"):
            raise InvalidInput("a second header in one upload", hint="one kernel per call")
        blob += request.chunk
        if len(blob) > size:
            raise Corrupt(f"more than the {size} bytes that the manifest promises", hint="upload it again")
    return bytes(blob)


def _blueprint(stored: StoredBlueprint) -> urza_pb2.GetBlueprintResponse:
    return urza_pb2.GetBlueprintResponse(
        blueprint_id=stored.blueprint_id,
        blueprint=to_proto(stored.blueprint, blueprint_pb2.BlueprintIR),
        created=stored.created.isoformat(),
        created_by=stored.created_by,
    )


def _kernel(record: KernelRecord) -> kernel_pb2.KernelRecord:
    return to_proto(record, kernel_pb2.KernelRecord)
