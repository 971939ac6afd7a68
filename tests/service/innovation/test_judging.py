"""Urabrask accepts what is good, rejects what is not, and says why; always about the bytes in the library."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable

import pytest
from torch import Tensor

from esper_core.bus import subjects
from esper_core.bus.envelope import wrap
from esper_core.bus.inbox import watch
from esper_core.errors import Forbidden, NotFound
from esper_core.kernel.record import KernelRecord, KernelStatus
from esper_core.pb.esper.bus.v1 import bus_pb2
from esper_core.pb.esper.urabrask.v1 import urabrask_pb2
from esper_core.pb.esper.urza.v1 import urza_pb2
from tests.service.innovation.papers import Innovation, Kernel, interface, until

pytestmark = pytest.mark.timeout(240)  # on a machine that is busy with other things

DONE = urabrask_pb2.PHASE_DONE


async def announce(innovation: Innovation, kernel_id: str) -> None:
    ready = bus_pb2.KernelReady(kernel_id=kernel_id, interface_id="interface-of-a-test")
    await innovation.bus.publish(subjects.KERNEL_READY.of(), wrap(ready, producer="tezzeret"))


async def judged(innovation: Innovation, kernel: Kernel) -> KernelRecord:
    """The record once Urabrask has spoken."""
    kernel_id = kernel.manifest.kernel_id

    async def done() -> bool:
        with contextlib.suppress(NotFound):
            request = urabrask_pb2.GetEvaluationRequest(kernel_id=kernel_id)
            answer = await innovation.urabrask().GetEvaluation(request)
            return bool(answer.evaluation.phase == DONE)
        return False

    await until(done)
    return await innovation.record(kernel_id)


@pytest.fixture
async def verdicts(innovation: Innovation) -> AsyncIterator[dict[str, bus_pb2.KernelCharacterized]]:
    """What is said on the bus while the test runs, by kernel."""
    heard: dict[str, bus_pb2.KernelCharacterized] = {}

    async def listen() -> None:
        async for event in watch(innovation.bus, [subjects.KERNEL_CHARACTERIZED.all]):
            heard[event.message.kernel_id] = event.message

    task = asyncio.create_task(listen())
    yield heard
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def fill(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    def spoil(state: dict[str, Tensor]) -> None:
        state[name].fill_(value)

    return spoil


def one(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    def spoil(state: dict[str, Tensor]) -> None:
        state[name].view(-1)[0] = value

    return spoil


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (one("A.weight", float("nan")), "not finite"),
        (one("B.weight", float("inf")), "not finite"),
        (one("B.weight", 0.5), "as inserted it adds"),
        (one("B.bias", 1e-7), "as inserted it adds"),
        (fill("A.weight", 1e20), "explodes|not finite"),
        (fill("A.bias", -1e9), "vanishes before weight"),
    ],
    ids=["nan", "inf", "not silent", "hardly silent", "explodes", "dead"],
)
async def test_bad_weights_are_rejected(
    innovation: Innovation,
    verdicts: dict[str, bus_pb2.KernelCharacterized],
    spoil: Callable[[dict[str, Tensor]], None],
    said: str,
) -> None:
    kernel = innovation.make(interface(), spoil=spoil)
    await innovation.upload(kernel)
    await announce(innovation, kernel.manifest.kernel_id)
    record = await judged(innovation, kernel)
    assert record.status is KernelStatus.REJECTED
    assert record.measurement is None
    assert re.search(said, record.reason), record.reason

    async def told() -> bus_pb2.KernelCharacterized | None:
        return verdicts.get(kernel.manifest.kernel_id)

    assert (await until(told)).status == int(KernelStatus.REJECTED)


async def test_bytes_that_are_no_kernel_are_rejected(innovation: Innovation) -> None:
    honest = innovation.make(interface(in_width=21))
    other = innovation.make(interface(in_width=22))
    for blob in (b"\xff" * 8 + honest.blob[8:], other.blob, honest.blob[:-4]):
        manifest = type(honest.manifest).describe(
            honest.manifest.blueprint, honest.manifest.interface, blob, honest.manifest.provenance
        )
        kernel = innovation.signed(manifest, blob)
        await innovation.upload(kernel)
        await announce(innovation, kernel.manifest.kernel_id)
        record = await judged(innovation, kernel)
        assert record.status is KernelStatus.REJECTED
        assert "blob" in record.reason


async def test_a_good_kernel_is_validated_once_however_often_it_is_announced(innovation: Innovation) -> None:
    kernel = innovation.make(interface())
    await innovation.upload(kernel)
    for _ in range(3):
        await announce(innovation, kernel.manifest.kernel_id)
    record = await judged(innovation, kernel)
    assert record.status is KernelStatus.VALIDATED
    await asyncio.sleep(0.3)
    said = await innovation.database.fetchval(
        "SELECT count(*) FROM bus.outbox WHERE position($1::bytea IN data) > 0 AND subject = $2",
        kernel.manifest.kernel_id.encode(),
        subjects.KERNEL_CHARACTERIZED.of(),
    )
    assert said == 1


async def test_measuring_again_refreshes_the_figures_and_keeps_what_is_withdrawn(innovation: Innovation) -> None:
    kernel = innovation.make(interface())
    kernel_id = kernel.manifest.kernel_id
    await innovation.upload(kernel)
    request = urabrask_pb2.EvaluateRequest(kernel_id=kernel_id)
    with pytest.raises(Forbidden):
        await innovation.urabrask("tamiyo").Evaluate(request)
    assert (await innovation.urabrask().Evaluate(request)).evaluation.phase != DONE
    first = await judged(innovation, kernel)
    await innovation.urabrask().Evaluate(request)
    second = await judged(innovation, kernel)
    assert first.status is second.status is KernelStatus.VALIDATED
    assert first.measurement != second.measurement
    assert first.attestations[0] == second.attestations[0]
    assert first.attestations[1] != second.attestations[1]

    retire = urza_pb2.UpdateKernelStatusRequest(kernel_id=kernel_id, status=4, reason="superseded")
    await innovation.urza().UpdateKernelStatus(retire)
    await innovation.urabrask().Evaluate(request)
    third = await judged(innovation, kernel)
    assert (third.status, third.reason) == (KernelStatus.RETIRED, "superseded")


async def test_what_does_not_exist_is_not_judged(innovation: Innovation) -> None:
    nobody = "kernel-" + "7" * 64
    with pytest.raises(NotFound):
        await innovation.urabrask().Evaluate(urabrask_pb2.EvaluateRequest(kernel_id=nobody))
    await announce(innovation, nobody)
    kernel = innovation.make(interface())
    await innovation.upload(kernel)
    await announce(innovation, kernel.manifest.kernel_id)
    assert (await judged(innovation, kernel)).status is KernelStatus.VALIDATED
    with pytest.raises(NotFound):
        await innovation.urabrask().GetEvaluation(urabrask_pb2.GetEvaluationRequest(kernel_id=nobody))
