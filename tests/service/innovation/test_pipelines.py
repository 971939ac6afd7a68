"""Three pipelines through the real forge: what each adds to a kernel's papers, and the native part in the library."""

from __future__ import annotations

import os

import pytest

from esper_core.errors import Corrupt, Forbidden, NotFound, Untrusted
from esper_core.kernel.manifest import NativeFigures
from esper_core.kernel.native import NativeRecord, convention, native_statement, verify_native
from esper_core.kernel.record import KernelRecord
from esper_core.kernel.sign import Attestation, sign
from esper_core.kernel.trust import TrustList
from esper_core.nn.native import PARITY_LIMIT, Native
from esper_core.pb.esper.core.v1 import kernel_pb2
from esper_core.pb.esper.tezzeret.v1 import tezzeret_pb2
from esper_core.pb.esper.urza.v1 import native_pb2
from esper_core.rpc.convert import from_proto, to_proto
from services.tezzeret.toolchain import here
from tests.service.innovation.papers import Innovation, interface, until
from tests.service.innovation.test_forging import DONE, FAILED, submission


async def built(innovation: Innovation, request: tezzeret_pb2.SubmitBuildRequest) -> tezzeret_pb2.Build:
    submitted = await innovation.tezzeret().SubmitBuild(request)

    async def settled() -> tezzeret_pb2.Build | None:
        asked = tezzeret_pb2.GetBuildRequest(build_id=submitted.build.build_id)
        build = (await innovation.tezzeret().GetBuild(asked)).build
        return build if build.state in (DONE, FAILED) else None

    build: tezzeret_pb2.Build = await until(settled, 800)
    assert build.state == DONE, build.reason
    return build


async def test_pipelines_add_to_the_papers_and_never_to_the_artifact(innovation: Innovation) -> None:
    slot = interface(in_width=18)
    records: dict[str, KernelRecord] = {}
    for pipeline in ("fast", "standard"):
        build = await built(innovation, submission(slot, pipeline=pipeline))
        records[pipeline] = await innovation.record(build.kernel_id)
        assert (build.target, build.toolchain) == (here().target, here().name)
    fast, standard = (records[name].manifest for name in ("fast", "standard"))
    assert fast.provenance.graph_sha256 == ""
    assert (len(standard.provenance.graph_sha256), standard.provenance.graph_ops) == (64, 3)  # linear, relu, linear
    assert standard.provenance.joint_ops > standard.provenance.graph_ops
    assert standard.provenance.graph_max_abs_diff == 0
    assert fast.blob_bytes == standard.blob_bytes
    assert fast.kernel_id != standard.kernel_id  # other builds, other initial weights
    assert {record.manifest.provenance.native for record in records.values()} == {None}


async def test_what_cannot_be_compiled_is_built_all_the_same_and_says_so(innovation: Innovation) -> None:
    slot = interface(in_width=19, norm={}, source_bias_free=True)
    build = await built(innovation, submission(slot, pipeline="aggressive"))
    record = await innovation.record(build.kernel_id)
    figures = record.manifest.provenance.native
    assert figures is not None
    assert (figures.shipped, figures.repetitions, figures.rows) == (False, 0, 64)
    assert build.note == figures.reason
    assert "statistics" in build.note
    assert not build.HasField("native_ratio")
    assert record.manifest.provenance.graph_ops > 0
    wanted = native_pb2.StreamNativeRequest(kernel_id=build.kernel_id, target=here().target, toolchain=convention())
    with pytest.raises(NotFound):
        await fetched(innovation, wanted)


@pytest.mark.skipif("ESPER_LONG" not in os.environ, reason="compiles C++ at the lowest priority: minutes when busy")
@pytest.mark.timeout(900)
async def test_an_aggressive_build_is_compiled_timed_and_shipped_only_where_it_is_faster(
    innovation: Innovation,
) -> None:
    build = await built(innovation, submission(interface(in_width=19), pipeline="aggressive"))
    record = await innovation.record(build.kernel_id)
    figures = record.manifest.provenance.native
    assert isinstance(figures, NativeFigures)
    assert figures.repetitions > 0, figures.reason
    assert 0 < figures.load_seconds < figures.build_seconds
    assert 0 < figures.parity <= PARITY_LIMIT
    assert min(figures.forward_ratio, figures.step_ratio, figures.first_call_seconds) > 0
    assert build.native_ratio == pytest.approx(figures.step_ratio)
    assert (build.native_shipped, build.note) == (figures.shipped, figures.reason)
    wanted = native_pb2.StreamNativeRequest(kernel_id=build.kernel_id, target=here().target, toolchain=convention())
    if not figures.shipped:
        assert figures.reason
        with pytest.raises(NotFound):
            await fetched(innovation, wanted)
        return
    papers, attestation, blob = await fetched(innovation, wanted)
    verify_native(papers, attestation, TrustList.load(innovation.endpoints.keys_dir / "trust.json"))
    papers.check(blob)
    assert Native(blob).layout.entering.shape[0] == papers.rows == 64


async def test_only_the_forge_brings_native_parts_and_only_with_its_signature(innovation: Innovation) -> None:
    kernel = innovation.make(interface(in_width=21))
    await innovation.upload(kernel)
    blob = b"machine code"
    from esper_core.ids import sha256

    papers = NativeRecord(
        kernel_id=kernel.manifest.kernel_id,
        target="another/machine",
        toolchain=convention(),
        blob_sha256=sha256(blob),
        blob_bytes=len(blob),
        rows=64,
        step_ratio=0.5,
    )
    statement = sign(native_statement(papers), innovation.key("tezzeret"))
    with pytest.raises(Forbidden):
        await bring(innovation, papers, statement, blob, "karn")
    with pytest.raises(Untrusted):
        await bring(innovation, papers, sign(native_statement(papers), innovation.key("urabrask")), blob)
    with pytest.raises(Untrusted):
        await bring(innovation, papers.model_copy(update={"target": "this/machine"}), statement, blob)
    with pytest.raises(Corrupt):
        await bring(innovation, papers, statement, b"machine_code")
    with pytest.raises(Corrupt):
        await bring(innovation, papers, statement, blob + b"x")
    wanted = native_pb2.StreamNativeRequest(
        kernel_id=papers.kernel_id, target=papers.target, toolchain=papers.toolchain
    )
    with pytest.raises(NotFound):
        await fetched(innovation, wanted)
    assert await bring(innovation, papers, statement, blob)
    assert not await bring(innovation, papers, statement, blob)
    assert await fetched(innovation, wanted) == (papers, statement, blob)
    other = papers.model_copy(update={"kernel_id": "kernel-" + "0" * 64})
    with pytest.raises(NotFound):
        await bring(innovation, other, sign(native_statement(other), innovation.key("tezzeret")), blob)


async def test_the_status_tells_of_forges_queue_and_pipelines(innovation: Innovation) -> None:
    await built(innovation, submission(interface(in_width=22), pipeline="fast"))
    status = await innovation.tezzeret("nissa").GetForgeStatus(tezzeret_pb2.GetForgeStatusRequest())
    (forge,) = [forge for forge in status.forges if forge.alive]
    assert (forge.target, forge.toolchain) == (here().target, here().name)
    assert forge.done >= 1
    assert 0 <= forge.silent_seconds < forge.up_seconds
    figures = {found.pipeline: found for found in status.pipelines}
    assert figures["fast"].done >= 1
    assert figures["fast"].median_seconds > 0
    assert figures["fast"].compiled == 0
    assert status.done == sum(found.done for found in status.pipelines)
    assert status.failed == sum(found.failed for found in status.pipelines)
    assert status.stranded == 0


async def fetched(
    innovation: Innovation, request: native_pb2.StreamNativeRequest
) -> tuple[NativeRecord, Attestation, bytes]:
    papers, attestation, blob = None, None, b""
    async for answer in innovation.urza("tolaria").StreamNative(request):
        if answer.HasField("header"):
            papers = from_proto(answer.header.record, NativeRecord)
            attestation = from_proto(answer.header.attestation, Attestation)
        else:
            blob += answer.chunk
    assert papers is not None
    assert attestation is not None
    return papers, attestation, blob


async def bring(
    innovation: Innovation, papers: NativeRecord, statement: Attestation, blob: bytes, principal: str = "tezzeret"
) -> bool:
    """Whether it was new."""
    header = native_pb2.NativeHeader(
        record=to_proto(papers, kernel_pb2.NativeRecord), attestation=to_proto(statement, kernel_pb2.Attestation)
    )

    async def parts():
        yield native_pb2.UploadNativeRequest(header=header)
        yield native_pb2.UploadNativeRequest(chunk=blob)

    answer = await innovation.urza(principal).UploadNative(parts())
    return bool(answer.created)
