"""Two forges never do one thing twice at a time, and what a dead one held is taken up by the next."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

import services.tezzeret
import services.urabrask
from esper_core.kernel.manifest import NativeFigures
from esper_core.kernel.record import KernelStatus
from esper_core.store.postgres import migrate, open_pool
from services.tezzeret import builds, forges
from services.tezzeret.builds import BuildState, Wish
from services.tezzeret.forges import Forge
from services.tezzeret.toolchain import Toolchain
from services.urabrask import evaluations
from services.urabrask.evaluations import Phase
from tests.service.innovation.papers import interface

Pool = asyncpg.Pool
HERE = Toolchain("linux/x/this processor", {"torch": "1"})
NEWER = Toolchain(HERE.target, {"torch": "2"})
ELSEWHERE = Toolchain("linux/x/another processor", HERE.versions)


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    packages = {"tezzeret": services.tezzeret, "urabrask": services.urabrask}
    await migrate(database, {name: Path(package.__path__[0]) / "schema" for name, package in packages.items()})
    pool = await open_pool(database)
    yield pool
    await pool.close()


async def queue(pool: Pool, ranks: list[int]) -> dict[int, str]:
    found = {}
    async with pool.acquire() as connection:
        for rank in ranks:
            wish = Wish(blueprint_id="blueprint-" + "0" * 64, interface=interface(), rank=rank)
            assert await builds.add(connection, wish)
            assert not await builds.add(connection, wish)
            found[rank] = wish.build_id
    return found


async def test_many_forges_share_the_queue_most_useful_first(pool: Pool) -> None:
    await queue(pool, [2, 0, 1])
    claims = await asyncio.gather(*(builds.claim(pool, f"forge-{n}", HERE) for n in range(5)))
    taken = [build for build in claims if build is not None]
    assert len(taken) == len({build.build_id for build in taken}) == 3
    (only,) = [rank for rank in (await queue(pool, [7, 3])) if rank == 3]
    following = await builds.claim(pool, "forge-x", HERE)
    assert following is not None
    rank = await pool.fetchval("SELECT rank FROM tezzeret.builds WHERE build_id = $1", following.build_id)
    assert rank == only


async def test_a_lapsed_lease_is_taken_over_and_the_late_forge_cannot_interfere(pool: Pool) -> None:
    (build_id,) = (await queue(pool, [0])).values()
    first = await builds.claim(pool, "slow", HERE, lease_seconds=0.2)
    assert first is not None
    assert await builds.claim(pool, "quick", HERE) is None
    assert await builds.renew(pool, build_id, "slow", lease_seconds=0.4)
    await asyncio.sleep(0.25)
    assert await builds.claim(pool, "quick", HERE) is None
    await asyncio.sleep(0.3)
    second = await builds.claim(pool, "quick", HERE)
    assert second is not None
    assert (second.build_id, second.attempts) == (build_id, 2)
    assert not await builds.renew(pool, build_id, "slow")
    assert not await builds.fail(pool, build_id, "slow", reason="late", seconds=1.0)
    async with pool.acquire() as connection:
        done = {"kernel_id": "kernel-" + "0" * 64, "name": "x", "seconds": 1.0}
        assert not await builds.finish(connection, build_id, "slow", **done)
        assert await builds.finish(connection, build_id, "quick", **done)
    assert (await builds.get(pool, build_id)).state is BuildState.DONE


async def test_a_forge_takes_only_what_is_for_its_kind_of_machine_and_its_toolchain(pool: Pool) -> None:
    open_wish = Wish(blueprint_id="blueprint-" + "0" * 64, interface=interface())
    wishes = [open_wish.on(toolchain) for toolchain in (HERE, NEWER, ELSEWHERE)]
    assert len({open_wish.build_id, *(wish.build_id for wish in wishes)}) == 4
    assert wishes[0].on(ELSEWHERE) == wishes[0]
    async with pool.acquire() as connection:
        for wish in wishes:
            assert await builds.add(connection, wish)
            assert not await builds.add(connection, wish)
    for toolchain, wish in zip((ELSEWHERE, HERE, NEWER), (wishes[2], wishes[0], wishes[1]), strict=True):
        found = await builds.claim(pool, "a", toolchain)
        assert found is not None
        assert (found.build_id, found.target, found.toolchain) == (wish.build_id, toolchain.target, toolchain.name)
        assert await builds.claim(pool, "a", toolchain) is None
    async with pool.acquire() as connection:
        await builds.add(connection, open_wish)
    anybody = await builds.claim(pool, "a", NEWER)
    assert anybody is not None
    assert anybody.build_id == open_wish.build_id


async def test_a_forge_is_known_while_it_gives_signs_of_life(pool: Pool) -> None:
    forge = Forge("forge-1", HERE)
    await forge.beat(pool)
    await forge.count(pool, done=True)
    await forge.count(pool, done=False)
    await forge.beat(pool)
    row = await pool.fetchrow("SELECT *, seen > started AS later FROM tezzeret.forges")
    assert row is not None
    assert (row["forge"], row["done"], row["failed"], row["later"]) == ("forge-1", 1, 1, True)
    await forge.leave(pool)
    assert await pool.fetchval("SELECT count(*) FROM tezzeret.forges") == 0


async def test_the_status_counts_what_waits_what_runs_and_what_nobody_can_build(pool: Pool) -> None:
    forge = Forge("forge-1", HERE)
    await forge.beat(pool)
    wishes = [Wish(blueprint_id="blueprint-" + "0" * 64, interface=interface()).on(kind) for kind in (HERE, HERE, HERE)]
    wishes.append(wishes[0].model_copy(update={"target": ELSEWHERE.target}))
    async with pool.acquire() as connection:
        for wish in wishes:
            await builds.add(connection, wish)
    first = await builds.claim(pool, "forge-1", HERE, 0.05)
    second = await builds.claim(pool, "forge-1", HERE)
    assert first is not None
    assert second is not None
    assert await builds.postpone(pool, second.build_id, "forge-1", reason="away", delay_seconds=60, counts=False)
    await asyncio.sleep(0.1)
    found = await forges.status(pool)
    assert (found.queued, found.postponed, found.stranded) == (3, 1, 1)
    (running,) = found.running
    assert (running.build_id, running.forge, running.lapsed) == (first.build_id, "forge-1", True)
    assert running.age_seconds >= 0.1
    native = NativeFigures(rows=64, step_ratio=0.8, repetitions=9, shipped=True)
    async with pool.acquire() as connection:
        done = {"kernel_id": "kernel-" + "0" * 64, "name": "x", "seconds": 2.0, "native": native}
        assert await builds.finish(connection, first.build_id, "forge-1", **done)
    (figures,) = (await forges.status(pool)).pipelines
    assert (figures.done, figures.median_seconds, figures.compiled, figures.shipped) == (1, 2.0, 1, 1)
    assert figures.median_native_ratio == 0.8
    silent = await forges.status(pool, alive_seconds=0.0)
    assert [forge.alive for forge in silent.forges] == [False]
    assert silent.stranded == 3  # the done one is nobody's any more


async def test_a_postponed_build_waits_and_a_released_one_does_not(pool: Pool) -> None:
    (build_id,) = (await queue(pool, [0])).values()
    assert await builds.claim(pool, "a", HERE)
    assert await builds.postpone(pool, build_id, "a", reason="away", delay_seconds=0.3, counts=False)
    assert (await builds.get(pool, build_id)).attempts == 0
    assert await builds.claim(pool, "a", HERE) is None
    await asyncio.sleep(0.35)
    assert await builds.claim(pool, "a", HERE)
    await builds.release(pool, "a")
    again = await builds.claim(pool, "b", HERE)
    assert again is not None
    assert again.attempts == 1


async def test_a_failed_build_is_queued_again_by_asking_but_not_by_an_old_event(pool: Pool) -> None:
    wish = Wish(blueprint_id="blueprint-" + "0" * 64, interface=interface())
    async with pool.acquire() as connection:
        assert await builds.expect(connection, wish)
        assert await builds.claim(pool, "a", HERE)
        assert await builds.fail(pool, wish.build_id, "a", reason="no good", seconds=0.1)
        assert not await builds.expect(connection, wish)
        assert (await builds.get(pool, wish.build_id)).state is BuildState.FAILED
        assert await builds.add(connection, wish)
    build = await builds.get(pool, wish.build_id)
    assert (build.state, build.attempts, build.reason) == (BuildState.QUEUED, 0, "")


async def test_evaluations_are_leased_alike(pool: Pool) -> None:
    kernel_id = "kernel-" + "1" * 64
    assert await evaluations.add(pool, kernel_id)
    assert not await evaluations.add(pool, kernel_id)
    claims = await asyncio.gather(*(evaluations.claim(pool, f"judge-{n}", lease_seconds=0.2) for n in range(4)))
    assert sum(claim is not None for claim in claims) == 1
    await asyncio.sleep(0.25)
    assert await evaluations.claim(pool, "heir")
    assert await evaluations.enter(pool, kernel_id, "heir", Phase.SAFETY)
    verdict = {"verdict": KernelStatus.REJECTED, "reason": "unfit", "measurement": None, "tags": ["x"]}
    async with pool.acquire() as connection:
        assert not await evaluations.finish(connection, kernel_id, "judge-0", **verdict)
        assert await evaluations.finish(connection, kernel_id, "heir", **verdict)
    found = await evaluations.get(pool, kernel_id)
    assert (found.phase, found.verdict, found.tags) == (Phase.DONE, KernelStatus.REJECTED, ("x",))
    assert not await evaluations.add(pool, kernel_id)
    assert await evaluations.add(pool, kernel_id, again=True)
