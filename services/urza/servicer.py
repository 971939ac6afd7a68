"""Urza's wire edge: blueprints and kernels over gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from esper_core.blueprint.ir import BlueprintIR
from esper_core.bus.database import Pool
from esper_core.errors import Corrupt, InvalidInput
from esper_core.ids import sha256
from esper_core.kernel.manifest import KernelManifest
from esper_core.kernel.record import KernelStatus, Measurement
from esper_core.kernel.sign import Attestation
from esper_core.pb.esper.urza.v1 import urza_pb2, urza_pb2_grpc
from esper_core.rpc.auth import principal
from esper_core.rpc.convert import from_proto
from services import page
from services.urza import wire
from services.urza.blueprints import Blueprints
from services.urza.imports import Imports
from services.urza.library import Library
from services.urza.lineage import LIMIT, lineage
from services.urza.native import Natives, NativeServing
from services.urza.retention import Retention
from services.urza.upkeep import Upkeep
from services.urza.usage import READER, Field
from services.urza.verdicts import Verdict, Verdicts

M = TypeVar("M", bound=Message)
PAGE_BYTES = 3 * 1024 * 1024
"""What a page may weigh: below gRPC's limit of 4 MiB for one message, whatever is on it."""

Context = grpc.aio.ServicerContext[object, object]


class UrzaServicer(NativeServing, urza_pb2_grpc.UrzaServiceServicer):
    """See ``protos/esper/urza/v1/urza.proto`` for what each call promises."""

    def __init__(
        self,
        database: Pool,
        blueprints: Blueprints,
        library: Library,
        verdicts: Verdicts,
        retention: Retention,
        upkeep: Upkeep,
        field: Field,
        imports: Imports,
        natives: Natives,
    ) -> None:
        self._database = database
        self._blueprints = blueprints
        self._library = library
        self._verdicts = verdicts
        self._retention = retention
        self._upkeep = upkeep
        self._field = field
        self._imports = imports
        self.natives = natives

    async def UploadBlueprint(
        self, request: urza_pb2.UploadBlueprintRequest, _: Context
    ) -> urza_pb2.UploadBlueprintResponse:
        ir = from_proto(request.blueprint, BlueprintIR)
        return urza_pb2.UploadBlueprintResponse(blueprint_id=ir.id, created=await self._blueprints.put(ir, principal()))

    async def GetBlueprint(self, request: urza_pb2.GetBlueprintRequest, _: Context) -> urza_pb2.GetBlueprintResponse:
        return wire.blueprint(await self._blueprints.get(request.blueprint_id))

    async def ListBlueprints(
        self, request: urza_pb2.ListBlueprintsRequest, _: Context
    ) -> urza_pb2.ListBlueprintsResponse:
        found, more = await self._blueprints.newest(page.wanted(request.page_size), request.page_token)
        fit = _fitting(wire.blueprint(one) for one in found)
        more = more or len(fit) < len(found)
        token = str(found[len(fit) - 1].serial) if more else ""
        return urza_pb2.ListBlueprintsResponse(blueprints=fit, next_page_token=token)

    async def GetLineage(self, request: urza_pb2.GetLineageRequest, _: Context) -> urza_pb2.GetLineageResponse:
        stored = await self._blueprints.get(request.blueprint_id)
        found = await lineage(
            self._database, stored.blueprint_id, request.ancestors, request.descendants, request.limit or LIMIT
        )
        return wire.lineage(stored.blueprint_id, found)

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
        kept = await self._library.get(request.kernel_id)
        return urza_pb2.GetKernelResponse(kernel=wire.kernel(kept.record), usage=wire.usage(kept.usage))

    async def QueryKernels(self, request: urza_pb2.QueryKernelsRequest, _: Context) -> urza_pb2.QueryKernelsResponse:
        found, more = await self._library.query(wire.query(request))
        fit = _fitting(wire.kernel(one.record) for one in found)
        more = more or len(fit) < len(found)
        token = found[len(fit) - 1].token if more else ""
        usage = [wire.usage(one.usage) for one in found[: len(fit)]]
        return urza_pb2.QueryKernelsResponse(kernels=fit, next_page_token=token, usage=usage)

    async def StreamKernel(
        self, request: urza_pb2.StreamKernelRequest, _: Context
    ) -> AsyncIterator[urza_pb2.StreamKernelResponse]:
        record = (await self._library.get(request.kernel_id)).record
        if principal() == READER and request.offset == 0:
            await self._field.fetched(record.manifest.kernel_id)
        chunks = self._library.stream(record.manifest, request.offset)
        yield urza_pb2.StreamKernelResponse(record=wire.kernel(record))
        async for offset, data in chunks:
            chunk = urza_pb2.KernelChunk(offset=offset, data=data, sha256=sha256(data))
            yield urza_pb2.StreamKernelResponse(chunk=chunk)

    async def CollectGarbage(
        self, request: urza_pb2.CollectGarbageRequest, _: Context
    ) -> AsyncIterator[urza_pb2.CollectGarbageResponse]:
        keep = request.keep_unused if request.HasField("keep_unused") else self._upkeep.keep_unused
        if request.dry_run:
            yield wire.progress(await self._retention.foresee(keep))
            return
        async for progress in self._retention.collect(keep):
            yield wire.progress(progress)

    async def GetUpkeep(self, _request: urza_pb2.GetUpkeepRequest, _: Context) -> urza_pb2.GetUpkeepResponse:
        return wire.upkeep(await self._upkeep.standing(), self._upkeep.every_seconds, self._upkeep.keep_unused)

    async def ImportLibrary(
        self, requests: AsyncIterator[urza_pb2.ImportLibraryRequest], _: Context
    ) -> AsyncIterator[urza_pb2.ImportLibraryResponse]:
        pieces = (request.chunk async for request in requests)
        async for told in self._imports.take(pieces, principal()):
            yield wire.told(told)

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
        changed = await self._verdicts.judge(request.kernel_id, verdict, principal())
        return urza_pb2.UpdateKernelStatusResponse(kernel=wire.kernel(changed))


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
