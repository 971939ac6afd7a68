"""A library file is read exactly as it was signed, or not at all."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from esper_core.blueprint.catalogue import catalogue
from esper_core.blueprint.interface import Layout, SlotInterface, canonical_json
from esper_core.errors import Corrupt, EsperError, InvalidInput, Untrusted
from esper_core.ids import sha256
from esper_core.kernel import bundle
from esper_core.kernel.bundle import Design, Index, Native, Plan, blob_header
from esper_core.kernel.manifest import KernelManifest, Provenance
from esper_core.kernel.native import NativeRecord, native_statement
from esper_core.kernel.record import KernelRecord, KernelStatus
from esper_core.kernel.sign import PREDICATES, Statement, Subject, generate_key, public_pem, sign, statement
from esper_core.kernel.tape import END, Entry, header, padding
from esper_core.kernel.trust import TrustList, trust_entry

KEY = generate_key()
TRUST = TrustList(keys=(trust_entry("library", public_pem(KEY)),))
SLOT = SlotInterface(
    layout=Layout.FEATURES, in_width=16, out_width=12, hidden_width=4, activation="relu", foldable=True
)
BLOBS = (b"one" * 400, b"two")


def record(blob: bytes, name: str = "bottleneck_mlp") -> KernelRecord:
    manifest = KernelManifest.describe(catalogue()[name], SLOT, blob, Provenance(compiler="test"))
    attestation = sign(statement(manifest, "build", {}), KEY)
    return KernelRecord(
        manifest=manifest, status=KernelStatus.COMPILED, attestations=(attestation,), interface_id=SLOT.id
    )


def native(kernel: KernelRecord, code: bytes) -> Native:
    part = NativeRecord(
        kernel_id=kernel.manifest.kernel_id, target="cpu", toolchain="torch/1", blob_sha256=sha256(code),
        blob_bytes=len(code), rows=64, step_ratio=0.5,
    )  # fmt: skip
    return Native(record=part, attestation=sign(native_statement(part), KEY))


CODE = b"native code"
RECORDS = (record(BLOBS[0]), record(BLOBS[1]), record(BLOBS[1], "low_rank"))
DESIGNS = tuple(Design(blueprint=ir, created_by="karn") for ir in catalogue().values())


def written(
    designs: tuple[Design, ...] = DESIGNS,
    records: tuple[KernelRecord, ...] = RECORDS,
    natives: tuple[Native, ...] = (),
    key: bytes = KEY,
) -> bytes:
    """A file as exporting writes it."""
    plan = Plan(designs, records, natives)
    by_digest = {sha256(blob): blob for blob in (*BLOBS, CODE)}
    parts = [*plan.head(key)]
    for digest, size in plan.blobs.items():
        parts += [blob_header(digest, size), by_digest[digest], padding(size)]
    return b"".join([*parts, END])


WHOLE = written()


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., bundle.Library]:
    def call(data: bytes, trust: TrustList = TRUST) -> bundle.Library:
        path = tmp_path / "library.esper"
        path.write_bytes(data)
        return bundle.read(path, trust)

    return call


def forged(entries: list[tuple[str, bytes]], listed: list[tuple[str, bytes]] | None = None) -> bytes:
    """A signed file with any entries under any index: what a listed key could do at worst."""
    index = canonical_json(
        {
            "format": "esper-library", "version": 1,
            "entries": [{"name": name, "sha256": sha256(data), "bytes": len(data)} for name, data in listed or entries],
        }
    )  # fmt: skip
    said = Statement(
        subject=(Subject(name="library", digest={"sha256": sha256(index)}),),
        predicate_type=PREDICATES["library"], predicate={},
    )  # fmt: skip
    signature = canonical_json(sign(said, KEY).model_dump(mode="json"))
    parts = [("signature.json", signature), ("index.json", index), *entries]
    return b"".join([header(name, len(data)) + data + padding(len(data)) for name, data in parts]) + END


def test_what_comes_out_is_what_went_in(read: Callable[..., bundle.Library]) -> None:
    found = read(WHOLE)
    assert {design.blueprint.name: design.created_by for design in found.designs} == dict.fromkeys(catalogue(), "karn")
    assert sorted(found.records, key=str) == sorted(RECORDS, key=str)
    assert found.key_id == TRUST.keys[0].key_id
    assert set(found.places) == {sha256(blob) for blob in BLOBS}
    for blob in BLOBS:
        assert found.blob(sha256(blob)) == blob
    found.path.write_bytes(found.path.read_bytes().replace(BLOBS[1], b"owt"))
    with pytest.raises(Corrupt, match="changed while"):
        found.blob(sha256(BLOBS[1]))


def test_it_is_written_in_one_way_and_any_tar_lists_it() -> None:
    signature = len(header("s", 0)) + 1024  # differs: ECDSA is random
    assert written(DESIGNS[::-1], RECORDS[::-1])[signature:] == WHOLE[signature:]
    with tarfile.open(fileobj=io.BytesIO(WHOLE)) as archive:
        names = archive.getnames()
    assert names[:2] == ["signature.json", "index.json"]
    assert len(names) == 2 + len(DESIGNS) + len(RECORDS) + len(BLOBS)


def test_an_empty_library_is_one(read: Callable[..., bundle.Library]) -> None:
    assert read(written((), ())).records == []


def test_any_changed_bit_is_noticed(read: Callable[..., bundle.Library]) -> None:
    chance = random.Random(4)
    for place in {
        *chance.sample(range(len(WHOLE)), 250),
        *range(0, 1200, 7),
        *range(len(WHOLE) - 1100, len(WHOLE), 50),
    }:
        damaged = WHOLE[:place] + bytes([WHOLE[place] ^ 1 << chance.randrange(8)]) + WHOLE[place + 1 :]
        with pytest.raises((Corrupt, InvalidInput, Untrusted)):
            read(damaged)


def test_a_file_that_ends_early_or_late_is_noticed(read: Callable[..., bundle.Library]) -> None:
    for size in (*range(0, len(WHOLE), 512), len(WHOLE) - 1):
        with pytest.raises((Corrupt, InvalidInput), match=r"ends early"):
            read(WHOLE[:size])
    for more in (b"\0", header("blobs/" + "0" * 64, 0)):
        with pytest.raises(Corrupt, match="more in the file"):
            read(WHOLE + more)


def test_who_signed_it_must_be_listed_for_it(read: Callable[..., bundle.Library]) -> None:
    stranger = generate_key()
    with pytest.raises(Untrusted, match="not on the trust list"):
        read(written(key=stranger))
    for role in ("build", "validation"):
        with pytest.raises(Untrusted, match=f"may sign {role} statements, not library"):
            read(WHOLE, TrustList(keys=(trust_entry(role, public_pem(KEY)),)))
    revoked = TrustList(keys=(TRUST.keys[0].model_copy(update={"revoked": True}),))
    with pytest.raises(Untrusted, match="revoked"):
        read(WHOLE, revoked)
    first = WHOLE.index(b"index.json")
    with pytest.raises(Untrusted, match="not signed"):
        read(WHOLE[first:])
    other = canonical_json(RECORDS[0].attestations[0].model_dump(mode="json"))
    with pytest.raises(Untrusted, match="no library statement"):
        read(header("signature.json", len(other)) + other + padding(len(other)) + WHOLE[first:])


@pytest.mark.parametrize("data", [b"PK\3\4" + bytes(600), gzip.compress(WHOLE), b"\x80" * 2000, b"x" * 600])
def test_other_files_are_none(read: Callable[..., bundle.Library], data: bytes) -> None:
    with pytest.raises(InvalidInput, match="no library file"):
        read(data)


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "blobs/../x",
        "kernels/kernel-1.json",
        "blobs/" + "A" * 64,
        "blobs/" + "0" * 65,
    ],
)
def test_no_name_leads_anywhere(read: Callable[..., bundle.Library], name: str) -> None:
    with pytest.raises(InvalidInput, match="malformed"):
        read(forged([(name, b"x")]))


def test_a_listed_key_cannot_hide_or_leave_out_anything(read: Callable[..., bundle.Library]) -> None:
    design, kernel, blob = DESIGNS[1], record(BLOBS[1]), BLOBS[1]
    ir = kernel.manifest.blueprint_id
    papers = {
        f"blueprints/{ir}.json": canonical_json(
            Design(blueprint=kernel.manifest.blueprint, created_by="karn").model_dump(mode="json")
        ),
        f"kernels/{kernel.manifest.kernel_id}.json": canonical_json(kernel.model_dump(mode="json")),
        f"blobs/{sha256(blob)}": blob,
    }
    whole = [*papers.items()]
    assert len(read(forged(whole)).records) == 1
    cases: list[tuple[bytes, type[EsperError], str]] = [
        (forged(whole[1:]), InvalidInput, "without its blueprint"),
        (forged(whole[:2]), InvalidInput, "without its bytes"),
        (forged([whole[0], whole[2]]), InvalidInput, "no kernel has"),
        (forged([*whole, whole[2]]), InvalidInput, "listed twice"),
        (forged(whole, whole[:2]), Corrupt, "more in the file"),
        (forged(whole[:2], whole), Corrupt, "header of blobs"),
        (forged([(whole[0][0], whole[1][1]), *whole[1:]]), InvalidInput, "malformed"),
        (forged([(f"blueprints/{design.blueprint.id}.json", whole[0][1])]), Corrupt, "holds blueprint-"),
        (forged([(whole[0][0], b"{}" + b" " * bundle.MAX_PAPER)]), InvalidInput, "at most|bytes"),
    ]
    for data, refusal, why in cases:
        with pytest.raises(refusal, match=why):
            read(data)


def test_sizes_are_bounded_before_anything_is_read(read: Callable[..., bundle.Library]) -> None:
    claimed = header("signature.json", 1 << 30)
    with pytest.raises(InvalidInput, match=r"signature\.json of"):
        read(claimed + bytes(1024))
    signature = WHOLE[: WHOLE.index(b"index.json")]
    with pytest.raises(InvalidInput, match=r"index\.json of"):
        read(signature + header("index.json", bundle.MAX_INDEX + 1))
    big = Entry(name="blobs/" + "0" * 64, sha256="0" * 64, bytes=1 << 30)
    with pytest.raises(InvalidInput, match="a library file of"):
        bundle._bounded([big.model_copy(update={"name": f"blobs/{number:064x}"}) for number in range(5)])
    with pytest.raises(ValueError, match="at most 100000"):
        Index(entries=(big,) * (bundle.MAX_ENTRIES + 1))


def test_a_kernel_is_not_exported_without_its_blueprint() -> None:
    with pytest.raises(InvalidInput, match="without its blueprint"):
        Plan((), RECORDS)


def test_native_parts_travel_with_their_kernels(read: Callable[..., bundle.Library]) -> None:
    parts = (native(RECORDS[0], CODE), native(RECORDS[1], BLOBS[1]))  # the second has the same bytes as a kernel
    data = written(natives=parts)
    found = read(data)
    assert sorted(found.natives, key=str) == sorted(parts, key=str)
    assert found.blob(sha256(CODE)) == CODE
    assert set(found.places) == {sha256(blob) for blob in (*BLOBS, CODE)}
    assert (b'"version":2' in data, b'"version":1' in WHOLE) == (True, True)
    assert read(WHOLE).natives == []
    for place in range(data.index(b"natives/"), data.index(b"natives/") + 40, 3):
        with pytest.raises((Corrupt, InvalidInput, Untrusted)):
            read(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])


def test_a_native_part_without_kernel_or_bytes_is_refused(read: Callable[..., bundle.Library]) -> None:
    part = native(RECORDS[0], CODE)
    with pytest.raises(InvalidInput, match="without its kernel"):
        Plan(DESIGNS, RECORDS[1:], (part,))
    kernel = RECORDS[0]
    design = Design(blueprint=kernel.manifest.blueprint, created_by="karn")
    whole = [
        (f"blueprints/{design.blueprint.id}.json", canonical_json(design.model_dump(mode="json"))),
        (f"kernels/{kernel.manifest.kernel_id}.json", canonical_json(kernel.model_dump(mode="json"))),
        (f"natives/{part.id}.json", canonical_json(part.model_dump(mode="json"))),
        (f"blobs/{sha256(BLOBS[0])}", BLOBS[0]),
        (f"blobs/{sha256(CODE)}", CODE),
    ]
    assert read(forged(whole)).natives == [part]
    stranger = canonical_json(native(RECORDS[1], CODE).model_dump(mode="json"))
    cases = [
        (forged(whole[:4]), InvalidInput, "without its kernel or its bytes"),
        (forged([*whole[:2], *whole[3:]]), InvalidInput, "no kernel has"),
        (forged([*whole[:2], (whole[2][0], stranger), *whole[3:]]), Corrupt, "holds native-"),
    ]
    for data, refusal, why in cases:
        with pytest.raises(refusal, match=why):
            read(data)
