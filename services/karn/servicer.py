"""Karn's wire edge: searches, archives and proposals over gRPC."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterable

import grpc

from esper_core.bus.database import Pool
from esper_core.errors import Conflict, NotFound
from esper_core.ids import new_id
from esper_core.pb.esper.karn.v1 import karn_pb2, karn_pb2_grpc
from services import page
from services.bell import Bell
from services.karn import wire
from services.karn.gardener import NEWS, Gardener
from services.karn.nursery import Nursery
from services.karn.searches import LATEST, Searches, SearchState, Wish

POPULATION = 8
Context = grpc.aio.ServicerContext[object, object]


class KarnServicer(karn_pb2_grpc.KarnServiceServicer):
    """See ``protos/esper/karn/v1/karn.proto`` for what each call promises."""

    def __init__(self, database: Pool, bell: Bell, nursery: Nursery, searches: Searches, gardener: Gardener) -> None:
        self._database, self._bell = database, bell
        self._nursery, self._searches, self._gardener = nursery, searches, gardener

    async def Propose(self, request: karn_pb2.ProposeRequest, _: Context) -> karn_pb2.ProposeResponse:
        known = await self._nursery.interface(request.interface_id)
        rows = await self._gardener.propose(known, request.count or 1, request.seed or secrets.randbits(62))
        if not request.only_say:
            await self._gardener.keep(rows)
        return karn_pb2.ProposeResponse(proposals=[wire.proposal(row, known.level) for row in rows])

    async def StartSearch(self, request: karn_pb2.StartSearchRequest, _: Context) -> karn_pb2.StartSearchResponse:
        search_id = request.search_id or f"search-{new_id()[-12:]}"
        seed = request.seed or await self._seed_of(search_id)
        ids = await self._wanted(request.interface_ids)
        wish = Wish(search_id, ids, request.generations, request.population or POPULATION, seed)
        async with self._database.acquire() as connection, connection.transaction():
            await self._searches.start(connection, wish)
            await self._bell.ring(connection, NEWS)
        return karn_pb2.StartSearchResponse(search=await self._told(search_id))

    async def GetSearch(self, request: karn_pb2.GetSearchRequest, _: Context) -> karn_pb2.GetSearchResponse:
        return karn_pb2.GetSearchResponse(search=await self._told(request.search_id))

    async def ListSearches(self, request: karn_pb2.ListSearchesRequest, _: Context) -> karn_pb2.ListSearchesResponse:
        found = await self._searches.newest(page.wanted(request.page_size))
        return karn_pb2.ListSearchesResponse(searches=[wire.search(each) for each in found])

    async def WatchSearch(
        self, request: karn_pb2.WatchSearchRequest, _: Context
    ) -> AsyncIterator[karn_pb2.WatchSearchResponse]:
        search_id, told = (await self._searches.get(request.search_id)).wish.search_id, None
        while True:
            news = self._bell.expect(NEWS)
            found = await self._searches.get(search_id)
            if found != told:
                yield karn_pb2.WatchSearchResponse(search=wire.search(found))
                told = found
            if found.state is not SearchState.RUNNING:
                return
            await self._bell.wait(news)

    async def StopSearch(self, request: karn_pb2.StopSearchRequest, _: Context) -> karn_pb2.StopSearchResponse:
        search_id = (await self._searches.get(request.search_id)).wish.search_id
        async with self._database.acquire() as connection, connection.transaction():
            await self._searches.stop(connection, search_id)
            await self._bell.ring(connection, NEWS)
        return karn_pb2.StopSearchResponse(search=await self._told(search_id))

    async def ListInterfaces(
        self, request: karn_pb2.ListInterfacesRequest, _: Context
    ) -> karn_pb2.ListInterfacesResponse:
        found = await self._nursery.interfaces(page.wanted(request.page_size))
        return karn_pb2.ListInterfacesResponse(interfaces=[wire.interface(each) for each in found])

    async def GetArchive(self, request: karn_pb2.GetArchiveRequest, _: Context) -> karn_pb2.GetArchiveResponse:
        known = await self._nursery.interface(request.interface_id)
        rows = await self._nursery.all(known.interface.id)
        return await asyncio.to_thread(wire.archive, known, rows)

    async def ListProposals(self, request: karn_pb2.ListProposalsRequest, _: Context) -> karn_pb2.ListProposalsResponse:
        search_id, interface_id = request.search_id, request.interface_id
        if search_id == LATEST:
            search_id = (await self._searches.get(LATEST)).wish.search_id
        if interface_id:
            interface_id = (await self._nursery.interface(interface_id)).interface.id
        rows, token = await self._nursery.newest(
            search_id=search_id,
            interface_id=interface_id,
            state=request.state,
            size=page.wanted(request.page_size),
            token=request.page_token,
        )
        levels = {each.interface.id: each.level for each in await self._nursery.interfaces()}
        return karn_pb2.ListProposalsResponse(
            proposals=[wire.proposal(row, levels.get(row.design.interface.id, 1)) for row in rows],
            next_page_token=token,
        )

    async def _told(self, search_id: str) -> karn_pb2.Search:
        return wire.search(await self._searches.get(search_id))

    async def _seed_of(self, search_id: str) -> int:
        """The seed of a search that has begun, so that asking again is no other wish; else a fresh one."""
        try:
            return (await self._searches.get(search_id)).wish.seed
        except NotFound:
            return secrets.randbits(62)

    async def _wanted(self, given: Iterable[str]) -> tuple[str, ...]:
        if wanted := [(await self._nursery.interface(each)).interface.id for each in given]:
            return tuple(dict.fromkeys(wanted))
        known = await self._nursery.interfaces()
        if not known:
            raise Conflict(
                "no slot interface is known yet", hint="train a run first, for example: `esperctl train digits`"
            )
        return tuple(each.interface.id for each in reversed(known))
