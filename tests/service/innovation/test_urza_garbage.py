"""What is forgotten is gone for good, and no live blob is ever deleted: not by a collection that dies, nor beside uploads."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import pytest

from esper_core.errors import Conflict, Forbidden, NotFound, Unavailable
from esper_core.ids import sha256
from esper_core.kernel.manifest import KernelManifest
from esper_core.kernel.native import NativeRecord, native_statement
from esper_core.kernel.record import KernelStatus
from esper_core.kernel.sign import sign, statement
from esper_core.pb.esper.urza.v1 import urza_pb2
from esper_core.store.blobs import Blobs
from services.urza.blueprints import Blueprints
from services.urza.native import Natives
from services.urza.retention import Retention
from services.urza.upkeep import Upkeep
from services.urza.usage import Field
from tests.service.innovation.papers import Innovation, interface
from tests.service.innovation.store import KEY, Shelf
from tests.service.innovation.test_urza_kernels import verdict

STEPS = ("forgotten", "doomed", "deleted", "noted", "swept")


async def test_the_unfit_and_the_unused_are_forgotten_and_the_rest_stays(shelf: Shelf) -> None:
    good, bad, withdrawn, _, twin, used, fresh = [
        await shelf.put(seed, b"shared" if seed in (1, 4) else b"weights %d" % seed) for seed in range(7)
    ]
    await shelf.set(bad, KernelStatus.REJECTED, "it gives NaN")
    await shelf.set(withdrawn, KernelStatus.RETIRED, "superseded")
    for kernel in (good, twin, used):
        await Field(shelf.pool).fetched(kernel.kernel_id)

    await shelf.native(good, b"native, needed")
    await shelf.native(withdrawn, b"native")
    foreseen = await Retention(shelf.pool, shelf.blobs).foresee(1)
    assert (foreseen.doomed, foreseen.rejected, foreseen.retired, foreseen.unused) == (3, 1, 1, 1)
    assert (foreseen.blobs, foreseen.bytes, foreseen.kept) == (3, 2 * len(b"weights 2") + len(b"native"), 4)
    assert len(await shelf.ids()) == 7
    assert await shelf.collect(1) == foreseen
    assert await shelf.ids() == {kernel.kernel_id for kernel in (good, twin, used, fresh)}
    assert await shelf.keys() == await shelf.needed()
    assert {sha256(b"shared"), sha256(b"native, needed")} <= await shelf.keys()
    for kernel in (good, twin, used, fresh):
        assert sha256(await shelf.read(kernel)) == kernel.blob_sha256
    with pytest.raises(NotFound, match="was REJECTED and has been forgotten: it gives NaN"):
        await shelf.library.get(bad.kernel_id)
    assert (await Blueprints(shelf.pool).get(bad.blueprint_id)).blueprint == bad.blueprint
    assert (await shelf.collect(1)).forgotten == 0


async def test_a_native_part_lives_and_goes_with_its_kernel(shelf: Shelf) -> None:
    code = b"native code"
    natives = Natives(shelf.pool, shelf.blobs, shelf.endpoints.keys_dir / "trust.json")
    kernel = await shelf.put(0, b"weights")
    about = {"kernel_id": kernel.kernel_id, "target": "cpu", "toolchain": "torch/1", "rows": 64, "step_ratio": 0.5}
    record = NativeRecord(blob_sha256=sha256(code), blob_bytes=len(code), **about)
    assert await natives.put(record, sign(native_statement(record), KEY), code, "tezzeret")
    await Field(shelf.pool).fetched(kernel.kernel_id)
    await shelf.collect()
    assert (await natives.get(kernel.kernel_id, "cpu", "torch/1"))[2] == code
    await shelf.set(kernel, KernelStatus.REJECTED)
    foreseen = await Retention(shelf.pool, shelf.blobs).foresee(0)
    assert (foreseen.blobs, foreseen.bytes) == (2, len(code) + len(b"weights"))
    await shelf.collect()
    assert await shelf.keys() == set()
    with pytest.raises(NotFound):
        await natives.get(kernel.kernel_id, "cpu", "torch/1")


async def test_who_was_judged_stays_away_and_who_was_idle_may_come_back(shelf: Shelf) -> None:
    bad, idle = await shelf.put(0, b"bad"), await shelf.put(1, b"idle")
    await shelf.set(bad, KernelStatus.REJECTED)
    await shelf.collect()
    with pytest.raises(Conflict, match="forgotten for good"):
        await shelf.put(0, b"bad")
    forge = (shelf.endpoints.keys_dir / "tezzeret.key").read_bytes()
    with pytest.raises(Conflict, match="was REJECTED and has been forgotten"):
        await shelf.library.check(bad, sign(statement(bad, "build", {}), forge))
    assert await shelf.put(1, b"idle") == idle
    assert await shelf.read(idle) == b"idle"
    assert await shelf.needed() == {f"{sha256(b'idle')}.1"} <= await shelf.keys()
    await shelf.collect()
    await shelf.collect()
    assert await shelf.keys() == await shelf.needed() == set()
    assert await shelf.put(1, b"idle") == idle
    assert await shelf.keys() == {f"{sha256(b'idle')}.2"}


async def test_the_database_itself_protects_what_is_alive(shelf: Shelf) -> None:
    import asyncpg

    kernel = await shelf.put(0, b"alive")
    with pytest.raises(asyncpg.RestrictViolationError, match="is alive"):
        await shelf.pool.execute("UPDATE urza.copies SET state = 2")
    await shelf.collect()
    with pytest.raises(asyncpg.RestrictViolationError, match="cannot come back"):
        await shelf.pool.execute("UPDATE urza.copies SET state = 1 WHERE blob_sha256 = $1", kernel.blob_sha256)


@pytest.mark.parametrize(("step", "nth"), [*((step, 1) for step in STEPS), ("doomed", 2), ("deleted", 2)])
async def test_a_collection_may_be_killed_at_any_step(shelf: Shelf, step: str, nth: int) -> None:
    idle = [await shelf.put(seed, b"idle %d" % seed) for seed in range(3)]
    await shelf.collect()  # so that something is to be swept
    assert await shelf.ids() == set()
    used = [await shelf.put(seed, b"used %d" % (seed % 2)) for seed in range(3, 6)]
    for kernel in used:
        await Field(shelf.pool).fetched(kernel.kernel_id)
    again = [await shelf.put(seed, b"idle %d" % seed) for seed in (0, 1)] + [await shelf.put(7, b"used 0")]
    await shelf.killed(step, nth)

    for kernel in used:
        assert sha256(await shelf.read(kernel)) == kernel.blob_sha256
    back = await shelf.put(1, b"idle 1")  # an upload of what was being deleted
    assert await shelf.read(back) == b"idle 1"
    await Field(shelf.pool).fetched(back.kernel_id)
    for _ in range(2):
        await shelf.collect()
    assert await shelf.ids() == {kernel.kernel_id for kernel in (*used, back)}
    assert await shelf.keys() == await shelf.needed()
    assert {kernel.kernel_id for kernel in (*idle, *again)} - await shelf.ids()


class Dying(Exception):
    """The process is gone."""


async def test_a_deletion_that_arrives_late_deletes_nothing_that_is_wanted(shelf: Shelf) -> None:
    """The collection died, its last request is still on its way, and the same bytes are stored meanwhile."""
    first = await shelf.put(0, b"wanted again")
    on_the_way: list[tuple[str, int]] = []

    class Slow(Blobs):
        def __init__(self) -> None:
            pass

        async def delete(self, digest: str, copy: int = 0) -> None:
            on_the_way.append((digest, copy))
            raise Dying

    with pytest.raises(Dying):
        async for _ in Retention(shelf.pool, Slow()).collect(0):
            pass
    second = await shelf.put(0, b"wanted again")
    assert second == first
    assert on_the_way == [(first.blob_sha256, 0)]
    for digest, copy in on_the_way:
        await shelf.blobs.delete(digest, copy)
    assert await shelf.read(second) == b"wanted again"


async def test_an_upload_that_is_overtaken_by_a_collection_starts_over(shelf: Shelf) -> None:
    """The bytes are there, the row is not yet: to the collection they look like nobody's."""
    rounds = []

    class Overtaken(Blobs):
        def __init__(self) -> None:
            pass

        async def put(self, data: bytes, copy: int = 0) -> str:
            digest = await shelf.blobs.put(data, copy)
            rounds.append(copy)
            if len(rounds) < 3:
                await shelf.collect()
            return digest

        async def delete(self, digest: str, copy: int = 0) -> None:
            await shelf.blobs.delete(digest, copy)

    slow = Shelf.on(shelf.pool, Overtaken(), shelf.endpoints, shelf.dsn)
    kernel = await slow.put(0, b"overtaken")
    assert rounds == [0, 1, 2]
    assert await shelf.read(kernel) == b"overtaken"
    assert await shelf.keys() == {f"{kernel.blob_sha256}.2"}


@pytest.mark.parametrize("seed", range(2))
async def test_uploads_collections_and_deaths_all_at_once(shelf: Shelf, seed: int) -> None:
    """Five weights, many kernels, collectors and upkeeps that die at random, every request late by a random while."""
    chance = random.Random(seed)
    late: list[asyncio.Task[None]] = []

    class Unsteady(Blobs):
        def __init__(self) -> None:
            pass

        async def put(self, data: bytes, copy: int = 0) -> str:
            await asyncio.sleep(chance.uniform(0, 0.01))
            digest = await shelf.blobs.put(data, copy)
            await asyncio.sleep(chance.uniform(0, 0.03))
            return digest

        async def delete(self, digest: str, copy: int = 0) -> None:
            async def arrive() -> None:
                await asyncio.sleep(chance.uniform(0, 0.05))
                await shelf.blobs.delete(digest, copy)

            late.append(asyncio.create_task(arrive()))
            if chance.random() < 0.5:
                raise Dying
            await late[-1]

    async def step(_: str) -> None:
        await asyncio.sleep(chance.uniform(0, 0.01))
        if chance.random() < 0.15:
            raise Dying

    unsteady = Shelf.on(shelf.pool, Unsteady(), shelf.endpoints, shelf.dsn)
    busy = True

    async def collect() -> None:
        while busy:
            with contextlib.suppress(Dying):
                async for _ in Retention(shelf.pool, unsteady.blobs, step).collect(0):
                    pass
            await asyncio.sleep(chance.uniform(0, 0.02))

    async def keep_up(lease_seconds: float) -> None:
        retention = Retention(shelf.pool, unsteady.blobs, step)
        while busy:
            with contextlib.suppress(Dying):  # whose lease is then the next one's once it has lapsed
                await Upkeep(shelf.pool, retention, 0.01, 0, lease_seconds).once()
            await asyncio.sleep(chance.uniform(0, 0.02))

    async def upload(worker: int) -> None:
        for number in range(12):
            with contextlib.suppress(Dying, Unavailable):  # the latter: doomed five times in a row
                kernel = await unsteady.put(10 * worker + number % 3, b"weights %d" % (number % 5))
                if chance.random() < 0.3:
                    await Field(shelf.pool).fetched(kernel.kernel_id)

    collectors = [asyncio.create_task(work) for work in (collect(), collect(), keep_up(0.02), keep_up(0.1))]
    await asyncio.gather(*(upload(worker) for worker in range(4)))
    busy = False
    await asyncio.gather(*collectors)
    await asyncio.gather(*late)
    calm = Upkeep(shelf.pool, Retention(shelf.pool, shelf.blobs), 0.01, 0, 1.0)
    async with asyncio.timeout(20):
        while await calm.once() is None:  # noqa: ASYNC110 - whoever died last still holds the lease for a moment
            await asyncio.sleep(0.02)
    rows = await shelf.pool.fetch("SELECT manifest FROM urza.kernels")
    for row in rows:
        manifest = KernelManifest.model_validate_json(row["manifest"])
        assert sha256(await shelf.read(manifest)) == manifest.blob_sha256
    assert rows
    for _ in range(2):
        await shelf.collect()
    assert await shelf.keys() == await shelf.needed()


async def test_collecting_over_the_wire(innovation: Innovation) -> None:
    kernel = innovation.make(interface())
    await innovation.upload(kernel)
    await innovation.urza("urabrask").UpdateKernelStatus(verdict(innovation, kernel, KernelStatus.REJECTED))
    for principal in ("tezzeret", "urabrask", "tolaria"):
        with pytest.raises(Forbidden):
            await _told(innovation, principal, dry_run=True)
    foreseen = (await _told(innovation, "operator", dry_run=True))[-1]
    assert foreseen.rejected >= 1
    assert (await innovation.record(kernel.manifest.kernel_id)).status is KernelStatus.REJECTED
    *steps, done = await _told(innovation, "operator")
    assert done.done
    assert (done.rejected, done.forgotten, done.kept) == (foreseen.rejected, foreseen.forgotten, foreseen.kept)
    assert all(not one.done and one.doomed == done.doomed for one in steps)
    with pytest.raises(NotFound, match="has been forgotten"):
        await innovation.record(kernel.manifest.kernel_id)
    with pytest.raises(Conflict, match="forgotten"):
        await innovation.upload(kernel)


async def _told(innovation: Innovation, principal: str, **wanted: Any) -> list[urza_pb2.CollectGarbageResponse]:
    request = urza_pb2.CollectGarbageRequest(**wanted)
    return [answer async for answer in innovation.urza(principal).CollectGarbage(request)]
