"""The library collects by itself: when it is due, one at a time, after a death too, and never what is needed."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, cast

import pytest

from esper_core.config import UpkeepSection
from esper_core.errors import Unavailable
from esper_core.ids import sha256
from esper_core.pb.esper.urza.v1 import urza_pb2
from esper_core.store.blobs import Blobs
from services.runtime import Platform
from services.urza import service, upkeep
from services.urza.retention import Progress, Retention
from services.urza.upkeep import Upkeep
from services.urza.usage import Field
from tests.service.innovation.collector import LEASE_SECONDS
from tests.service.innovation.papers import Innovation, until
from tests.service.innovation.store import Shelf

HOUR = 3600.0


def keeper(shelf: Shelf, every_seconds: float = HOUR, **changes: Any) -> Upkeep:
    return Upkeep(shelf.pool, Retention(shelf.pool, changes.pop("blobs", shelf.blobs)), every_seconds, 0, **changes)


async def age(shelf: Shelf, seconds: float = HOUR) -> None:
    """Let as much time go by as far as the row can tell."""
    await shelf.pool.execute(
        "UPDATE urza.upkeep SET created = created - make_interval(secs => $1), begun = begun - make_interval(secs => $1)",
        seconds,
    )


async def test_it_collects_when_it_is_due_and_not_before(shelf: Shelf) -> None:
    used, _ = await shelf.put(0, b"used"), await shelf.put(1, b"idle")
    await Field(shelf.pool).fetched(used.kernel_id)
    mine = keeper(shelf)
    assert await mine.once() is None
    assert (await mine.standing()).begun is None
    await age(shelf)
    done = await mine.once()
    assert done is not None
    assert (done.unused, done.kept) == (1, 1)
    told = await mine.standing()
    assert (told.passes, told.forgotten, told.blobs, told.bytes, told.kept) == (1, 1, 1, len(b"idle"), 1)
    assert (told.holder, told.reason) == ("", "")
    assert told.begun is not None
    assert told.due is not None
    assert (told.due - told.begun).total_seconds() == HOUR
    assert await shelf.read(used) == b"used"
    assert await keeper(shelf).once() is None, "another one sees that it has been done"
    await age(shelf)
    assert await keeper(shelf).once() is not None


async def test_of_two_at_once_one_collects(shelf: Shelf) -> None:
    await shelf.put(0, b"idle")
    inside, leave = asyncio.Event(), asyncio.Event()

    async def step(_: str) -> None:
        inside.set()
        await leave.wait()

    await age(shelf)
    lease = 0.3
    slow = Upkeep(shelf.pool, Retention(shelf.pool, shelf.blobs, step), HOUR, 0, lease)
    first = asyncio.create_task(slow.once())
    await inside.wait()
    await age(shelf)
    for _ in range(4):  # longer than the lease, which is renewed
        assert await keeper(shelf, lease_seconds=lease).once() is None
        await asyncio.sleep(lease / 2)
    assert (await slow.standing()).holder
    leave.set()
    assert isinstance(await first, Progress)
    assert (await slow.standing()).passes == 1


@pytest.mark.parametrize("step", ["forgotten", "doomed", "deleted", "noted"])
async def test_what_a_killed_one_left_is_taken_up_when_its_lease_has_lapsed(shelf: Shelf, step: str) -> None:
    used, _ = await shelf.put(0, b"used"), await shelf.put(1, b"idle")
    await Field(shelf.pool).fetched(used.kernel_id)
    await shelf.killed(step, 1, "upkeep")
    mine = keeper(shelf)
    held = await mine.standing()
    assert held.holder, "the dead one has not given its lease back"
    assert held.passes == 0
    assert await mine.once() is None
    await until(mine.once, 4 * LEASE_SECONDS)
    assert (await mine.standing()).passes == 1
    for _ in range(2):
        await age(shelf)
        assert await mine.once() is not None
    assert await shelf.ids() == {used.kernel_id}
    assert await shelf.keys() == await shelf.needed() == {sha256(b"used")}


async def test_a_store_that_is_away_is_told_and_tried_again_soon(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    class Away(Blobs):
        def __init__(self) -> None:
            pass

        async def delete(self, digest: str, copy: int = 0) -> None:
            raise Unavailable("the blob store is away")

    monkeypatch.setattr(upkeep, "RETRY_SECONDS", 0.2)
    await shelf.put(0, b"idle")
    await age(shelf)
    assert await keeper(shelf, blobs=Away()).once() is None
    told = await keeper(shelf).standing()
    assert (told.reason, told.holder, told.passes) == ("the blob store is away", "", 0)
    await until(keeper(shelf).once, 10)
    assert (await keeper(shelf).standing()).reason == ""
    assert await shelf.keys() == set()


async def test_one_that_is_stopped_gives_its_lease_back(shelf: Shelf) -> None:
    inside = asyncio.Event()

    async def step(_: str) -> None:
        inside.set()
        await asyncio.sleep(HOUR)

    await shelf.put(0, b"idle")
    await age(shelf)
    stopped = asyncio.create_task(Upkeep(shelf.pool, Retention(shelf.pool, shelf.blobs, step), HOUR, 0).once())
    await inside.wait()
    stopped.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopped
    assert (await keeper(shelf).standing()).reason == "broken off"
    assert await keeper(shelf).once() is not None


async def test_an_overdue_one_is_not_made_right_at_the_start(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    async def begins_within(seconds: float) -> bool:
        task = asyncio.create_task(keeper(shelf).run())
        await asyncio.sleep(seconds)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return (await keeper(shelf).standing()).begun is not None

    await age(shelf, 10 * HOUR)
    assert not await begins_within(0.5)
    monkeypatch.setattr(upkeep, "FIRST_SECONDS", 0.05)
    assert await begins_within(0.5)


async def test_it_can_be_turned_off(shelf: Shelf) -> None:
    async def built(hours: float) -> int:
        endpoints = shelf.endpoints.model_copy(update={"upkeep": UpkeepSection(collect_hours=hours)})
        unused = cast("Any", None)  # nothing is published, dialled or waited for while it is built
        platform = Platform(
            endpoints, shelf.pool, unused, shelf.blobs, unused, bell=unused, metrics=unused, draining=unused
        )
        return len((await service.build(platform)).tasks)

    assert await built(1.0) == await built(0.0) + 1
    assert (await keeper(shelf, 0.0).standing()).due is None


async def test_a_platform_tells_when_it_collects(innovation: Innovation) -> None:
    told = await innovation.urza().GetUpkeep(urza_pb2.GetUpkeepRequest())
    usual = UpkeepSection()
    assert (told.every_seconds, told.keep_unused) == (usual.collect_hours * HOUR, usual.keep_unused)
    assert told.due
    assert (told.begun, told.passes) == ("", 0)
