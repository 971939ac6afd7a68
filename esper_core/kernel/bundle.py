"""A library in one signed file: blueprints, kernels with their papers, weights, and native parts with theirs.

The file is a tar archive that ``tar`` can list, written in exactly one way: ``signature.json``, ``index.json``, then
every entry of the index in its order, nothing compressed, nothing else. The signature covers the index, the index every
other byte. Reading trusts nothing that the signature does not cover: the headers must be, byte for byte, those that
writing would have made, so that there are no paths to follow, no links, no sizes but those of the index, and no bomb to
unpack. Whoever signed answers for what is in the file, not for the kernels themselves: those carry their own statements.
Free of torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from esper_core.blueprint.interface import canonical_json
from esper_core.blueprint.ir import BlueprintIR
from esper_core.clock import SYSTEM, Clock
from esper_core.errors import Corrupt, InvalidInput
from esper_core.ids import content_id, sha256
from esper_core.kernel.native import NativeRecord
from esper_core.kernel.record import KernelRecord
from esper_core.kernel.sign import PREDICATES, Attestation, Statement, Subject, sign
from esper_core.kernel.tape import AGAIN, BLOCK, SIGNATURE, Entry, Tape, header, padding
from esper_core.kernel.trust import TrustList, verify

MAX_BUNDLE = 4 << 30  # bytes of a file
MAX_ENTRIES = 100_000
MAX_INDEX = 32 << 20  # bytes
MAX_PAPER = 1 << 20  # bytes of one blueprint or kernel record
MAX_SIGNATURE = 256 << 10  # bytes

INDEX, SUBJECT = "index.json", "library"
_M = TypeVar("_M", bound=BaseModel)


class Design(BaseModel):
    """A blueprint and who brought it to the library that it was exported from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    blueprint: BlueprintIR
    created_by: str = Field(pattern=r"^[a-z][a-z0-9_-]{0,62}$")


class Native(BaseModel):
    """A native part's papers: what it is, and the builder's signed statement about it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    record: NativeRecord
    attestation: Attestation

    @property
    def id(self) -> str:
        """``native-<sha256>`` of both."""
        return content_id("native", canonical_json(self.model_dump(mode="json")))


class Index(BaseModel):
    """What is in the archive, in order. Version 2 has native parts; a file without any is of version 1, as ever."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["esper-library"] = "esper-library"
    version: Literal[1, 2] = 1
    entries: tuple[Entry, ...] = Field(max_length=MAX_ENTRIES)

    def canonical(self) -> bytes:
        return canonical_json(self.model_dump(mode="json"))


class Plan:
    """What a file will be, before the first blob has been fetched: the digests stand in the manifests.

    Args:
        designs: the blueprints; those of all kernels must be among them.
        records: the kernels.
        natives: native parts of these kernels.

    Raises:
        InvalidInput: a kernel's blueprint or a native part's kernel is missing, or the file would be too large.
    """

    def __init__(
        self, designs: Iterable[Design], records: Iterable[KernelRecord], natives: Iterable[Native] = ()
    ) -> None:
        papers = {f"blueprints/{one.blueprint.id}.json": canonical_json(one.model_dump(mode="json")) for one in designs}
        blobs: dict[str, int] = {}
        self.source: dict[str, KernelRecord | Native] = {}
        """A kernel, or a native part, that has the blob, by digest."""
        for record in records:
            manifest = record.manifest
            if f"blueprints/{manifest.blueprint_id}.json" not in papers:
                raise InvalidInput(f"{manifest.kernel_id} comes without its blueprint", hint="export both")
            papers[f"kernels/{manifest.kernel_id}.json"] = canonical_json(record.model_dump(mode="json"))
            blobs[manifest.blob_sha256] = manifest.blob_bytes
            self.source[manifest.blob_sha256] = record
        version: Literal[1, 2] = 1
        for native in natives:
            version = 2
            if f"kernels/{native.record.kernel_id}.json" not in papers:
                raise InvalidInput(f"{native.id} comes without its kernel", hint="export both")
            papers[f"natives/{native.id}.json"] = canonical_json(native.model_dump(mode="json"))
            blobs[native.record.blob_sha256] = native.record.blob_bytes
            self.source.setdefault(native.record.blob_sha256, native)
        self._papers = dict(sorted(papers.items()))
        self.blobs = dict(sorted(blobs.items()))
        """Sizes of the blobs by digest, in the order in which they are to be written."""
        entries = [Entry(name=name, sha256=sha256(data), bytes=len(data)) for name, data in self._papers.items()]
        entries += [Entry(name=f"blobs/{digest}", sha256=digest, bytes=size) for digest, size in self.blobs.items()]
        _bounded(entries)
        self.index = Index(version=version, entries=tuple(entries))

    def head(self, private_pem: bytes) -> Iterator[bytes]:
        """The file up to the first blob, signed with an ECDSA P-256 private key (PEM).

        Raises:
            InvalidInput: no such key.
        """
        index = self.index.canonical()
        said = Statement(
            subject=(Subject(name=SUBJECT, digest={"sha256": sha256(index)}),),
            predicate_type=PREDICATES["library"],
            predicate={"entries": len(self.index.entries)},
        )
        signature = canonical_json(sign(said, private_pem).model_dump(mode="json"))
        for name, data in ((SIGNATURE, signature), (INDEX, index), *self._papers.items()):
            yield header(name, len(data)) + data + padding(len(data))


def blob_header(digest: str, size: int) -> bytes:
    """The header of a blob's entry; the bytes, their ``padding`` and at last ``END`` follow."""
    return header(f"blobs/{digest}", size)


@dataclass(frozen=True)
class Library:
    """A file that was verified from the first byte to the last."""

    path: Path
    key_id: str
    """Key that signed it."""
    designs: Sequence[Design]
    records: Sequence[KernelRecord]
    natives: Sequence[Native]
    places: Mapping[str, tuple[int, int]]
    """Position and size of every blob by digest."""

    def blob(self, digest: str) -> bytes:
        """The bytes of a blob.

        Raises:
            Corrupt: the file has changed since it was verified.
        """
        start, size = self.places[digest]
        with self.path.open("rb") as file:
            file.seek(start)
            data = file.read(size)
        if sha256(data) != digest:
            raise Corrupt(f"{self.path.name} changed while it was read", hint=AGAIN)
        return data


def read(path: Path, trust: TrustList, *, clock: Clock = SYSTEM) -> Library:
    """The library in a file, once every byte of it is vouched for by a key that is listed for libraries.

    Raises:
        InvalidInput: it is no library file, or exceeds a bound.
        Untrusted: it is not signed, or by no listed key.
        Corrupt: it was altered or ends early.
    """
    with path.open("rb") as file:
        tape = Tape(file)
        signature = _parsed(Attestation, tape.small(SIGNATURE, MAX_SIGNATURE), SIGNATURE)
        said = verify(signature, trust, "library", clock=clock).subject[0]
        data = tape.small(INDEX, MAX_INDEX)
        if said.name != SUBJECT or said.digest != {"sha256": sha256(data)}:
            raise Corrupt("the index is not the one that was signed", hint=AGAIN)
        index = _parsed(Index, data, INDEX)
        _bounded(index.entries)
        designs: list[Design] = []
        records: list[KernelRecord] = []
        natives: list[Native] = []
        places: dict[str, tuple[int, int]] = {}
        for entry in index.entries:
            folder, _, name = entry.name.partition("/")
            if folder == "blobs":
                places[name] = tape.skim(entry), entry.bytes
                continue
            paper = tape.entry(entry)
            if folder == "blueprints":
                designs.append(_named(_parsed(Design, paper, entry.name), entry))
            elif folder == "natives":
                natives.append(_named(_parsed(Native, paper, entry.name), entry))
            else:
                records.append(_named(_parsed(KernelRecord, paper, entry.name), entry))
        tape.end()
    _complete(designs, records, natives, places)
    return Library(path, signature.key_id, designs, records, natives, places)


def _parsed(model: type[_M], data: bytes, name: str) -> _M:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"][:4])
        raise InvalidInput(f"{name} is malformed: {where}: {first['msg'][:200]}", hint=AGAIN) from None


_Paper = TypeVar("_Paper", Design, KernelRecord, Native)


def _named(paper: _Paper, entry: Entry) -> _Paper:
    own = _own_id(paper)
    if entry.name.partition("/")[2] != f"{own}.json":
        raise Corrupt(f"{entry.name} holds {own}", hint=AGAIN)
    return paper


def _own_id(paper: Design | KernelRecord | Native) -> str:
    if isinstance(paper, Design):
        return paper.blueprint.id
    return paper.id if isinstance(paper, Native) else paper.manifest.kernel_id


def _bounded(entries: Sequence[Entry]) -> None:
    if len(entries) > MAX_ENTRIES:
        raise InvalidInput(f"a library file of {len(entries)} entries", hint=f"at most {MAX_ENTRIES}; export a part")
    if len({entry.name for entry in entries}) != len(entries):
        raise InvalidInput("an entry is listed twice", hint=AGAIN)
    for entry in entries:
        if not entry.name.startswith("blobs/") and entry.bytes > MAX_PAPER:
            raise InvalidInput(f"{entry.name} of {entry.bytes} bytes", hint=f"at most {MAX_PAPER}")
    total = sum(entry.bytes + len(padding(entry.bytes)) + BLOCK for entry in entries)
    if total > MAX_BUNDLE - MAX_INDEX - MAX_SIGNATURE:
        raise InvalidInput(f"a library file of {total} bytes", hint=f"at most {MAX_BUNDLE}; export a part")


def _complete(
    designs: Sequence[Design],
    records: Sequence[KernelRecord],
    natives: Sequence[Native],
    places: Mapping[str, tuple[int, int]],
) -> None:
    """Every kernel has its blueprint and its bytes, every native part its kernel and its bytes, and no bytes are nobody's."""
    blueprints = {design.blueprint.id for design in designs}
    wanted: set[str] = set()
    for record in records:
        manifest = record.manifest
        if manifest.blueprint_id not in blueprints:
            raise InvalidInput(f"{manifest.kernel_id} comes without its blueprint", hint=AGAIN)
        wanted.add(manifest.blob_sha256)
        if places.get(manifest.blob_sha256, (0, -1))[1] != manifest.blob_bytes:
            raise InvalidInput(f"{manifest.kernel_id} comes without its bytes", hint=AGAIN)
    kernels = {record.manifest.kernel_id for record in records}
    for native in natives:
        part = native.record
        wanted.add(part.blob_sha256)
        if part.kernel_id not in kernels or places.get(part.blob_sha256, (0, -1))[1] != part.blob_bytes:
            raise InvalidInput(f"{native.id} comes without its kernel or its bytes", hint=AGAIN)
    if places.keys() - wanted:
        raise InvalidInput("there are bytes in the file that no kernel has", hint=AGAIN)
