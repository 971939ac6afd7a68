"""The library's nouns as messages, and a request as a query."""

from __future__ import annotations

from dataclasses import asdict

from esper_core.kernel.record import KernelRecord
from esper_core.pb.esper.core.v1 import blueprint_pb2, kernel_pb2
from esper_core.pb.esper.urza.v1 import urza_pb2
from esper_core.rpc.convert import to_proto
from services import page
from services.urza.blueprints import StoredBlueprint
from services.urza.imports import Told
from services.urza.lineage import Lineage
from services.urza.query import Order, Query
from services.urza.retention import Progress
from services.urza.upkeep import Standing
from services.urza.usage import Usage


def blueprint(stored: StoredBlueprint) -> urza_pb2.GetBlueprintResponse:
    return urza_pb2.GetBlueprintResponse(
        blueprint_id=stored.blueprint_id,
        blueprint=to_proto(stored.blueprint, blueprint_pb2.BlueprintIR),
        created=stored.created.isoformat(),
        created_by=stored.created_by,
    )


def lineage(blueprint_id: str, found: Lineage) -> urza_pb2.GetLineageResponse:
    return urza_pb2.GetLineageResponse(
        blueprint_id=blueprint_id,
        relatives=[
            urza_pb2.Relative(
                blueprint_id=one.blueprint_id, name=one.name, created_by=one.created_by, generation=one.generation
            )
            for one in found.relatives
        ],
        descents=[urza_pb2.Descent(parent_id=parent, child_id=child) for parent, child in found.descents],
        truncated=found.truncated,
    )


def query(request: urza_pb2.QueryKernelsRequest) -> Query:
    return Query(
        interface_id=request.interface_id,
        status=request.status,
        required_tags=request.required_tags,
        excluded_tags=request.excluded_tags,
        preferred_tags=request.preferred_tags,
        max_parameters=request.max_parameters,
        max_forward_seconds=request.max_forward_seconds,
        max_forward_seconds_p99=request.max_forward_seconds_p99,
        max_memory_bytes=request.max_memory_bytes,
        target=request.target,
        blueprint_id=request.blueprint_id,
        born_of=request.born_of,
        order=Order(request.order or Order.PARAMETERS),
        size=page.wanted(request.page_size),
        token=request.page_token,
    )


def kernel(record: KernelRecord) -> kernel_pb2.KernelRecord:
    return to_proto(record, kernel_pb2.KernelRecord)


def usage(found: Usage) -> urza_pb2.KernelUsage:
    return urza_pb2.KernelUsage(
        streams=found.streams,
        tried=found.tried,
        fossilized=found.fossilized,
        culled=found.culled,
        rolled_back=found.rolled_back,
        contribution=found.contribution,
        interest=found.interest,
    )


def progress(found: Progress) -> urza_pb2.CollectGarbageResponse:
    return urza_pb2.CollectGarbageResponse(
        doomed=found.doomed,
        forgotten=found.forgotten,
        rejected=found.rejected,
        retired=found.retired,
        unused=found.unused,
        blobs=found.blobs,
        bytes=found.bytes,
        kept=found.kept,
        done=found.done,
    )


def upkeep(found: Standing, every_seconds: float, keep_unused: int) -> urza_pb2.GetUpkeepResponse:
    due, begun, finished = (moment.isoformat() if moment else "" for moment in (found.due, found.begun, found.finished))
    return urza_pb2.GetUpkeepResponse(
        every_seconds=every_seconds,
        keep_unused=keep_unused,
        due=due,
        holder=found.holder,
        begun=begun,
        finished=finished,
        reason=found.reason,
        passes=found.passes,
        forgotten=found.forgotten,
        blobs=found.blobs,
        bytes=found.bytes,
        kept=found.kept,
    )


def told(found: Told) -> urza_pb2.ImportLibraryResponse:
    answer = urza_pb2.ImportLibraryResponse(total=found.total, finished=found.finished)
    if found.native is not None and found.record is not None:
        part = found.native.record
        answer.native.CopyFrom(
            urza_pb2.ImportedNative(
                kernel_id=part.kernel_id,
                blueprint_name=found.record.manifest.blueprint.name,
                target=part.target,
                toolchain=part.toolchain,
                kept=found.status is not None,
                created=found.created,
                note=found.note,
                hint=found.hint,
            )
        )
    elif found.record is not None:
        answer.kernel.CopyFrom(
            urza_pb2.ImportedKernel(
                kernel_id=found.record.manifest.kernel_id,
                status=None if found.status is None else kernel_pb2.KernelStatus.Name(found.status),
                created=found.created,
                note=found.note,
                blueprint_name=found.record.manifest.blueprint.name,
                hint=found.hint,
            )
        )
    if found.done:
        answer.summary.CopyFrom(urza_pb2.ImportSummary(**asdict(found.summary)))
    return answer
