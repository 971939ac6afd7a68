"""Urabrask's wire edge: what was found, look again, and bring the tags up to date."""

from __future__ import annotations

import grpc

from esper_core.bus.database import Pool
from esper_core.pb.esper.urabrask.v1 import urabrask_pb2, urabrask_pb2_grpc
from esper_core.rpc.convert import to_proto
from services.bell import Bell
from services.urabrask import evaluations
from services.urabrask.evaluations import Evaluation
from services.urabrask.judge import NEWS
from services.urabrask.library import Library
from services.urabrask.retag import Change, Retag

MOST_CHANGES = 1000
"""In one answer."""

Context = grpc.aio.ServicerContext[object, object]


class UrabraskServicer(urabrask_pb2_grpc.UrabraskServiceServicer):
    """See ``protos/esper/urabrask/v1/urabrask.proto`` for what each call promises."""

    def __init__(self, database: Pool, bell: Bell, library: Library, retag: Retag) -> None:
        self._database, self._bell, self._library, self._retag = database, bell, library, retag

    async def GetEvaluation(
        self, request: urabrask_pb2.GetEvaluationRequest, _: Context
    ) -> urabrask_pb2.GetEvaluationResponse:
        found = await evaluations.get(self._database, request.kernel_id)
        return urabrask_pb2.GetEvaluationResponse(evaluation=_wire(found))

    async def Evaluate(self, request: urabrask_pb2.EvaluateRequest, _: Context) -> urabrask_pb2.EvaluateResponse:
        record = await self._library.find(request.kernel_id)
        async with self._database.acquire() as connection, connection.transaction():
            await evaluations.add(connection, request.kernel_id, record.interface_id, again=True)
            await self._bell.ring(connection, NEWS)
        found = await evaluations.get(self._database, request.kernel_id)
        return urabrask_pb2.EvaluateResponse(evaluation=_wire(found))

    async def Retag(self, request: urabrask_pb2.RetagRequest, _: Context) -> urabrask_pb2.RetagResponse:
        examined, changed = await self._retag.once(dry_run=request.dry_run)
        return urabrask_pb2.RetagResponse(
            examined=examined, changed=len(changed), changes=[_change(change) for change in changed[:MOST_CHANGES]]
        )


def _change(change: Change) -> urabrask_pb2.TagChange:
    kernel = change.kernel
    return urabrask_pb2.TagChange(
        kernel_id=kernel.kernel_id,
        target=kernel.measurement.target,
        removed=change.removed,
        added=change.added,
    )


def _wire(found: Evaluation) -> urabrask_pb2.Evaluation:
    return to_proto(found, urabrask_pb2.Evaluation)
