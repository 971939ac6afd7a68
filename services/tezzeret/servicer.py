"""Tezzeret's wire edge: wishes in, builds out."""

from __future__ import annotations

import grpc

from esper_core.blueprint.interface import SlotInterface
from esper_core.bus.database import Pool
from esper_core.pb.esper.tezzeret.v1 import tezzeret_pb2, tezzeret_pb2_grpc
from esper_core.rpc.convert import from_proto, to_proto
from services import page
from services.tezzeret import builds, forges
from services.tezzeret.builds import Build
from services.tezzeret.orders import Orders

Context = grpc.aio.ServicerContext[object, object]


class TezzeretServicer(tezzeret_pb2_grpc.TezzeretServiceServicer):
    """See ``protos/esper/tezzeret/v1/tezzeret.proto`` for what each call promises."""

    def __init__(self, database: Pool, orders: Orders) -> None:
        self._database = database
        self._orders = orders

    async def SubmitBuild(
        self, request: tezzeret_pb2.SubmitBuildRequest, _: Context
    ) -> tezzeret_pb2.SubmitBuildResponse:
        interface = from_proto(request.interface, SlotInterface)
        build = await self._orders.submit(request.blueprint_id, interface, dict(request.symbols), request.pipeline)
        return tezzeret_pb2.SubmitBuildResponse(build=_wire(build))

    async def GetBuild(self, request: tezzeret_pb2.GetBuildRequest, _: Context) -> tezzeret_pb2.GetBuildResponse:
        return tezzeret_pb2.GetBuildResponse(build=_wire(await builds.get(self._database, request.build_id)))

    async def GetForgeStatus(
        self, _request: tezzeret_pb2.GetForgeStatusRequest, _: Context
    ) -> tezzeret_pb2.GetForgeStatusResponse:
        return await forges.status(self._database)

    async def ListBuilds(self, request: tezzeret_pb2.ListBuildsRequest, _: Context) -> tezzeret_pb2.ListBuildsResponse:
        found = await builds.newest(
            self._database,
            state=request.state,
            interface_id=request.interface_id,
            size=page.wanted(request.page_size),
        )
        return tezzeret_pb2.ListBuildsResponse(builds=[_wire(build) for build in found])


def _wire(build: Build) -> tezzeret_pb2.Build:
    return to_proto(build, tezzeret_pb2.Build)
