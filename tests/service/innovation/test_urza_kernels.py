"""The library keeps what is true, streams what it keeps, and lets only Urabrask judge."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from esper_core.errors import (
    Conflict,
    Corrupt,
    EsperError,
    Forbidden,
    InvalidInput,
    NotFound,
    Untrusted,
)
from esper_core.ids import sha256
from esper_core.kernel.manifest import KernelManifest
from esper_core.kernel.record import KernelStatus, Measurement
from esper_core.kernel.sign import sign, statement
from esper_core.kernel.trust import TrustList, verify_kernel
from esper_core.pb.esper.core.v1 import kernel_pb2
from esper_core.pb.esper.urza.v1 import urza_pb2
from esper_core.rpc.convert import to_proto
from tests.service.innovation.papers import Innovation, Kernel, interface, parts

MEASUREMENT = Measurement(
    batch=64,
    forward_seconds=1e-4,
    forward_seconds_p99=2e-4,
    backward_seconds=3e-4,
    peak_memory_bytes=4096,
    precision_drift=1e-7,
    gradient_norm=1.0,
    deterministic=True,
    repetitions=30,
    target="test",
)


async def fetch(innovation: Innovation, kernel_id: str, offset: int = 0) -> tuple[kernel_pb2.KernelRecord, bytes]:
    """The record and the bytes from ``offset``; every chunk checked against its own digest."""
    request = urza_pb2.StreamKernelRequest(kernel_id=kernel_id, offset=offset)
    first, *rest = [part async for part in innovation.urza("tolaria").StreamKernel(request)]
    got = bytearray()
    for part in rest:
        assert part.chunk.offset == offset + len(got)
        assert len(part.chunk.data) <= 128 * 1024
        assert part.chunk.sha256 == sha256(part.chunk.data)
        got += part.chunk.data
    return first.record, bytes(got)


def verdict(innovation: Innovation, kernel: Kernel, status: KernelStatus, **changes: Any) -> Any:
    said = sign(statement(kernel.manifest, "validation", {"verdict": status.name}), innovation.key("urabrask"))
    fields = {
        "kernel_id": kernel.manifest.kernel_id,
        "status": int(status),
        "tags": ["layout:features"],
        "measurement": to_proto(MEASUREMENT, kernel_pb2.Measurement),
        "attestation": to_proto(said, kernel_pb2.Attestation),
    }
    return urza_pb2.UpdateKernelStatusRequest(**{**fields, **changes})


async def test_a_kernel_comes_back_as_it_went_in(innovation: Innovation) -> None:
    kernel = innovation.make(interface(in_width=700, out_width=90), symbols={"width": 128})
    assert len(kernel.blob) > 3 * 128 * 1024
    assert await innovation.upload(kernel) is True
    assert await innovation.upload(kernel) is False
    record = await innovation.record(kernel.manifest.kernel_id[:20])
    assert record.manifest == kernel.manifest
    assert record.attestations == (kernel.attestation,)
    assert (record.status, record.interface_id) == (KernelStatus.COMPILED, kernel.manifest.interface.id)
    told, blob = await fetch(innovation, kernel.manifest.kernel_id)
    assert blob == kernel.blob
    assert told == to_proto(record, kernel_pb2.KernelRecord)


@pytest.mark.parametrize("offset", [1, 128 * 1024, 200_001])
async def test_a_broken_stream_is_resumed(innovation: Innovation, offset: int) -> None:
    kernel = innovation.make(interface(in_width=500, out_width=90), symbols={"width": 128})
    await innovation.upload(kernel)
    assert (await fetch(innovation, kernel.manifest.kernel_id, offset))[1] == kernel.blob[offset:]
    assert (await fetch(innovation, kernel.manifest.kernel_id, len(kernel.blob)))[1] == b""
    with pytest.raises(InvalidInput, match="past the end"):
        await fetch(innovation, kernel.manifest.kernel_id, len(kernel.blob) + 1)


async def test_a_kernel_nobody_has(innovation: Innovation) -> None:
    with pytest.raises(NotFound):
        await fetch(innovation, "kernel-" + "0" * 64)
    with pytest.raises(NotFound):
        await innovation.record("kernel-00000")
    with pytest.raises(InvalidInput, match="no kernel id"):
        await innovation.record("kernel-0000")


async def test_uploading_at_the_same_time_is_uploading_once(innovation: Innovation) -> None:
    kernel = innovation.make(interface())
    created = await asyncio.gather(*(innovation.upload(kernel) for _ in range(8)))
    assert sorted(created) == [False] * 7 + [True]
    assert (await innovation.record(kernel.manifest.kernel_id)).attestations == (kernel.attestation,)


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def forgeries(innovation: Innovation) -> dict[str, tuple[Kernel, type[EsperError]]]:
    """One lie each; everything else about the kernel is right."""
    kernel = innovation.make(interface())
    manifest, blob, attestation = kernel.manifest, kernel.blob, kernel.attestation
    richer = manifest.model_copy(update={"parameters": manifest.parameters + 1})
    other = innovation.make(interface(in_width=17))
    private = manifest.blueprint.model_copy(update={"name": "nobody_uploaded_this"})
    unknown = KernelManifest.describe(private, manifest.interface, blob, manifest.provenance)
    return {
        "a flipped bit": (Kernel(manifest, flip(blob, -1 % len(blob)), attestation), Corrupt),
        "a missing byte": (Kernel(manifest, blob[:-1], attestation), Corrupt),
        "a byte too many": (Kernel(manifest, blob + b"\0", attestation), Corrupt),
        "another kernel's bytes": (Kernel(manifest, other.blob, attestation), Corrupt),
        "another kernel's statement": (Kernel(manifest, blob, other.attestation), Untrusted),
        "wrong figures, rightly signed": (innovation.signed(richer, blob), InvalidInput),
        "a manifest changed after signing": (
            Kernel(manifest.model_copy(update={"seed": 2}), blob, attestation),
            Untrusted,
        ),
        "an id that does not follow": (
            Kernel(manifest.model_copy(update={"kernel_id": other.manifest.kernel_id}), blob, attestation),
            Corrupt,
        ),
        "the wrong party's key": (innovation.signed(manifest, blob, "urabrask"), Untrusted),
        "a broken signature": (
            Kernel(manifest, blob, attestation.model_copy(update={"signature": flip(attestation.signature, 20)})),
            Untrusted,
        ),
        "a blueprint nobody uploaded": (innovation.signed(unknown, blob), NotFound),
    }


async def test_no_forgery_is_kept(innovation: Innovation) -> None:
    for name, (forged, refusal) in forgeries(innovation).items():
        try:
            await innovation.upload(forged)
        except refusal:
            pass
        else:
            pytest.fail(f"{name} was kept")
        with pytest.raises(NotFound):
            await innovation.record(forged.manifest.kernel_id)


async def test_a_malformed_stream_is_refused(innovation: Innovation) -> None:
    header, chunk = [part async for part in parts(innovation.make(interface()))]

    async def sent(*requests: urza_pb2.UploadKernelRequest) -> AsyncIterator[urza_pb2.UploadKernelRequest]:
        for request in requests:
            yield request

    for requests, refusal in (((), InvalidInput), ((chunk,), InvalidInput), ((header, header), InvalidInput)):
        with pytest.raises(refusal):
            await innovation.urza("tezzeret").UploadKernel(sent(*requests))
    with pytest.raises(Corrupt):
        await innovation.urza("tezzeret").UploadKernel(sent(header))
    with pytest.raises(Forbidden):
        await innovation.urza("operator").UploadKernel(sent(header, chunk))


async def test_damaged_storage_is_told_not_served(innovation: Innovation, s3: Any) -> None:
    # weights of this test's own: those of others may have been collected, and lie as a later copy
    kernel = innovation.make(interface().model_copy(update={"in_width": 37}))
    await innovation.upload(kernel)
    digest = kernel.manifest.blob_sha256
    place = {"Bucket": innovation.endpoints.s3_bucket, "Key": f"sha256/{digest[:2]}/{digest}"}
    async with s3 as client:
        await client.put_object(Body=flip(kernel.blob, 100), **place)
        with pytest.raises(Corrupt, match="damaged"):
            await fetch(innovation, kernel.manifest.kernel_id)
        await client.delete_object(**place)
    with pytest.raises(Corrupt, match="gone"):
        await fetch(innovation, kernel.manifest.kernel_id)
    assert await innovation.upload(kernel) is False
    assert (await fetch(innovation, kernel.manifest.kernel_id))[1] == kernel.blob


async def test_only_urabrask_judges_and_only_on_evidence(innovation: Innovation) -> None:
    kernel = innovation.make(interface())
    await innovation.upload(kernel)
    validated = KernelStatus.VALIDATED
    for principal in ("operator", "tezzeret", "tamiyo"):
        with pytest.raises(Forbidden):
            await innovation.urza(principal).UpdateKernelStatus(verdict(innovation, kernel, validated))
    with pytest.raises(Forbidden):
        await innovation.urza("operator").UpdateKernelStatus(verdict(innovation, kernel, KernelStatus.REJECTED))
    urza = innovation.urza("urabrask")
    rejection = sign(statement(kernel.manifest, "validation", {"verdict": "REJECTED"}), innovation.key("urabrask"))
    by_forge = sign(statement(kernel.manifest, "validation", {"verdict": "VALIDATED"}), innovation.key("tezzeret"))
    for lacking, refusal in (
        ({"measurement": None}, InvalidInput),
        ({"attestation": None}, InvalidInput),
        ({"attestation": to_proto(rejection, kernel_pb2.Attestation)}, InvalidInput),
        ({"attestation": to_proto(by_forge, kernel_pb2.Attestation)}, Untrusted),
        ({"attestation": to_proto(kernel.attestation, kernel_pb2.Attestation)}, Untrusted),
        ({"kernel_id": "kernel-" + "0" * 64}, NotFound),
    ):
        with pytest.raises(refusal):
            await urza.UpdateKernelStatus(verdict(innovation, kernel, validated, **lacking))
    assert (await innovation.record(kernel.manifest.kernel_id)).status is KernelStatus.COMPILED

    for _ in range(2):
        await urza.UpdateKernelStatus(verdict(innovation, kernel, validated))
    record = await innovation.record(kernel.manifest.kernel_id)
    assert (record.status, record.measurement, record.tags) == (validated, MEASUREMENT, ("layout:features",))
    trust = TrustList.load(innovation.endpoints.keys_dir / "trust.json")
    verify_kernel(record.manifest, record.attestations, trust)


async def test_a_status_moves_along_its_edges_only(innovation: Innovation) -> None:
    kernel = innovation.make(interface())
    await innovation.upload(kernel)
    urabrask, operator = innovation.urza("urabrask"), innovation.urza("operator")
    retire = urza_pb2.UpdateKernelStatusRequest(kernel_id=kernel.manifest.kernel_id, status=4, reason="superseded")
    with pytest.raises(Conflict, match="COMPILED cannot become RETIRED"):
        await operator.UpdateKernelStatus(retire)
    await urabrask.UpdateKernelStatus(verdict(innovation, kernel, KernelStatus.VALIDATED))
    with pytest.raises(Conflict):
        await urabrask.UpdateKernelStatus(verdict(innovation, kernel, KernelStatus.REJECTED))
    await operator.UpdateKernelStatus(retire)
    with pytest.raises(Conflict):
        await urabrask.UpdateKernelStatus(verdict(innovation, kernel, KernelStatus.VALIDATED))
    assert (await innovation.record(kernel.manifest.kernel_id)).reason == "superseded"


async def test_the_database_itself_holds_the_table(innovation: Innovation) -> None:
    kernel = innovation.make(interface())
    await innovation.upload(kernel)
    mine, legal = kernel.manifest.kernel_id, {(1, 2), (1, 3), (2, 4)}
    async with innovation.database.acquire() as connection:
        for before, after in itertools.product((1, 2, 3, 4), repeat=2):
            change = connection.transaction()
            await change.start()
            await connection.execute("ALTER TABLE urza.kernels DISABLE TRIGGER keep_kernel")
            update = "UPDATE urza.kernels SET status = $2, measurement = '{}' WHERE kernel_id = $1"
            await connection.execute(update, mine, before)
            await connection.execute("ALTER TABLE urza.kernels ENABLE TRIGGER keep_kernel")
            try:
                if before == after or (before, after) in legal:
                    await connection.execute(update, mine, after)
                else:
                    with pytest.raises(asyncpg.CheckViolationError):
                        await connection.execute(update, mine, after)
            finally:
                await change.rollback()
        for column in ("blob_sha256 = repeat('0', 64)", "manifest = '{}'", "interface_id = ''"):
            with pytest.raises(asyncpg.RestrictViolationError, match="immutable"):
                await connection.execute(f"UPDATE urza.kernels SET {column} WHERE kernel_id = $1", mine)  # noqa: S608


async def test_queries_choose_and_page(innovation: Innovation) -> None:
    slot = interface()
    kernels = [innovation.make(slot, symbols={"width": width}) for width in (3, 5, 7, 9, 11)]
    kernels.append(innovation.make(slot, "linear_bypass"))
    for kernel in kernels:
        await innovation.upload(kernel)
    for kernel, tags in zip(kernels[:3], (["a", "b"], ["a"], ["b"]), strict=True):
        await innovation.urza("urabrask").UpdateKernelStatus(
            verdict(innovation, kernel, KernelStatus.VALIDATED, tags=tags)
        )

    async def chosen(**wanted: Any) -> list[str]:
        found, token = [], ""
        while True:
            request = urza_pb2.QueryKernelsRequest(interface_id=slot.id, page_size=2, page_token=token, **wanted)
            answer = await innovation.urza("tamiyo").QueryKernels(request)
            found += [record.manifest.kernel_id for record in answer.kernels]
            if not (token := answer.next_page_token):
                return found
            assert len(answer.kernels) == 2

    def ids(*which: Kernel) -> list[str]:
        cheapest_first = sorted(which, key=lambda kernel: (kernel.manifest.parameters, kernel.manifest.kernel_id))
        return [kernel.manifest.kernel_id for kernel in cheapest_first]

    assert await chosen() == ids(*kernels)
    assert await chosen(status=2) == ids(*kernels[:3])
    assert await chosen(required_tags=["a"]) == ids(*kernels[:2])
    assert await chosen(required_tags=["a"], excluded_tags=["b"]) == ids(kernels[1])
    assert await chosen(max_parameters=kernels[1].manifest.parameters) == ids(*kernels[:2])
    assert await chosen(blueprint_id=kernels[5].manifest.blueprint_id) == ids(kernels[5])
    assert await chosen(max_forward_seconds=1e-4) == ids(*kernels[:3])
    assert await chosen(max_forward_seconds=9e-5) == []
    for token in ("x", "1:", ":kernel-", "9" * 30 + ":k"):
        with pytest.raises(InvalidInput, match="token"):
            await innovation.urza().QueryKernels(urza_pb2.QueryKernelsRequest(page_token=token))


async def test_a_page_never_outgrows_a_message(innovation: Innovation, monkeypatch: pytest.MonkeyPatch) -> None:
    slot = interface()
    kernels = [innovation.make(slot, symbols={"width": width}) for width in (3, 5, 7)]
    for kernel in kernels:
        await innovation.upload(kernel)
    weight = to_proto(await innovation.record(kernels[0].manifest.kernel_id), kernel_pb2.KernelRecord).ByteSize()
    for limit, pages in ((10, [1, 1, 1]), (int(2.5 * weight), [2, 1]), (1 << 20, [3])):
        monkeypatch.setattr("services.urza.servicer.PAGE_BYTES", limit)
        found, token = [], ""
        while True:
            request = urza_pb2.QueryKernelsRequest(interface_id=slot.id, page_token=token)
            answer = await innovation.urza().QueryKernels(request)
            found.append([record.manifest.kernel_id for record in answer.kernels])
            if not (token := answer.next_page_token):
                break
        assert [len(page) for page in found] == pages
        assert [one for page in found for one in page] == [kernel.manifest.kernel_id for kernel in kernels]
