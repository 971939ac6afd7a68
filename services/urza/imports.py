"""Taking in a library file: nothing is written before all of it has been verified, and nobody's authority is borrowed.

The operator's signature brings the file in; it does not speak for the kernels. Each keeps only what statements by keys
on this platform's own trust list say of it: its build by a forge, its verdict by an evaluator, with the measurement and
the tags that stand in the signed statement and not those beside it. A kernel without such a verdict comes in as COMPILED
and is put before Urabrask in the same transaction; one whose forge is not trusted here could never run and is left out.
So is a native part whose builder is not, and one of a kernel that was left out. Whatever is left out is told by name.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from esper_core import log
from esper_core.blueprint.analyse import analyse
from esper_core.bus import subjects
from esper_core.bus.database import Connection, Pool
from esper_core.bus.envelope import wrap
from esper_core.bus.outbox import enqueue
from esper_core.errors import InvalidInput, NotFound, Unavailable, Untrusted
from esper_core.kernel import bundle
from esper_core.kernel.manifest import KernelManifest
from esper_core.kernel.native import verify_native
from esper_core.kernel.record import KernelRecord, KernelStatus, Measurement
from esper_core.kernel.sign import Attestation
from esper_core.kernel.trust import TrustList, verify_statement
from esper_core.pb.esper.bus.v1 import bus_pb2
from services.urza.blueprints import Blueprints
from services.urza.library import Library
from services.urza.native import Natives
from services.urza.records import attest
from services.urza.verdicts import Verdict, move

PRODUCER = "urza"
_LOG = log.get(PRODUCER)


@dataclass(frozen=True)
class Fate:
    """What is to become of one kernel in a file.

    Attributes:
        record: the kernel as the file has it.
        build: the trusted build statement; None: it is left out.
        verdicts: status changes to make after it has been stored, each with what stands behind it.
        note: why it is not as it was exported; empty when it is.
        hint: what to do when it is left out.
    """

    record: KernelRecord
    build: Attestation | None
    verdicts: tuple[Verdict, ...] = ()
    note: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Summary:
    """What an import has brought so far."""

    key_id: str = ""
    blueprints: int = 0
    kernels: int = 0
    unmeasured: int = 0
    known: int = 0
    left_out: int = 0
    natives: int = 0
    natives_left_out: int = 0
    untrusted: int = 0
    """Of those left out, such as no listed key speaks for."""


@dataclass(frozen=True)
class Told:
    """How far an import is; with ``record``, what became of that kernel, with ``native`` as well, of that native part."""

    total: int
    finished: int
    summary: Summary
    record: KernelRecord | None = None
    native: bundle.Native | None = None
    status: KernelStatus | None = None
    """The kernel's in this library now; None when it, or the native part, was left out."""
    created: bool = False
    note: str = ""
    hint: str = ""
    done: bool = False


class Imports:
    """The gate for library files.

    Args:
        database: where the rows are.
        blueprints: the shelf of blueprints.
        library: the shelf of kernels.
        natives: the shelf of native parts.
        trust: path of the list of keys whose statements count.
    """

    def __init__(self, database: Pool, blueprints: Blueprints, library: Library, natives: Natives, trust: Path) -> None:
        self._database, self._blueprints, self._library = database, blueprints, library
        self._natives, self._trust = natives, trust

    async def take(self, pieces: AsyncIterator[bytes], principal: str) -> AsyncIterator[Told]:
        """Verify what ``pieces`` add up to, then keep it; yields after every blueprint, kernel and native part.

        Raises:
            InvalidInput: it is no library file, exceeds a bound, or claims figures that are not its blueprints'.
            Untrusted: it is not signed, or by no listed key.
            Corrupt: it was altered or ends early.
            Unavailable: there is no room for it, or the blob store is away; what was kept stays.
        """
        with tempfile.NamedTemporaryFile(prefix="esper-library-") as file:
            await _spool(pieces, file)
            trust = await asyncio.to_thread(TrustList.load, self._trust)
            library = await asyncio.to_thread(bundle.read, Path(file.name), trust)
            fates = await asyncio.to_thread(lambda: [fate(record, trust) for record in library.records])
            async for told in self._keep(library, fates, trust, principal):
                yield told

    async def _keep(
        self, library: bundle.Library, fates: list[Fate], trust: TrustList, principal: str
    ) -> AsyncIterator[Told]:
        sums = Summary(key_id=library.key_id)
        told = Told(len(library.designs) + len(fates) + len(library.natives), 0, sums)
        for design in library.designs:
            if await self._blueprints.put(design.blueprint, design.created_by):
                sums = replace(sums, blueprints=sums.blueprints + 1)
            else:
                sums = replace(sums, known=sums.known + 1)
            told = replace(told, finished=told.finished + 1, summary=sums)
            yield told
        for one in fates:
            told = await self._kept(library, one, replace(told, finished=told.finished + 1), principal)
            yield told
        stored = {one.record.manifest.kernel_id: one.record for one in fates}
        for native in library.natives:
            told = replace(told, finished=told.finished + 1, record=stored[native.record.kernel_id], native=native)
            told = await self._kept_native(library, native, trust, told, principal)
            yield told
        sums = told.summary
        _LOG.info(
            "urza.imported", key_id=sums.key_id, kernels=sums.kernels, left_out=sums.left_out, natives=sums.natives
        )
        yield replace(told, record=None, native=None, done=True)

    async def _kept(self, library: bundle.Library, one: Fate, told: Told, principal: str) -> Told:
        sums, manifest = told.summary, one.record.manifest
        buried = await self._library.buried(manifest.kernel_id)
        if one.build is None or buried:
            sums = replace(sums, left_out=sums.left_out + 1, untrusted=sums.untrusted + (not buried))
            note, hint = (buried, "") if buried else (one.note, one.hint)
            return replace(told, record=one.record, status=None, created=False, note=note, hint=hint, summary=sums)
        blob = await asyncio.to_thread(library.blob, manifest.blob_sha256)
        created = await self._library.put(manifest, one.build, blob, principal, partial(_settle, one))
        now = (await self._library.get(manifest.kernel_id)).record.status
        if created:
            sums = replace(sums, kernels=sums.kernels + 1, unmeasured=sums.unmeasured + (not one.verdicts))
        else:
            sums = replace(sums, known=sums.known + 1)
        note = one.note if created else "it was there already and stays as it is"
        return replace(told, record=one.record, status=now, created=created, note=note, hint="", summary=sums)

    async def _kept_native(
        self, library: bundle.Library, native: bundle.Native, trust: TrustList, told: Told, principal: str
    ) -> Told:
        record, sums = native.record, told.summary
        without = replace(sums, natives_left_out=sums.natives_left_out + 1)
        out = replace(told, status=None, created=False, summary=without)
        try:
            verify_native(record, native.attestation, trust)
        except Untrusted as error:
            sums = replace(without, untrusted=without.untrusted + 1)
            hint = _hint(native.attestation, trust, error)
            return replace(out, note=f"left out: {error.message}", hint=hint, summary=sums)
        blob = await asyncio.to_thread(library.blob, record.blob_sha256)
        try:
            created = await self._natives.put(record, native.attestation, blob, principal)
        except NotFound:
            return replace(out, note="left out: its kernel is not in this library", hint="")
        now = (await self._library.get(record.kernel_id)).record.status
        sums = replace(sums, natives=sums.natives + created, known=sums.known + (not created))
        return replace(told, status=now, created=created, note="", hint="", summary=sums)


def fate(record: KernelRecord, trust: TrustList) -> Fate:
    """What is to become of a kernel, by the statements that count here.

    Raises:
        InvalidInput: the manifest's figures are not what its blueprint gives at its interface.
    """
    manifest = record.manifest
    analysis = analyse(manifest.blueprint, manifest.interface, manifest.symbols)
    if (manifest.parameters, manifest.flops) != (analysis.parameters, analysis.flops):
        raise InvalidInput(f"{manifest.kernel_id}: the manifest's figures are not those of its blueprint")
    if not record.attestations:
        return Fate(record, None, note="left out: it has no build statement")
    build, *others = record.attestations
    try:
        verify_statement(manifest, build, trust, "build")
    except Untrusted as error:
        note = f"left out: {error.message}; have its blueprint built here"
        return Fate(record, None, note=note, hint=_hint(build, trust, error))
    try:
        verdict = _verdict(manifest, others, trust)
    except Untrusted as error:
        return Fate(record, build, note=f"to be measured again: {error.message}")
    verdicts = [verdict]
    if record.status is KernelStatus.RETIRED and verdict.status is KernelStatus.VALIDATED:
        verdicts.append(Verdict(KernelStatus.RETIRED, record.reason))
    return Fate(record, build, tuple(verdicts))


def _hint(attestation: Attestation, trust: TrustList, error: Untrusted) -> str:
    """What would have to be done for a build statement to count here."""
    if any(key.key_id == attestation.key_id for key in trust.keys):
        return error.hint
    return (
        f"if you trust that forge, copy the entry of key {attestation.key_id} (role build) from its platform's "
        "keys/trust.json into this one's and import again"
    )


def _verdict(manifest: KernelManifest, statements: list[Attestation], trust: TrustList) -> Verdict:
    """The verdict in the signed statement.

    Raises:
        Untrusted: there is none that counts and is complete.
    """
    if len(statements) != 1:
        raise Untrusted(f"it carries {len(statements)} verdicts")
    said = verify_statement(manifest, statements[0], trust, "validation").predicate
    word, figures, tags = said.get("verdict"), said.get("measurement"), said.get("tags", ())
    if word not in (KernelStatus.VALIDATED.name, KernelStatus.REJECTED.name):
        raise Untrusted("its statement carries no verdict")
    if not isinstance(tags, (list, tuple)) or not all(isinstance(tag, str) for tag in tags):
        raise Untrusted("its statement's tags are none")
    try:
        measured = None if figures is None else Measurement.model_validate(figures)
    except ValidationError:
        raise Untrusted("its statement's measurement is none that this build can read") from None
    if measured is None and word == KernelStatus.VALIDATED.name:
        raise Untrusted("its statement carries no measurement")
    return Verdict(KernelStatus[str(word)], str(said.get("reason", ""))[:500], tuple(tags), measured, statements[0])


async def _settle(one: Fate, connection: Connection) -> None:
    """In the transaction that stores a kernel: give it its verdict, or put it before the judge."""
    manifest = one.record.manifest
    if not one.verdicts:
        ready = bus_pb2.KernelReady(
            kernel_id=manifest.kernel_id, interface_id=manifest.interface_id, blueprint_name=manifest.blueprint.name
        )
        await enqueue(connection, subjects.KERNEL_READY.of(), wrap(ready, producer=PRODUCER))
        return
    now = KernelRecord(manifest=manifest)
    for revision, verdict in enumerate(one.verdicts):
        await move(connection, now, verdict, revision)
        if verdict.attestation is not None:
            await attest(connection, manifest.kernel_id, "validation", verdict.attestation)
        now = now.model_copy(update={"status": verdict.status, "measurement": verdict.measurement or now.measurement})


async def _spool(pieces: AsyncIterator[bytes], file: IO[bytes]) -> None:
    size = 0
    async for piece in pieces:
        size += len(piece)
        if size > bundle.MAX_BUNDLE:
            raise InvalidInput(f"more than {bundle.MAX_BUNDLE} bytes", hint="export a part of the library")
        try:
            await asyncio.to_thread(file.write, piece)
        except OSError as error:
            raise Unavailable(f"there is no room for the file: {error.strerror}", hint="free some space") from None
    await asyncio.to_thread(file.flush)
