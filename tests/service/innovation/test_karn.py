"""Karn over the real library, forge and bench: a search breeds, builds, measures and remembers, and is not lost by a kill."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from esper_core.blueprint.interface import SlotInterface
from esper_core.bus import subjects
from esper_core.bus.envelope import wrap
from esper_core.config import Endpoints
from esper_core.errors import AlreadyExists, Conflict, NotFound
from esper_core.ids import new_id
from esper_core.pb.esper.bus.v1 import bus_pb2
from esper_core.pb.esper.core.v1 import blueprint_pb2, decision_pb2, run_pb2
from esper_core.pb.esper.karn.v1 import karn_pb2, karn_pb2_grpc
from esper_core.pb.esper.urza.v1 import urza_pb2
from esper_core.rpc.convert import to_proto
from services.composition import run
from tests.service.innovation.conftest import free_port, nats_in
from tests.service.innovation.papers import Innovation, Kernel, interface, run_id, until

PATIENCE = 200.0
"""Seconds for a handful of kernels to be built and judged; they are quick, but the children work at the lowest priority."""
pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
async def karn(innovation: Innovation, endpoints: Endpoints) -> AsyncIterator[Any]:
    """Karn beside the running services, in a process of its own as far as it can tell."""
    async with serving(innovation, endpoints) as stub:
        yield stub


@contextlib.asynccontextmanager
async def serving(innovation: Innovation, endpoints: Endpoints) -> AsyncIterator[Any]:
    address = f"127.0.0.1:{free_port()}"
    own = endpoints.model_copy(update={"grpc_listen": address, "metrics_port": free_port()})
    task = asyncio.create_task(run(own, ("karn",)))
    there = Innovation(endpoints.model_copy(update={"grpc_address": address}), innovation.database, innovation.bus)
    stub = karn_pb2_grpc.KarnServiceStub(there.channel("operator"))
    async with asyncio.timeout(20):
        await there.channel("operator").channel_ready()
    yield stub
    for channel in there.channels.values():
        await channel.close()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def offer(innovation: Innovation, slot: SlotInterface) -> str:
    """A run tells of its slot, but is itself not one that kernels are built for by the dozen."""
    name = run_id()
    told = run_pb2.Run(run_id=name, host="mlp", dataset="digits", epochs=3, morphogenetic=True)
    told.slots.add(slot="fc1:fc2", interface=to_proto(slot, blueprint_pb2.SlotInterface))
    envelope = wrap(bus_pb2.RunRegistered(run=told), producer="tolaria", run_id=name, sequence=1)
    await innovation.bus.publish(subjects.RUN_EVENTS.of(name), envelope)
    return slot.id


async def announce(innovation: Innovation, kernel: Kernel) -> None:
    """Bring a kernel that Karn has not asked for, as the forge would."""
    await innovation.upload(kernel)
    ready = bus_pb2.KernelReady(kernel_id=kernel.manifest.kernel_id, interface_id=kernel.manifest.interface_id)
    await innovation.bus.publish(subjects.KERNEL_READY.of(), wrap(ready, producer="tezzeret"))


async def known(karn: Any, interface_id: str) -> bool:
    answer = await karn.ListInterfaces(karn_pb2.ListInterfacesRequest())
    return interface_id in [each.interface_id for each in answer.interfaces]


async def finished(karn: Any, search_id: str) -> karn_pb2.Search:
    async with asyncio.timeout(PATIENCE):
        async for news in karn.WatchSearch(karn_pb2.WatchSearchRequest(search_id=search_id)):
            told = news.search
    return told


async def test_without_an_interface_a_search_says_what_to_do(bare: Innovation, tmp_path: Path) -> None:
    """On a database and a bus of its own: nobody has told of an interface there."""
    with nats_in(tmp_path) as url:
        async with serving(bare, bare.endpoints.model_copy(update={"nats_url": url})) as karn:
            with pytest.raises(Conflict) as refusal:
                await karn.StartSearch(karn_pb2.StartSearchRequest(generations=1))
            assert "esperctl train" in refusal.value.hint
            with pytest.raises(NotFound):
                await karn.GetArchive(karn_pb2.GetArchiveRequest())


async def test_a_search_breeds_measures_and_remembers(karn: Any, innovation: Innovation) -> None:
    interface_id = await offer(innovation, interface(in_width=8, out_width=8))
    await until(lambda: known(karn, interface_id))
    begin = karn_pb2.StartSearchRequest(
        search_id=f"search-{new_id()[-8:]}", interface_ids=[interface_id], generations=2, population=4, seed=5
    )
    await karn.StartSearch(begin)
    again = (await karn.StartSearch(begin)).search
    assert again.search_id == begin.search_id
    begin.population = 7
    with pytest.raises(AlreadyExists):
        await karn.StartSearch(begin)

    told = await finished(karn, begin.search_id)
    assert (told.state, told.generation, told.waiting) == (karn_pb2.SEARCH_STATE_FINISHED, 2, 0)
    assert told.proposed + told.unfit > 0
    assert 0.3 < told.progress[0].best < 1
    archive = await karn.GetArchive(karn_pb2.GetArchiveRequest(interface_id=interface_id[:20]))
    assert archive.progress.best == pytest.approx(told.progress[0].best, abs=0.1)
    assert archive.progress.coverage == len(archive.elites) / (archive.cost_cells * archive.leaning_cells)
    assert archive.elites[0].proposal.worth == archive.progress.best
    assert len(archive.elites[0].lessons) == 12

    request = karn_pb2.ListProposalsRequest(search_id=begin.search_id)
    proposals = (await karn.ListProposals(request)).proposals
    assert {each.generation for each in proposals} <= {0, 1}
    measured = [each for each in proposals if each.state == karn_pb2.PROPOSAL_STATE_MEASURED]
    children = [each for each in measured if each.parent_ids]
    assert children, "the later generations descend from what the first brought"
    assert all(each.why.startswith(each.operator) for each in children)
    for child in children:
        stored = await innovation.urza().GetBlueprint(urza_pb2.GetBlueprintRequest(blueprint_id=child.blueprint_id))
        assert stored.created_by == "karn"
        assert list(stored.blueprint.parent_ids) == list(child.parent_ids)
        kernel = await innovation.record(child.kernel_id)
        assert kernel.measurement is not None
        assert kernel.measurement.learned is not None
        assert (kernel.born_of, kernel.interface_id) == ("karn", interface_id)


async def test_a_rejected_kernel_is_no_parent_and_never_tried_again(karn: Any, innovation: Innovation) -> None:
    slot = interface(in_width=8, out_width=8)
    spoilt = innovation.make(slot, symbols={"width": 16}, spoil=lambda state: state["B.bias"].add_(1.0))
    await announce(innovation, spoilt)

    async def judged() -> list[int]:
        if not await known(karn, slot.id):
            return []
        request = karn_pb2.ListProposalsRequest(interface_id=slot.id)
        return [each.state for each in (await karn.ListProposals(request)).proposals]

    assert await until(judged, PATIENCE) == [karn_pb2.PROPOSAL_STATE_REJECTED]
    archive = await karn.GetArchive(karn_pb2.GetArchiveRequest(interface_id=slot.id))
    assert not archive.elites
    wish = karn_pb2.ProposeRequest(interface_id=slot.id, count=30, seed=1, only_say=True)
    said = (await karn.Propose(wish)).proposals
    assert len(said) == 30
    widths = [
        each.blueprint.symbols["width"]
        for each in said
        if not each.parent_ids and each.blueprint.name == "bottleneck_mlp"
    ]
    # Other widths may come with them, of designs that did well at another slot.
    catalogued = [width for width in widths if width in (4, 8, 16, 32)]
    assert sorted(catalogued) == [4, 8, 32], "of the catalogue's widths all but the rejected one"


async def test_what_runs_report_moves_a_design_s_worth(karn: Any, innovation: Innovation) -> None:
    slot = interface(in_width=8, out_width=8)
    kernel = innovation.make(slot, symbols={"width": 4})
    await announce(innovation, kernel)

    async def worth() -> float:
        try:
            archive = await karn.GetArchive(karn_pb2.GetArchiveRequest(interface_id=slot.id))
        except NotFound:
            return 0.0
        return archive.elites[0].proposal.worth if archive.elites else 0.0

    before = await until(worth, PATIENCE)
    report = decision_pb2.FieldReport(
        report_id=new_id(),
        run_id=run_id(),
        seed_id="r/s/0",
        slot="fc1:fc2",
        kernel_id=kernel.manifest.kernel_id,
        outcome=11,
        contribution=-0.1,
    )
    await innovation.bus.publish(subjects.FIELD_REPORTS.of(), wrap(report, producer="tolaria"))

    async def fallen() -> bool:
        return await worth() < before - 0.04

    await until(fallen)


async def test_a_search_goes_on_where_a_killed_one_was(innovation: Innovation, endpoints: Endpoints) -> None:
    interface_id = ""
    async with serving(innovation, endpoints) as karn:
        interface_id = await offer(innovation, interface(in_width=8, out_width=8))
        await until(lambda: known(karn, interface_id))
        begin = karn_pb2.StartSearchRequest(interface_ids=[interface_id], generations=2, population=2, seed=2)
        search_id = (await karn.StartSearch(begin)).search.search_id

        async def half_way() -> bool:
            told = (await karn.GetSearch(karn_pb2.GetSearchRequest(search_id=search_id))).search
            return 0 < told.waiting < told.proposed

        await until(half_way, PATIENCE)
    async with serving(innovation, endpoints) as karn:
        told = await finished(karn, search_id)
        assert (told.state, told.generation) == (karn_pb2.SEARCH_STATE_FINISHED, 2)
        proposals = (await karn.ListProposals(karn_pb2.ListProposalsRequest(search_id=search_id))).proposals
        assert len(proposals) == told.proposed <= 4
        assert len({each.blueprint_id + str(each.blueprint.symbols) for each in proposals}) == len(proposals)
