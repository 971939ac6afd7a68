"""Two verdicts at the same time: exactly one counts, the other is told; and every kernel says who its blueprint is of."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from safetensors import torch as safetensors

from esper_core.blueprint.build import build
from esper_core.blueprint.catalogue import catalogue
from esper_core.errors import Conflict
from esper_core.kernel.manifest import KernelManifest, Provenance
from esper_core.kernel.record import KernelStatus
from esper_core.pb.esper.core.v1 import blueprint_pb2
from esper_core.pb.esper.urza.v1 import urza_pb2
from esper_core.rpc.convert import to_proto
from services.urza.records import KERNEL, kernel
from services.urza.verdicts import Verdict, move
from tests.service.innovation.papers import Innovation, interface
from tests.service.innovation.test_urza_kernels import MEASUREMENT, verdict

ROUNDS = 12


async def test_of_concurrent_verdicts_exactly_one_wins(innovation: Innovation) -> None:
    urabrask = innovation.urza("urabrask")
    for _ in range(ROUNDS):
        made = innovation.make(interface())
        await innovation.upload(made)
        calls = [
            urabrask.UpdateKernelStatus(verdict(innovation, made, status, reason=f"said {number}"))
            for number, status in enumerate([KernelStatus.VALIDATED, KernelStatus.REJECTED] * 3)
        ]
        ended = await asyncio.gather(*calls, return_exceptions=True)
        failures = [one for one in ended if isinstance(one, BaseException)]
        assert all(isinstance(one, Conflict) for one in failures), failures
        won = {one.kernel.status for one in ended if not isinstance(one, BaseException)}
        assert len(won) == 1
        record = await innovation.record(made.manifest.kernel_id)
        assert won == {int(record.status)}
        said = record.attestations[1].payload.decode()
        assert f'"verdict":"{record.status.name}"' in said  # the statement is the winner's too


async def test_a_verdict_on_what_is_no_longer_so_is_refused(innovation: Innovation) -> None:
    """Every pair of judges that read the same row, whichever writes first."""
    verdicts = [Verdict(KernelStatus.VALIDATED, measurement=MEASUREMENT), Verdict(KernelStatus.REJECTED)]
    for first in verdicts:
        for second in verdicts:
            made = innovation.make(interface())
            await innovation.upload(made)
            async with innovation.database.acquire() as one, innovation.database.acquire() as other:
                row = await one.fetchrow(f"{KERNEL} WHERE k.kernel_id = $1", made.manifest.kernel_id)
                assert row is not None
                change = one.transaction()
                await change.start()
                await move(one, kernel(row), first, row["revision"])
                late = asyncio.create_task(_moved(other, row, second))
                await _waits_for_a_lock(innovation, late)
                await change.commit()
                with pytest.raises(Conflict, match=rf"same time and is {first.status.name} now"):
                    await late
            assert (await innovation.record(made.manifest.kernel_id)).status is first.status


async def _moved(connection: Any, row: Any, said: Verdict) -> None:
    async with connection.transaction():
        await move(connection, kernel(row), said, row["revision"])


async def _waits_for_a_lock(innovation: Innovation, late: asyncio.Task[None]) -> None:
    waiting = (
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'UPDATE urza.kernels%'"
    )
    async with asyncio.timeout(10):
        while not await innovation.database.fetchval(waiting):
            assert not late.done()
            await asyncio.sleep(0.01)


async def test_a_kernel_says_who_brought_its_blueprint(innovation: Innovation) -> None:
    ir = catalogue()["low_rank"].model_copy(
        update={"name": "born-of-karn", "parent_ids": (catalogue()["low_rank"].id,)}
    )
    request = urza_pb2.UploadBlueprintRequest(blueprint=to_proto(ir, blueprint_pb2.BlueprintIR))
    await innovation.urza("karn").UploadBlueprint(request)
    slot = interface()
    blob = safetensors.save(build(ir, slot, None, seed=1).state_dict())
    made = innovation.signed(KernelManifest.describe(ir, slot, blob, Provenance(compiler="test"), seed=1), blob)
    plain = innovation.make(slot)
    for one in (made, plain):
        await innovation.upload(one)
    stub = innovation.urza("tamiyo")
    for one, origin in ((made, "karn"), (plain, "catalogue")):
        kernel_id = one.manifest.kernel_id
        assert (await innovation.record(kernel_id)).born_of == origin
        streamed = [part async for part in stub.StreamKernel(urza_pb2.StreamKernelRequest(kernel_id=kernel_id))]
        assert streamed[0].record.born_of == origin
        answer = await stub.QueryKernels(urza_pb2.QueryKernelsRequest(interface_id=slot.id, born_of=origin))
        assert [found.manifest.kernel_id for found in answer.kernels] == [kernel_id]
        assert answer.kernels[0].born_of == origin
