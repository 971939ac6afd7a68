"""Tolaria's wire edge: the book of runs over gRPC. The training process itself is elsewhere and never listens."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
from google.protobuf import json_format

from esper_core.pb.esper.core.v1 import run_pb2
from esper_core.pb.esper.tolaria.v1 import tolaria_pb2, tolaria_pb2_grpc
from services import page
from services.bell import Bell
from services.tolaria.runs import Json, RunRow, Runs

NEWS = "tolaria"
Context = grpc.aio.ServicerContext[object, object]


class TolariaServicer(tolaria_pb2_grpc.TolariaServiceServicer):
    """See ``protos/esper/tolaria/v1/tolaria.proto`` for what each call promises."""

    def __init__(self, runs: Runs, bell: Bell) -> None:
        self._runs = runs
        self._bell = bell

    async def GetRun(self, request: tolaria_pb2.GetRunRequest, _: Context) -> tolaria_pb2.GetRunResponse:
        return tolaria_pb2.GetRunResponse(run=_wire(await self._runs.get(request.run_id)))

    async def ListRuns(self, request: tolaria_pb2.ListRunsRequest, _: Context) -> tolaria_pb2.ListRunsResponse:
        runs, token = await self._runs.newest(
            state=request.state, size=page.wanted(request.page_size), token=request.page_token
        )
        return tolaria_pb2.ListRunsResponse(runs=[_wire(run) for run in runs], next_page_token=token)

    async def WatchRun(
        self, request: tolaria_pb2.WatchRunRequest, _: Context
    ) -> AsyncIterator[tolaria_pb2.WatchRunResponse]:
        run_id, ordinal, told_the_end = (await self._runs.get(request.run_id)).run_id, 0, False
        while True:
            news = self._bell.expect(NEWS)
            run = await self._runs.get(run_id)
            figures, ordinal = await self._runs.epochs_after(run_id, ordinal)
            for latest in figures:
                yield tolaria_pb2.WatchRunResponse(run=_wire(run, latest))
                told_the_end = run.ended
            if figures:
                continue
            if run.ended:
                if not told_the_end:
                    yield tolaria_pb2.WatchRunResponse(run=_wire(run))
                return
            await self._bell.wait(news)


def _wire(row: RunRow, latest: Json | None = None) -> run_pb2.Run:
    told = {**row.description, **row.outcome, "run_id": row.run_id, "state": row.state}
    run = json_format.ParseDict(told, run_pb2.Run())
    run.started = run.started or row.started.isoformat()
    run.updated = row.updated.isoformat()
    figures = latest or row.latest
    if figures is not None:
        json_format.ParseDict(figures, run.latest)
    return run
