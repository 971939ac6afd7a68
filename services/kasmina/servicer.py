"""Kasmina's wire edge: orders in, seeds out."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
from google.protobuf import json_format

from esper_core.control.packet import Command, RampStyle
from esper_core.lifecycle import State
from esper_core.pb.esper.core.v1 import lifecycle_pb2, telemetry_pb2
from esper_core.pb.esper.kasmina.v1 import kasmina_pb2, kasmina_pb2_grpc
from esper_core.rpc.auth import principal
from esper_core.rpc.convert import to_proto
from services import page
from services.bell import Bell
from services.kasmina.orders import Orders
from services.kasmina.seeds import SeedRow, Seeds

NEWS = "kasmina"
Context = grpc.aio.ServicerContext[object, object]
STATS_EPOCHS = 20


class KasminaServicer(kasmina_pb2_grpc.KasminaServiceServicer):
    """See ``protos/esper/kasmina/v1/kasmina.proto`` for what each call promises."""

    def __init__(self, orders: Orders, seeds: Seeds, bell: Bell) -> None:
        self._orders = orders
        self._seeds = seeds
        self._bell = bell

    async def Germinate(self, request: kasmina_pb2.GerminateRequest, _: Context) -> kasmina_pb2.GerminateResponse:
        wish = Command(
            command_id=request.command_id,
            run_id=request.run_id,
            slot=request.slot,
            target=State.GERMINATED,
            kernel_id=request.kernel_id,
            issued_by=principal(),
            reason=request.reason,
            style=RampStyle(request.style),
        )
        return kasmina_pb2.GerminateResponse(command=_command(await self._orders.germinate(wish)))

    async def LoadKernel(
        self,
        request: kasmina_pb2.LoadKernelRequest,
        context: Context,
    ) -> kasmina_pb2.LoadKernelResponse:
        same = kasmina_pb2.GerminateRequest(
            command_id=request.command_id, run_id=request.run_id, slot=request.slot, kernel_id=request.kernel_id
        )
        return kasmina_pb2.LoadKernelResponse(command=(await self.Germinate(same, context)).command)

    async def Transition(self, request: kasmina_pb2.TransitionRequest, _: Context) -> kasmina_pb2.TransitionResponse:
        wish = Command(
            command_id=request.command_id,
            run_id=request.run_id,
            slot=request.slot,
            target=State(request.target),
            issued_by=principal(),
            reason=request.reason,
        )
        return kasmina_pb2.TransitionResponse(command=_command(await self._orders.transition(wish)))

    async def UnloadKernel(
        self,
        request: kasmina_pb2.UnloadKernelRequest,
        context: Context,
    ) -> kasmina_pb2.UnloadKernelResponse:
        same = kasmina_pb2.TransitionRequest(
            command_id=request.command_id,
            run_id=request.run_id,
            slot=request.slot,
            target=lifecycle_pb2.SEED_STATE_CULLED,
        )
        return kasmina_pb2.UnloadKernelResponse(command=(await self.Transition(same, context)).command)

    async def GetSeed(self, request: kasmina_pb2.GetSeedRequest, _: Context) -> kasmina_pb2.GetSeedResponse:
        generation = request.generation if request.HasField("generation") else None
        row, history = await self._seeds.get(request.run_id, request.slot, generation)
        seed = _seed(row)
        for event in history:
            json_format.ParseDict(event, seed.history.add())
        return kasmina_pb2.GetSeedResponse(seed=seed)

    async def ListSeeds(self, request: kasmina_pb2.ListSeedsRequest, _: Context) -> kasmina_pb2.ListSeedsResponse:
        rows = await self._seeds.present(request.run_id, request.states, page.wanted(request.page_size))
        return kasmina_pb2.ListSeedsResponse(seeds=[_seed(row) for row in rows])

    async def GetLayerStats(
        self, request: kasmina_pb2.GetLayerStatsRequest, _: Context
    ) -> kasmina_pb2.GetLayerStatsResponse:
        signals = await self._seeds.stats(request.run_id, request.slot, request.epochs or STATS_EPOCHS)
        return kasmina_pb2.GetLayerStatsResponse(
            signals=[json_format.ParseDict(signal, telemetry_pb2.HealthSignal()) for signal in signals]
        )

    async def WatchSeeds(
        self, request: kasmina_pb2.WatchSeedsRequest, _: Context
    ) -> AsyncIterator[kasmina_pb2.WatchSeedsResponse]:
        ordinal = 0
        while True:
            news = self._bell.expect(NEWS)
            ended = request.until_run_ends and await self._seeds.ended(request.run_id)
            events, ordinal = await self._seeds.events_after(request.run_id, ordinal)
            for event in events:
                yield kasmina_pb2.WatchSeedsResponse(event=json_format.ParseDict(event, lifecycle_pb2.SeedEvent()))
            if not events and ended:
                return
            if not events:
                await self._bell.wait(news)


def _command(command: Command) -> lifecycle_pb2.Command:
    return to_proto(command, lifecycle_pb2.Command)


def _seed(row: SeedRow) -> lifecycle_pb2.Seed:
    return lifecycle_pb2.Seed(
        seed_id=row.seed_id,
        run_id=row.run_id,
        slot=row.slot,
        generation=row.generation,
        state=lifecycle_pb2.SeedState.Name(row.state),
        kernel_id=row.kernel_id,
        blueprint_name=row.blueprint_name,
        alpha=row.alpha,
        epoch=row.epoch,
        health=row.health,
    )
