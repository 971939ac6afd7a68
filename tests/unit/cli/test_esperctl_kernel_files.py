"""Pulling and verifying: streams break, bytes rot, signatures lie."""

import hashlib
import json
from pathlib import Path

import pytest

from esper_core.blueprint.catalogue import catalogue
from esper_core.blueprint.interface import Layout, SlotInterface
from esper_core.cli import download as download_module
from esper_core.errors import Unavailable
from esper_core.kernel.manifest import KernelManifest, Provenance
from esper_core.kernel.sign import generate_key, public_pem, sign, statement
from esper_core.kernel.trust import TrustList, trust_entry
from esper_core.pb.esper.core.v1.kernel_pb2 import Attestation, KernelRecord
from esper_core.pb.esper.core.v1.kernel_pb2 import KernelManifest as WireManifest
from esper_core.pb.esper.urza.v1 import urza_pb2
from esper_core.rpc.convert import to_proto

BLOB = bytes(range(256)) * 5
CHUNK = 300
INTERFACE = SlotInterface(layout=Layout.FEATURES, in_width=16, out_width=8, hidden_width=4, activation="relu")


class Library:
    """A library with one kernel, signed as it should be, and ways to spoil it."""

    def __init__(self, platform) -> None:
        self.platform = platform
        blueprint = next(design for design in catalogue().values() if Layout.FEATURES in design.layouts)
        self.manifest = KernelManifest.describe(blueprint, INTERFACE, BLOB, Provenance())
        self.keys = {"build": generate_key(), "validation": generate_key()}
        self.blob = BLOB
        self.offsets: list[int] = []
        self.break_after: list[int] = []
        self.list_keys(self.keys)
        self.record = self.signed(self.keys)
        platform.on("GetKernel", lambda _: urza_pb2.GetKernelResponse(kernel=self.record))
        platform.on("StreamKernel", self.stream)

    @property
    def name(self) -> str:
        return self.manifest.kernel_id

    def list_keys(self, keys) -> None:
        trust = TrustList(keys=tuple(trust_entry(role, public_pem(key)) for role, key in keys.items()))
        (self.platform.data_dir / "keys" / "trust.json").write_text(trust.dump())

    def signed(self, keys, verdict: str = "VALIDATED") -> KernelRecord:
        statements = [
            statement(self.manifest, "build", {}),
            statement(self.manifest, "validation", {"verdict": verdict}),
        ]
        attestations = [
            to_proto(sign(said, key), Attestation) for said, key in zip(statements, keys.values(), strict=True)
        ]
        return KernelRecord(manifest=to_proto(self.manifest, WireManifest), status=2, attestations=attestations)

    def stream(self, request):
        self.offsets.append(request.offset)
        yield urza_pb2.StreamKernelResponse(record=self.record)
        stop = self.break_after.pop(0) if self.break_after else None
        for count, start in enumerate(range(request.offset, len(self.blob), CHUNK)):
            if count == stop:
                raise Unavailable("the library went away")
            data = self.blob[start : start + CHUNK]
            yield urza_pb2.StreamKernelResponse(
                chunk=urza_pb2.KernelChunk(offset=start, data=data, sha256=hashlib.sha256(data).hexdigest())
            )


@pytest.fixture
def library(platform, monkeypatch) -> Library:
    monkeypatch.setattr(download_module, "_PAUSE", 0.0)
    return Library(platform)


def files(library: Library, folder: Path) -> tuple[Path, Path]:
    return folder / f"{library.name}.safetensors", folder / f"{library.name}.json"


def test_pull_brings_blob_and_record(library, esperctl, tmp_path):
    done = esperctl("kernel", "pull", library.name[:19], "--to", str(tmp_path / "new"), "-o", "json")
    assert done.exit_code == 0, done.stderr
    blob, record = files(library, tmp_path / "new")
    assert blob.read_bytes() == BLOB
    assert json.loads(record.read_text())["manifest"]["kernel_id"] == library.name
    answer = json.loads(done.stdout)
    assert (answer["bytes"], answer["fetched"], answer["blob"]) == (len(BLOB), True, str(blob))
    assert sorted(path.suffix for path in blob.parent.iterdir()) == [".json", ".safetensors"]


def test_a_second_pull_fetches_nothing(library, esperctl, tmp_path):
    for fetched in (True, False):
        done = esperctl("kernel", "pull", library.name, "--to", str(tmp_path), "-o", "json")
        assert json.loads(done.stdout)["fetched"] is fetched
    assert library.offsets == [0]


def test_a_broken_stream_goes_on_where_it_stopped(library, esperctl, tmp_path):
    library.break_after = [2, 1]
    assert esperctl("kernel", "pull", library.name, "--to", str(tmp_path)).exit_code == 0
    assert library.offsets == [0, 2 * CHUNK, 3 * CHUNK]
    assert files(library, tmp_path)[0].read_bytes() == BLOB


def test_what_came_is_kept_for_the_next_pull(library, esperctl, tmp_path):
    library.break_after = [2] + [0] * (download_module.TRIES - 1)
    done = esperctl("kernel", "pull", library.name, "--to", str(tmp_path))
    assert done.exit_code == Unavailable.exit_code
    blob, record = files(library, tmp_path)
    assert not blob.exists()
    assert not record.exists()
    assert blob.with_name(blob.name + ".part").read_bytes() == BLOB[: 2 * CHUNK]
    library.offsets.clear()
    assert esperctl("kernel", "pull", library.name, "--to", str(tmp_path)).exit_code == 0
    assert library.offsets == [2 * CHUNK]
    assert blob.read_bytes() == BLOB


def test_bytes_that_do_not_match_are_thrown_away(library, esperctl, tmp_path):
    library.blob = BLOB[:-1] + b"\x00"
    done = esperctl("kernel", "pull", library.name, "--to", str(tmp_path))
    assert done.exit_code == 10
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spoilt", [BLOB[:-1], BLOB + b"x"])
def test_too_few_or_too_many_bytes_are_corrupt(library, esperctl, tmp_path, spoilt):
    library.blob = spoilt
    assert esperctl("kernel", "pull", library.name, "--to", str(tmp_path)).exit_code == 10
    assert not files(library, tmp_path)[0].exists()


def test_a_foreign_part_file_does_not_end_in_a_wrong_kernel(library, esperctl, tmp_path):
    blob, _ = files(library, tmp_path)
    blob.with_name(blob.name + ".part").write_bytes(b"?" * 10)
    assert esperctl("kernel", "pull", library.name, "--to", str(tmp_path)).exit_code == 10
    assert esperctl("kernel", "pull", library.name, "--to", str(tmp_path)).exit_code == 0
    assert blob.read_bytes() == BLOB


def test_a_folder_that_cannot_be_made(library, esperctl, tmp_path):
    (tmp_path / "file").write_text("")
    done = esperctl("kernel", "pull", library.name, "--to", str(tmp_path / "file" / "below"))
    assert done.exit_code == 2
    assert "--to" in done.stderr


def test_verify_by_name_and_by_file(library, esperctl, tmp_path):
    done = esperctl("kernel", "verify", library.name[:19], "-o", "json")
    assert done.exit_code == 0, done.stderr
    proof = json.loads(done.stdout)
    assert proof["verified"] is True
    assert set(proof["signers"]) == {"build", "validation"}
    esperctl("kernel", "pull", library.name, "--to", str(tmp_path))
    assert json.loads(esperctl("kernel", "verify", str(files(library, tmp_path)[0]), "-o", "json").stdout) == proof


@pytest.mark.parametrize("position", [0, 640, len(BLOB) - 1])
def test_one_flipped_bit_in_the_weights(library, esperctl, tmp_path, position):
    esperctl("kernel", "pull", library.name, "--to", str(tmp_path))
    blob, _ = files(library, tmp_path)
    damaged = bytearray(BLOB)
    damaged[position] ^= 1
    blob.write_bytes(damaged)
    done = esperctl("kernel", "verify", str(blob))
    assert (done.exit_code, done.stdout) == (10, "")


def test_a_changed_manifest_is_not_trusted(library, esperctl, tmp_path):
    esperctl("kernel", "pull", library.name, "--to", str(tmp_path))
    blob, record = files(library, tmp_path)
    document = json.loads(record.read_text())
    document["manifest"]["parameters"] = "1"
    record.write_text(json.dumps(document))
    assert esperctl("kernel", "verify", str(blob)).exit_code == 11


@pytest.mark.parametrize("missing", ["build", "validation"])
def test_an_unlisted_signer_is_not_trusted(library, esperctl, missing):
    library.list_keys({role: key for role, key in library.keys.items() if role != missing})
    assert esperctl("kernel", "verify", library.name).exit_code == 11


def test_one_party_may_not_sign_for_both(library, esperctl):
    library.record = library.signed({"build": library.keys["build"], "validation": library.keys["build"]})
    assert esperctl("kernel", "verify", library.name).exit_code == 11


def test_a_kernel_nobody_validated_is_not_trusted(library, esperctl):
    del library.record.attestations[1]
    assert esperctl("kernel", "verify", library.name).exit_code == 11
    library.record = library.signed(library.keys, verdict="REJECTED")
    assert esperctl("kernel", "verify", library.name).exit_code == 11


def test_files_that_are_not_there_or_not_a_record(library, esperctl, tmp_path):
    assert esperctl("kernel", "verify", str(tmp_path / "no.safetensors")).exit_code == 3
    (tmp_path / "a.safetensors").write_bytes(b"x")
    assert esperctl("kernel", "verify", str(tmp_path / "a.safetensors")).exit_code == 3
    (tmp_path / "a.json").write_text("{]")
    assert esperctl("kernel", "verify", str(tmp_path / "a.safetensors")).exit_code == 10
