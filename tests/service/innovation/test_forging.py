"""From a run's registration to validated kernels, through the bus, with real children; and what can go wrong."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Iterable

import psutil
import pytest

from esper_core.blueprint.catalogue import catalogue
from esper_core.blueprint.interface import Layout, SlotInterface
from esper_core.bus import subjects
from esper_core.bus.envelope import wrap
from esper_core.errors import InvalidInput, NotFound, Refused, Unsupported
from esper_core.kernel.pack import load
from esper_core.kernel.record import KernelStatus
from esper_core.kernel.trust import TrustList, verify_kernel
from esper_core.pb.esper.bus.v1 import bus_pb2
from esper_core.pb.esper.core.v1 import blueprint_pb2, run_pb2
from esper_core.pb.esper.tezzeret.v1 import tezzeret_pb2
from esper_core.pb.esper.urza.v1 import urza_pb2
from esper_core.rpc.convert import to_proto
from tests.service.innovation.papers import Innovation, interface, run_id, until

pytestmark = pytest.mark.timeout(240)  # on a machine that is busy with other things

DONE, FAILED = tezzeret_pb2.BUILD_STATE_DONE, tezzeret_pb2.BUILD_STATE_FAILED


async def register(innovation: Innovation, interfaces: Iterable[SlotInterface], *, grows: bool = True) -> None:
    """Tell the platform of a run, as its training process does."""
    name = run_id()
    slots = [
        run_pb2.Slot(slot=f"a{n}:b{n}", interface=to_proto(found, blueprint_pb2.SlotInterface))
        for n, found in enumerate(interfaces)
    ]
    run = run_pb2.Run(run_id=name, state=1, host="mlp", dataset="digits", epochs=2, morphogenetic=grows, slots=slots)
    envelope = wrap(bus_pb2.RunRegistered(run=run), producer="tolaria", run_id=name, sequence=1)
    await innovation.bus.publish(subjects.RUN_EVENTS.of(name), envelope)


async def builds_of(innovation: Innovation, slot: SlotInterface) -> list[tezzeret_pb2.Build]:
    request = tezzeret_pb2.ListBuildsRequest(interface_id=slot.id)
    return list((await innovation.tezzeret().ListBuilds(request)).builds)


async def kernels_of(innovation: Innovation, slot: SlotInterface, status: KernelStatus) -> list[str]:
    request = urza_pb2.QueryKernelsRequest(interface_id=slot.id, status=int(status))
    answer = await innovation.urza("tamiyo").QueryKernels(request)
    return [record.manifest.kernel_id for record in answer.kernels]


def submission(slot: SlotInterface, name: str = "bottleneck_mlp", **fields: object) -> tezzeret_pb2.SubmitBuildRequest:
    return tezzeret_pb2.SubmitBuildRequest(
        blueprint_id=catalogue()[name].id, interface=to_proto(slot, blueprint_pb2.SlotInterface), **fields
    )


def forge() -> psutil.Process | None:
    """The child at work."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            if "services.tezzeret.forge" in child.cmdline():
                return child
    return None


async def test_a_registered_run_gets_validated_kernels(innovation: Innovation) -> None:
    slot = interface(in_width=64, out_width=10)
    started = time.monotonic()
    await register(innovation, [slot, slot])
    wanted = await until(lambda: builds_of(innovation, slot))
    assert sorted((build.blueprint_name, build.symbols.get("width", 0)) for build in wanted) == [
        ("bottleneck_mlp", 4),
        ("bottleneck_mlp", 8),
        ("bottleneck_mlp", 16),
        ("bottleneck_mlp", 32),
        ("linear_bypass", 0),
        ("low_rank", 8),
    ]

    async def all_validated() -> bool:
        return len(await kernels_of(innovation, slot, KernelStatus.VALIDATED)) == len(wanted)

    await until(all_validated)
    print(f"{len(wanted)} kernels validated {time.monotonic() - started:.2f} s after registration")

    trust = TrustList.load(innovation.endpoints.keys_dir / "trust.json")
    for build in await builds_of(innovation, slot):
        assert (build.state, build.attempts, build.reason) == (DONE, 1, "")
        record = await innovation.record(build.kernel_id)
        verify_kernel(record.manifest, record.attestations, trust)
        measured, made = record.measurement, record.manifest.provenance
        assert measured is not None
        assert 0 < measured.forward_seconds <= measured.forward_seconds_p99
        assert measured.forward_seconds < measured.backward_seconds
        assert (measured.batch, measured.deterministic) == (64, True)
        assert measured.repetitions >= 20
        assert 0 < measured.precision_drift < 1e-4
        assert made.parity_max_abs_diff == 0
        assert made.build_seconds > 0
        assert {"layout:features", "foldable"} <= set(record.tags)
        assert any(tag.startswith("latency:") for tag in record.tags)
        if width := build.symbols.get("width"):
            assert f"width:{width}" in record.tags

    await register(innovation, [slot])
    other = interface(in_width=64, out_width=10)
    await register(innovation, [other], grows=False)
    await asyncio.sleep(0.5)
    assert len(await builds_of(innovation, slot)) == len(wanted)
    assert await builds_of(innovation, other) == []


@pytest.mark.timeout(500)  # a dozen designs, each built and measured
@pytest.mark.parametrize(
    "slot",
    [
        interface(layout=Layout.TOKENS, in_width=16, out_width=16),
        interface(
            layout=Layout.IMAGE,
            in_width=4,
            out_width=6,
            in_size=(8, 8),
            out_size=(8, 8),
            source={"kernel_h": 3, "kernel_w": 3, "padding_h": 1, "padding_w": 1},
            sink={"kernel_h": 3, "kernel_w": 3, "padding_h": 1, "padding_w": 1},
        ),
    ],
    ids=["tokens", "image"],
)
async def test_every_catalogue_design_that_fits_is_validated(innovation: Innovation, slot: SlotInterface) -> None:
    await register(innovation, [slot])
    wanted = await until(lambda: builds_of(innovation, slot))

    async def settled() -> bool:
        counts = [len(await kernels_of(innovation, slot, status)) for status in (KernelStatus(2), KernelStatus(3))]
        return sum(counts) == len(wanted)

    await until(settled, 400)
    assert await kernels_of(innovation, slot, KernelStatus.REJECTED) == []


async def test_equal_wishes_are_one_build_and_give_equal_bytes(innovation: Innovation) -> None:
    slot = interface(in_width=33)
    stub = innovation.tezzeret("karn")
    spelled = (submission(slot), submission(slot, symbols={"width": 8}), submission(slot, pipeline="standard"))
    answers = await asyncio.gather(*(stub.SubmitBuild(request) for request in spelled))
    (build_id,) = {answer.build.build_id for answer in answers}

    async def done() -> tezzeret_pb2.Build | None:
        answer = await stub.GetBuild(tezzeret_pb2.GetBuildRequest(build_id=build_id))
        return answer.build if answer.build.state == DONE else None

    build = await until(done)
    assert (build.attempts, build.blueprint_name, dict(build.symbols)) == (1, "bottleneck_mlp", {"width": 8})
    record = await innovation.record(build.kernel_id)
    request = urza_pb2.StreamKernelRequest(kernel_id=build.kernel_id)
    blob = b"".join([part.chunk.data async for part in innovation.urza().StreamKernel(request)])
    again = load(blob, record.manifest)
    assert sum(parameter.numel() for parameter in again.parameters()) == record.manifest.parameters == 33 * 8 + 8 + 90


async def test_wishes_that_cannot_be_built_are_refused_at_the_counter(innovation: Innovation) -> None:
    stub = innovation.tezzeret()
    with pytest.raises(InvalidInput, match="does not serve"):
        await stub.SubmitBuild(submission(interface(), "squeeze_excite"))
    with pytest.raises(InvalidInput, match="no symbol"):
        await stub.SubmitBuild(submission(interface(), symbols={"widht": 8}))
    with pytest.raises(InvalidInput, match="exceeds"):
        await stub.SubmitBuild(submission(interface(in_width=1 << 20), symbols={"width": 1 << 20}))
    with pytest.raises(Unsupported) as caught:
        await stub.SubmitBuild(submission(interface(), pipeline="standart"))
    assert "standard" in caught.value.hint
    unknown = submission(interface())
    unknown.blueprint_id = "blueprint-" + "0" * 64
    with pytest.raises(NotFound):
        await stub.SubmitBuild(unknown)
    with pytest.raises(NotFound):
        await stub.GetBuild(tezzeret_pb2.GetBuildRequest(build_id="build-" + "0" * 64))


async def test_a_wish_from_the_bus_that_cannot_be_built_fails_with_a_reason(innovation: Innovation) -> None:
    from services.tezzeret.builds import Wish

    slot = interface()
    wish = Wish(blueprint_id="blueprint-" + "1" * 64, interface=slot, pipeline="magic")
    message = bus_pb2.BuildRequested(
        build_id=wish.build_id,
        blueprint_id=wish.blueprint_id,
        interface=to_proto(slot, blueprint_pb2.SlotInterface),
        pipeline=wish.pipeline,
    )
    await innovation.bus.publish(subjects.BLUEPRINT_SUBMITTED.of(), wrap(message, producer="karn"))

    async def failed() -> tezzeret_pb2.Build | None:
        return next((build for build in await builds_of(innovation, slot) if build.state == FAILED), None)

    assert "magic" in (await until(failed)).reason


async def test_a_refused_wish_carries_the_reasons_name(innovation: Innovation) -> None:
    with pytest.raises(Refused) as caught:
        await innovation.tezzeret().SubmitBuild(submission(interface(), "squeeze_excite"))
    assert caught.value.code == "WRONG_LAYOUT"

    from services.tezzeret.builds import Wish

    slot = interface(in_width=1 << 20)
    wish = Wish(blueprint_id=catalogue()["bottleneck_mlp"].id, interface=slot, symbols={"width": 1 << 10})
    message = bus_pb2.BuildRequested(
        build_id=wish.build_id,
        blueprint_id=wish.blueprint_id,
        interface=to_proto(slot, blueprint_pb2.SlotInterface),
        symbols=wish.symbols,
        pipeline=wish.pipeline,
    )
    await innovation.bus.publish(subjects.BLUEPRINT_SUBMITTED.of(), wrap(message, producer="karn"))

    async def failed() -> tezzeret_pb2.Build | None:
        return next((build for build in await builds_of(innovation, slot) if build.state == FAILED), None)

    build = await until(failed)
    assert build.refusal == tezzeret_pb2.REFUSAL_TOO_LARGE
    assert "exceeds" in build.reason
    assert build.target  # a wish for no certain machine is for the forge that heard of it


async def test_a_build_tells_what_it_will_take(innovation: Innovation) -> None:
    slot = interface(in_width=20, out_width=10)
    answer = await innovation.tezzeret().SubmitBuild(submission(slot, symbols={"width": 5}))
    build = answer.build
    assert build.parameters == 20 * 5 + 5 + 5 * 10 + 10
    assert build.flops == 2 * 20 * 5 + 5 + 2 * 5 * 10
    assert build.memory_bytes == 4 * (4 * build.parameters + 64 * (5 + 5 + 10))


async def test_a_killed_forge_still_completes_once(innovation: Innovation) -> None:
    await innovation.tezzeret().SubmitBuild(submission(interface()))
    child = await until(_forge_running)
    child.send_signal(signal.SIGSTOP)
    slot = interface(in_width=34)
    build_id = (await innovation.tezzeret().SubmitBuild(submission(slot))).build.build_id

    async def state(wanted: int) -> bool:
        answer = await innovation.tezzeret().GetBuild(tezzeret_pb2.GetBuildRequest(build_id=build_id))
        return answer.build.state == wanted

    async def replaced() -> bool:  # looked for at once: one with nothing to do ends itself after a minute
        at_work = forge()
        return at_work is not None and at_work.pid != child.pid

    await asyncio.sleep(0.2)
    child.send_signal(signal.SIGKILL)
    await until(replaced)
    await until(lambda: state(DONE))
    (build,) = await builds_of(innovation, slot)

    async def validated() -> list[str]:
        return await kernels_of(innovation, slot, KernelStatus.VALIDATED)

    assert await until(validated) == [build.kernel_id]
    announced = await innovation.database.fetchval(
        "SELECT count(*) FROM bus.outbox WHERE position($1::bytea IN data) > 0 AND subject = $2",
        build.kernel_id.encode(),
        subjects.KERNEL_READY.of(),
    )
    assert announced == 1


async def _forge_running() -> psutil.Process | None:
    return forge()
