"""With Urabrask away, what waits for his verdict ends with a reason; when he is back, nothing that was built is lost."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from pydantic import SecretStr

from esper_core.config import Endpoints, UpkeepSection
from esper_core.kernel.manifest import KernelManifest, Provenance
from esper_core.kernel.record import KernelRecord, KernelStatus
from esper_core.pb.esper.karn.v1 import karn_pb2, karn_pb2_grpc
from esper_core.pb.esper.tezzeret.v1 import tezzeret_pb2
from esper_core.store.postgres import migrate
from services.composition import run, schemas
from services.karn.breed import founders
from services.karn.nursery import Nursery, Row, State, Tale
from services.karn.searches import Searches, SearchState, Wish
from services.tamiyo.service import Library
from tests.service.innovation.conftest import free_port, nats_in
from tests.service.innovation.papers import Innovation, interface, until
from tests.service.innovation.test_karn import known, offer

PATIENCE = 1.5
"""Seconds that Karn waits for a verdict; far less than the bench takes to start."""
WITHOUT = ("oona", "urza", "tezzeret", "karn")
JUDGED = (karn_pb2.PROPOSAL_STATE_MEASURED, karn_pb2.PROPOSAL_STATE_REJECTED)
pytestmark = pytest.mark.timeout(240)


@pytest.fixture
async def impatient(stack: Endpoints, tmp_path: Path) -> AsyncIterator[Endpoints]:
    """A database and a NATS that no other test has, for a platform that waits ``PATIENCE``."""
    name, dsn = f"unjudged_{secrets.token_hex(4)}", stack.postgres_dsn.get_secret_value()
    connection = await asyncpg.connect(dsn)
    await connection.execute(f'CREATE DATABASE "{name}" STRATEGY = file_copy')
    grpc = f"127.0.0.1:{free_port()}"
    with nats_in(tmp_path) as nats:
        yield stack.model_copy(
            update={
                "nats_url": nats,
                "nats_user": None,
                "nats_password": None,
                "postgres_dsn": SecretStr(dsn.replace("/esper?", f"/{name}?")),
                "grpc_address": grpc,
                "grpc_listen": grpc,
                "metrics_port": free_port(),
                "upkeep": UpkeepSection(verdict_seconds=PATIENCE),
            }
        )
    await connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    await connection.close()


@contextlib.asynccontextmanager
async def serving(endpoints: Endpoints, names: tuple[str, ...]) -> AsyncIterator[Innovation]:
    task = asyncio.create_task(run(endpoints, names))
    made = await Innovation.connect(endpoints)
    try:
        yield made
    finally:
        await made.close()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def karn_of(innovation: Innovation) -> Any:
    return karn_pb2_grpc.KarnServiceStub(innovation.channel("operator"))


async def proposals(karn: Any, interface_id: str) -> list[karn_pb2.Proposal]:
    request = karn_pb2.ListProposalsRequest(interface_id=interface_id)
    return list((await karn.ListProposals(request)).proposals)


async def test_a_search_without_a_judge_gives_up_and_its_kernels_count_once_he_is_back(impatient: Endpoints) -> None:
    async with serving(impatient, WITHOUT) as innovation:
        karn = karn_of(innovation)
        slot = interface(in_width=8, out_width=8)
        interface_id = await offer(innovation, slot)
        await until(lambda: known(karn, interface_id))
        singly = karn_pb2.ProposeRequest(interface_id=interface_id, count=1, seed=3)
        alone = (await karn.Propose(singly)).proposals[0]
        wish = karn_pb2.StartSearchRequest(interface_ids=[interface_id], generations=3, population=6, seed=5)
        search_id = (await karn.StartSearch(wish)).search.search_id
        async with asyncio.timeout(120):
            async for news in karn.WatchSearch(karn_pb2.WatchSearchRequest(search_id=search_id)):
                told = news.search
        assert (told.state, told.generation) == (karn_pb2.SEARCH_STATE_GAVE_UP, 0)
        assert told.reason.startswith(f"Urabrask judged nothing for {PATIENCE:g} s")

        async def nobody_waits() -> bool:
            states = {each.state for each in await proposals(karn, interface_id)}
            return states == {karn_pb2.PROPOSAL_STATE_UNJUDGED}

        await until(nobody_waits, 60)
        built = await proposals(karn, interface_id)
        assert {each.search_id for each in built} == {"", search_id}
        assert alone.blueprint_id in [each.blueprint_id for each in built if not each.search_id]
        assert all(each.kernel_id and "not judged by Urabrask within" in each.reason for each in built)
        assert not await Library(innovation.urza("tamiyo")).ask(interface_id)

    async with serving(impatient, (*WITHOUT, "urabrask")) as innovation:
        karn = karn_of(innovation)

        async def all_judged() -> list[karn_pb2.Proposal]:
            """Everything that was built, for Karn or because a run offered the slot, and its verdict."""
            builds = (await innovation.tezzeret().ListBuilds(tezzeret_pb2.ListBuildsRequest())).builds
            found = await proposals(karn, interface_id)
            over = {each.kernel_id for each in found if each.state in JUDGED}
            whole = all(build.state == tezzeret_pb2.BUILD_STATE_DONE for build in builds)
            return found if whole and over == {build.kernel_id for build in builds} else []

        later = await until(all_judged, 180)
        assert {each.kernel_id for each in later} >= {each.kernel_id for each in built}
        fit = {each.kernel_id for each in later if each.state == karn_pb2.PROPOSAL_STATE_MEASURED}
        archive = await karn.GetArchive(karn_pb2.GetArchiveRequest(interface_id=interface_id))
        assert archive.interface.measured == len(fit) > 0
        assert {elite.proposal.kernel_id for elite in archive.elites} <= fit
        offered = await Library(innovation.urza("tamiyo")).ask(interface_id)
        assert {candidate.kernel_id for candidate in offered} == fit
        again = (await karn.GetSearch(karn_pb2.GetSearchRequest(search_id=search_id))).search
        assert (again.state, again.unjudged) == (karn_pb2.SEARCH_STATE_GAVE_UP, 0)


async def test_the_hours_that_a_platform_was_down_are_not_counted(impatient: Endpoints) -> None:
    patient = impatient.model_copy(update={"upkeep": UpkeepSection(verdict_seconds=100.0)})
    async with serving(patient, WITHOUT) as innovation:
        karn = karn_of(innovation)
        interface_id = await offer(innovation, interface(in_width=8, out_width=8))
        await until(lambda: known(karn, interface_id))
        wish = karn_pb2.StartSearchRequest(interface_ids=[interface_id], generations=1, population=1, seed=5)
        search_id = (await karn.StartSearch(wish)).search.search_id

        async def built() -> bool:
            return all([each.kernel_id for each in await proposals(karn, interface_id)] or [False])

        await until(built, 60)
    async with asyncpg.create_pool(patient.postgres_dsn.get_secret_value(), min_size=1, max_size=1) as pool:
        tag = await pool.execute("UPDATE karn.designs SET built = built - interval '1 hour' WHERE state = 2")
        assert tag == "UPDATE 1"
    async with serving(patient, (*WITHOUT, "urabrask")) as innovation:
        async with asyncio.timeout(90):
            request = karn_pb2.WatchSearchRequest(search_id=search_id)
            async for news in karn_of(innovation).WatchSearch(request):
                told = news.search
        assert (told.state, told.unjudged) == (karn_pb2.SEARCH_STATE_FINISHED, 0)


async def test_a_kernel_that_alone_has_no_verdict_holds_no_search_up(impatient: Endpoints) -> None:
    """Others are judged: the search goes on without it, for the judge is there."""
    dsn = impatient.postgres_dsn.get_secret_value()
    await migrate(dsn, schemas(("karn",)))
    async with asyncpg.create_pool(dsn, min_size=1, max_size=2) as pool:
        nursery, searches, slot = Nursery(pool), Searches(pool), interface()
        stuck, judged, proposed = (
            Row(design, {}, Tale("catalogue", search_id="search-1"), State.PROPOSED) for design in founders(slot)[:3]
        )
        async with pool.acquire() as connection:
            await nursery.meet(connection, slot)
            await searches.start(connection, Wish("search-1", (slot.id,), 1, 3, 1))
            for row in (stuck, judged, proposed):
                assert await nursery.propose(connection, row)
            for row in (stuck, judged):
                await nursery.submitted(row, "build-x")
            assert not await nursery.overdue(stuck, "kernel-x", 3600.0)
            manifest = KernelManifest.describe(judged.design.ir, slot, b"weights", Provenance())
            assert await nursery.judged(connection, KernelRecord(manifest=manifest, status=KernelStatus.REJECTED))
            assert not await nursery.overdue(stuck, "kernel-x", 3600.0)
            assert await nursery.overdue(stuck, "kernel-x", 0.0)
            assert not await nursery.overdue(judged, "kernel-y", 0.0), "it has a verdict"
            assert not await nursery.unjudged(connection, stuck, "late"), "the bench is not silent"
        found = await searches.get("search-1")
        assert (found.state, found.waiting, found.unfit, found.unjudged) == (SearchState.RUNNING, 1, 1, 1)
