"""The library as people handle it: exported into one file, taken in elsewhere, its families shown, its kernels found."""

from __future__ import annotations

import asyncio
import json
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from pydantic import SecretStr

from esper_core.blueprint.catalogue import catalogue
from esper_core.bus import subjects
from esper_core.bus.envelope import wrap
from esper_core.config import ENDPOINTS_FILE, Endpoints
from esper_core.errors import Forbidden, InvalidInput, NotFound
from esper_core.ids import new_id, sha256
from esper_core.kernel.manifest import KernelManifest, Provenance
from esper_core.kernel.native import NativeRecord, native_statement
from esper_core.kernel.record import KernelStatus, Measurement
from esper_core.kernel.sign import Attestation, generate_key, public_pem, sign, statement
from esper_core.kernel.trust import TrustList, trust_entry
from esper_core.lifecycle import State
from esper_core.pb.esper.core.v1 import blueprint_pb2, decision_pb2, kernel_pb2
from esper_core.pb.esper.urza.v1 import native_pb2, urza_pb2
from esper_core.rpc.convert import to_proto
from esper_core.rpc.policy import PRINCIPALS
from tests.service.cli.conftest import run_esperctl
from tests.service.platform import INTERFACE, Stage, until

Call = Callable[..., Awaitable["CompletedProcess[str]"]]
MEASURED = Measurement(
    batch=8, forward_seconds=1e-4, forward_seconds_p99=2e-4, backward_seconds=3e-4, peak_memory_bytes=4096,
    precision_drift=0.0, gradient_norm=1.0, deterministic=True, repetitions=3, target="test",
)  # fmt: skip


@pytest.fixture
def esperctl(stage: Stage, tmp_path: Path) -> Call:
    """`esperctl` in a process of its own, pointed at the stage."""
    (tmp_path / ENDPOINTS_FILE).write_text(shown(stage.endpoints))

    async def call(*arguments: str) -> CompletedProcess[str]:
        return await asyncio.to_thread(run_esperctl, tmp_path, *arguments)

    return call


def shown(endpoints: Endpoints) -> str:
    plain = endpoints.model_dump(mode="json")
    for name in type(endpoints).model_fields:
        value = getattr(endpoints, name)
        if isinstance(value, SecretStr):
            plain[name] = value.get_secret_value()
    return json.dumps(plain)


async def read(esperctl: Call, *arguments: str) -> Any:
    """The JSON of a command that succeeds."""
    done = await esperctl(*arguments, "-o", "json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class Maker:
    """Kernels that are signed by whom one likes, put into the stage's library the hard way."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def key(self, signer: str) -> bytes:
        return (self.stage.endpoints.keys_dir / f"{signer}.key").read_bytes()

    def manifest(self, width: int) -> KernelManifest:
        return KernelManifest.describe(
            catalogue()["bottleneck_mlp"], INTERFACE, b"weights %d" % width, Provenance(compiler="test"),
            symbols={"width": width}, seed=width,
        )  # fmt: skip

    async def upload(self, manifest: KernelManifest) -> None:
        built = sign(statement(manifest, "build", {}), self.key("tezzeret"))
        header = urza_pb2.KernelHeader(
            manifest=to_proto(manifest, kernel_pb2.KernelManifest), attestation=to_proto(built, kernel_pb2.Attestation)
        )

        async def parts() -> AsyncIterator[urza_pb2.UploadKernelRequest]:
            yield urza_pb2.UploadKernelRequest(header=header)
            yield urza_pb2.UploadKernelRequest(chunk=b"weights %d" % manifest.seed)

        await self.stage.stub("urza", "tezzeret").UploadKernel(parts())

    def said(self, manifest: KernelManifest, word: str, **more: Any) -> Attestation:
        return sign(statement(manifest, "validation", {"verdict": word, **more}), self.key("urabrask"))

    def native(self, manifest: KernelManifest, signer: str = "tezzeret") -> tuple[NativeRecord, Attestation, bytes]:
        code = b"native code of %d" % manifest.seed
        record = NativeRecord(
            kernel_id=manifest.kernel_id, target="cpu-1", toolchain="torch/1", blob_sha256=sha256(code),
            blob_bytes=len(code), rows=64, step_ratio=0.5,
        )  # fmt: skip
        return record, sign(native_statement(record), self.key(signer)), code

    async def upload_native(self, manifest: KernelManifest) -> bytes:
        record, said, code = self.native(manifest)
        header = native_pb2.NativeHeader(
            record=to_proto(record, kernel_pb2.NativeRecord), attestation=to_proto(said, kernel_pb2.Attestation)
        )

        async def parts() -> AsyncIterator[native_pb2.UploadNativeRequest]:
            yield native_pb2.UploadNativeRequest(header=header)
            yield native_pb2.UploadNativeRequest(chunk=code)

        await self.stage.stub("urza", "tezzeret").UploadNative(parts())
        return code

    async def stored_native(self, manifest: KernelManifest) -> bytes:
        request = native_pb2.StreamNativeRequest(kernel_id=manifest.kernel_id, target="cpu-1", toolchain="torch/1")
        return b"".join([piece.chunk async for piece in self.stage.stub("urza").StreamNative(request)])

    async def judge(self, manifest: KernelManifest, word: str, **more: Any) -> None:
        request = urza_pb2.UpdateKernelStatusRequest(
            kernel_id=manifest.kernel_id, status=int(KernelStatus[word]), reason="measured", tags=["size:small"],
            measurement=to_proto(MEASURED, kernel_pb2.Measurement),
            attestation=to_proto(self.said(manifest, word, **more), kernel_pb2.Attestation),
        )  # fmt: skip
        await self.stage.stub("urza", "urabrask").UpdateKernelStatus(request)

    async def status(self, manifest: KernelManifest) -> str:
        request = urza_pb2.GetKernelRequest(kernel_id=manifest.kernel_id)
        answer = await self.stage.stub("urza").GetKernel(request)
        return KernelStatus(answer.kernel.status).name


async def forget_everything(stage: Stage) -> None:
    """As if the file came to another library."""
    await stage.database.execute(
        "TRUNCATE urza.kernels, urza.natives, urza.attestations, urza.usage, urza.tombstones, urza.copies"
    )
    await stage.database.execute("DELETE FROM urza.lineage")
    await stage.database.execute("DELETE FROM urza.blueprints WHERE created_by <> 'catalogue'")


async def filled(stage: Stage) -> dict[str, KernelManifest]:
    """A library with one kernel of every kind, by what becomes of it elsewhere."""
    maker = Maker(stage)
    made = {name: maker.manifest(width) for width, name in enumerate(("sure", "plain", "fresh", "bad", "old"), start=2)}
    signed = {"reason": "measured", "tags": ["size:small"], "measurement": MEASURED.model_dump(mode="json")}
    for manifest in made.values():
        await maker.upload(manifest)
    await maker.judge(made["sure"], "VALIDATED", **signed)
    await maker.judge(made["plain"], "VALIDATED")  # the statement does not carry the measurement
    await maker.judge(made["bad"], "REJECTED", **signed)
    await maker.judge(made["old"], "VALIDATED", **signed)
    retire = urza_pb2.UpdateKernelStatusRequest(kernel_id=made["old"].kernel_id, status=4, reason="superseded")
    await stage.stub("urza").UpdateKernelStatus(retire)
    return made


async def test_a_library_goes_out_and_comes_in_elsewhere(stage: Stage, esperctl: Call, tmp_path: Path) -> None:
    await forget_everything(stage)
    made = await filled(stage)
    child = catalogue()["low_rank"].model_copy(
        update={"name": "exported-child", "parent_ids": (catalogue()["low_rank"].id,)}
    )
    request = urza_pb2.UploadBlueprintRequest(blueprint=to_proto(child, blueprint_pb2.BlueprintIR))
    await stage.stub("urza", "karn").UploadBlueprint(request)
    file = tmp_path / "library.esper"
    out = await read(esperctl, "library", "export", str(file))
    assert out["kernels"] == 5
    assert out["blueprints"] == len(catalogue()) + 1
    assert out["bytes"] == file.stat().st_size
    with tarfile.open(file) as archive:
        assert len(archive.getnames()) == 2 + out["blueprints"] + 5 + 5

    known = await read(esperctl, "library", "import", str(file))
    assert (known["kernels"], known["blueprints"], known["known"]) == (0, 0, out["blueprints"] + 5)
    await forget_everything(stage)
    came = await read(esperctl, "library", "import", str(file))
    assert (came["kernels"], came["blueprints"], came["unmeasured"], came["left_out"]) == (5, 1, 2, 0)
    notes = {one["kernel_id"]: (one["status"], one["note"]) for one in came["noted"]}
    assert set(notes) == {made["plain"].kernel_id, made["fresh"].kernel_id}
    assert notes[made["plain"].kernel_id][0] == "COMPILED"
    assert "measured again" in notes[made["plain"].kernel_id][1]
    maker = Maker(stage)
    now = {name: await maker.status(manifest) for name, manifest in made.items()}
    assert now == {"sure": "VALIDATED", "plain": "COMPILED", "fresh": "COMPILED", "bad": "REJECTED", "old": "RETIRED"}
    found = await read(
        esperctl, "kernel", "query", "--tag", "size:small", "--status", "validated", "--born-of", "catalogue"
    )
    (record,) = found["kernels"]
    assert record["manifest"]["kernel_id"] == made["sure"].kernel_id
    assert record["measurement"]["peak_memory_bytes"] == MEASURED.peak_memory_bytes
    lineage = await read(esperctl, "blueprint", "lineage", "exported-child")
    assert {one["name"]: (one["generation"], one["created_by"]) for one in lineage["relatives"]} == {
        "exported-child": (0, "karn"), "low_rank": (-1, "catalogue"),
    }  # fmt: skip
    waiting = await stage.database.fetch(
        "SELECT count(*) AS n FROM bus.outbox WHERE subject = $1", subjects.KERNEL_READY.of()
    )
    assert waiting[0]["n"] == 2  # Urabrask is asked for those without a verdict
    some = tmp_path / "some.esper"
    out = await read(esperctl, "library", "export", str(some), "--status", "validated", "--blueprint", "bottleneck_mlp")
    assert (out["kernels"], out["blueprints"]) == (1, 1)


async def test_what_is_not_trusted_here_stays_outside(stage: Stage, esperctl: Call, tmp_path: Path) -> None:
    await forget_everything(stage)
    made = await filled(stage)
    await Maker(stage).upload_native(made["sure"])
    file = tmp_path / "library.esper"
    await read(esperctl, "library", "export", str(file))
    await forget_everything(stage)
    trust = stage.endpoints.keys_dir / "trust.json"
    before = trust.read_text()
    whole = TrustList.model_validate_json(before)

    async def refused(data: bytes, code: int, why: str) -> None:
        damaged = tmp_path / "damaged.esper"
        damaged.write_bytes(data)
        done = await esperctl("library", "import", str(damaged))
        assert (done.returncode, why in done.stderr) == (code, True), done.stderr
        assert await stage.database.fetchval("SELECT count(*) FROM urza.kernels") == 0
        assert await stage.database.fetchval("SELECT count(*) FROM urza.copies") == 0

    data = file.read_bytes()
    last = data.rindex(b"weights")  # in the very last blob
    await refused(data[:last] + b"W" + data[last + 1 :], 10, "was altered")
    await refused(data[:-600], 10, "ends early")
    await refused(data[data.index(b"index.json") :], 11, "not signed")
    await refused(b"PK" + data, 2, "no library file")
    try:
        others = tuple(key for key in whole.keys if key.role != "library")
        trust.write_text(TrustList(keys=others).dump())
        await refused(data, 11, "not on the trust list")
        elsewhere = {key.role: trust_entry(key.role, public_pem(generate_key())) for key in whole.keys}
        mine = {key.role: key for key in whole.keys}
        trust.write_text(TrustList(keys=(mine["library"], mine["build"], elsewhere["validation"])).dump())
        came = await read(esperctl, "library", "import", str(file))
        assert (came["kernels"], came["unmeasured"], came["left_out"]) == (5, 5, 0)
        assert {one["status"] for one in came["noted"]} == {"COMPILED"}
        await forget_everything(stage)
        trust.write_text(TrustList(keys=(mine["library"], elsewhere["build"], mine["validation"])).dump())
        done = await esperctl("library", "import", str(file), "-o", "json")
        assert done.returncode == 11
        assert "left out: 5 kernels, 1 native parts; no trusted key speaks for 6 of them" in done.stderr
        came = json.loads(done.stdout)
        assert (came["kernels"], came["left_out"], came["natives_left_out"], came["untrusted"]) == (0, 5, 1, 6)
        assert {one["kernel_id"] for one in came["noted"]} == {one.kernel_id for one in made.values()}
        assert all("have its blueprint built here" in one["note"] for one in came["noted"])
        (part,) = came["noted_natives"]
        assert (part["kernel_id"], part["target"], part["kept"]) == (made["sure"].kernel_id, "cpu-1", False)
        for one in (*came["noted"], part):
            assert one["blueprint_name"] == "bottleneck_mlp"
            assert f"key {mine['build'].key_id} (role build)" in one["hint"]
            assert mine["build"].key_id in one["note"]
        shown = (await esperctl("library", "import", str(file))).stdout
        assert shown.count("bottleneck_mlp") == 6
        assert " ".join(shown.split()).count("copy the entry of key") == 1
        # As the hint says: with the other forge's entry all come in, its native part as well.
        both = TrustList(keys=(mine["library"], elsewhere["build"], mine["build"], mine["validation"]))
        trust.write_text(both.dump())
        came = await read(esperctl, "library", "import", str(file))
        assert (came["kernels"], came["natives"], came["left_out"], came["natives_left_out"]) == (5, 1, 0, 0)
        assert await Maker(stage).stored_native(made["sure"]) == Maker(stage).native(made["sure"])[2]
        await forget_everything(stage)
    finally:
        trust.write_text(before)
    request = urza_pb2.GetKernelRequest(kernel_id=made["sure"].kernel_id)
    with pytest.raises(NotFound):
        await stage.stub("urza").GetKernel(request)


async def test_native_parts_go_along_unless_they_are_not_wanted(stage: Stage, esperctl: Call, tmp_path: Path) -> None:
    await forget_everything(stage)
    made, maker = await filled(stage), Maker(stage)
    code = {name: await maker.upload_native(made[name]) for name in ("sure", "bad")}
    small, whole = tmp_path / "small.esper", tmp_path / "whole.esper"
    out = await read(esperctl, "library", "export", str(small), "--no-natives")
    assert (out["natives"], out["bytes"]) == (0, small.stat().st_size)
    out = await read(esperctl, "library", "export", str(whole))
    assert out["natives"] == 2
    with tarfile.open(whole) as archive:
        assert sum(name.startswith("natives/") for name in archive.getnames()) == 2
    await forget_everything(stage)
    assert (await read(esperctl, "library", "import", str(small)))["natives"] == 0
    with pytest.raises(NotFound):
        await maker.stored_native(made["sure"])
    came = await read(esperctl, "library", "import", str(whole))
    assert (came["natives"], came["kernels"]) == (2, 0)
    again = await read(esperctl, "library", "import", str(whole))
    assert (again["natives"], again["known"]) == (0, came["known"] + 2)
    for name, expected in code.items():
        assert await maker.stored_native(made[name]) == expected
    await read(esperctl, "library", "gc", "--keep-unused", "0")
    gone = await esperctl("library", "import", str(whole), "-o", "json")
    assert gone.returncode == 5
    told = json.loads(gone.stdout)
    assert (told["left_out"], told["natives_left_out"], told["untrusted"]) == (2, 1, 0)
    assert all("forgotten" in one["note"] and not one["hint"] for one in told["noted"] if not one["status"])
    assert [one["kernel_id"] for one in told["noted_natives"]] == [made["bad"].kernel_id]


async def test_only_the_operator_may(stage: Stage) -> None:
    async def pieces() -> AsyncIterator[urza_pb2.ImportLibraryRequest]:
        yield urza_pb2.ImportLibraryRequest(chunk=b"x" * 1000)

    for principal in sorted(PRINCIPALS - {"operator"}):
        stub = stage.stub("urza", principal)
        for call in (stub.ImportLibrary(pieces()), stub.CollectGarbage(urza_pb2.CollectGarbageRequest())):
            with pytest.raises(Forbidden, match=principal):
                async for _ in call:
                    pass
    with pytest.raises(InvalidInput, match="no library file"):
        async for _ in stage.stub("urza").ImportLibrary(pieces()):
            pass


def report(manifest: KernelManifest, outcome: State, contribution: float | None) -> decision_pb2.FieldReport:
    return decision_pb2.FieldReport(
        report_id=new_id(), run_id="digits-1", seed_id="digits-1/fc1:fc2/0", slot="fc1:fc2",
        kernel_id=manifest.kernel_id, blueprint_id=manifest.blueprint_id, outcome=int(outcome), contribution=contribution,
    )  # fmt: skip


async def test_interest_comes_from_the_field(stage: Stage, esperctl: Call) -> None:
    await forget_everything(stage)
    made = await filled(stage)
    loved, tried, unused = made["sure"], made["plain"], made["fresh"]
    told = [
        report(loved, State.FOSSILIZED, 0.25), report(loved, State.CULLED, 0.05), report(tried, State.ROLLED_BACK, None),
        report(tried, State.CULLED, -0.5), report(Maker(stage).manifest(99), State.FOSSILIZED, 1.0),
    ]  # fmt: skip
    for message in told:
        envelope = wrap(message, producer="tolaria")
        for _ in range(2):  # a report that comes twice counts once
            await stage.send(subjects.FIELD_REPORTS, envelope)
    async for _ in stage.stub("urza", "tolaria").StreamKernel(urza_pb2.StreamKernelRequest(kernel_id=loved.kernel_id)):
        pass
    async for _ in stage.stub("urza", "urabrask").StreamKernel(
        urza_pb2.StreamKernelRequest(kernel_id=unused.kernel_id)
    ):
        pass

    async def counted() -> bool:
        rows = await stage.database.fetch("SELECT sum(fossilized + culled + rolled_back) AS n FROM urza.usage")
        return bool(rows[0]["n"] == 4)

    await until(counted)
    page = await read(esperctl, "kernel", "query", "--by", "interest", "-n", "2")
    assert [one["manifest"]["kernel_id"] for one in page["kernels"]] == [loved.kernel_id, tried.kernel_id]
    first, second = page["usage"]
    assert [first[name] for name in ("streams", "tried", "fossilized", "culled")] == [1, 2, 1, 1]
    assert first["contribution"] == pytest.approx(0.15)
    assert [second[name] for name in ("tried", "culled", "rolled_back", "contribution")] == [2, 1, 1, -0.5]
    assert first["interest"] == pytest.approx(5 + 1 + 1, rel=0.01)  # six deeds are nothing beside a half-life of 1000
    assert second["interest"] == pytest.approx(2, rel=0.01)
    rest = await read(esperctl, "kernel", "query", "--by", "interest", "--after", page["next_page_token"])
    assert {one["interest"] for one in rest["usage"]} == {0.0}
    assert len(rest["kernels"]) == 3
    text = (await esperctl("kernel", "query", "--by", "interest", "-n", "1")).stdout.splitlines()
    assert text[0].split()[-3:] == ["KEPT", "GAIN", "INTEREST"]
    assert text[1].split()[-5:-1] == ["1", "of", "2", "0.15"]
    text = (await esperctl("kernel", "query", "--by", "interest", "-n", "1", "--tags")).stdout.splitlines()
    assert text[1].split()[1:] == ["size:small"]
    gone = await read(esperctl, "library", "gc", "--keep-unused", "0")
    assert (gone["rejected"], gone["retired"], gone["unused"], gone["kept"]) == (1, 1, 1, 2)
