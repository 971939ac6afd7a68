"""``esperctl library``: the whole library at once: into a signed file, out of one, and rid of what is of no use."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from esper_core.cli.command import Invocation, command, noun
from esper_core.cli.output import console, enum_name, enum_value, fields, moment, number, plain, short, table, words
from esper_core.cli.query import StatusName
from esper_core.errors import Conflict, Corrupt, InvalidInput, NotFound, Untrusted
from esper_core.pb.esper.core.v1.kernel_pb2 import KernelStatus
from esper_core.pb.esper.urza.v1 import native_pb2, urza_pb2

if TYPE_CHECKING:
    from esper_core.cli.platform import Platform
    from esper_core.kernel.bundle import Design, Native, Plan
    from esper_core.kernel.record import KernelRecord

app = noun("library", "The library of blueprints and kernels as a whole.")

KEY_FILE = "operator.key"
PAGE = 500
PARTS = 100  # kernels asked for native parts at once; the contract's bound
PIECE = 256 * 1024  # bytes; the contract's bound on a piece


@command(app, "gc")
async def gc(
    call: Invocation,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be done.")] = False,
    keep_unused: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=100_000_000,
            help="Never used kernels stay while among the newest so many.",
            show_default="as the library by itself",
        ),
    ] = None,
) -> None:
    """Forget kernels that are rejected, retired, or old and never used; delete bytes that no kernel needs.

    Blueprints stay, and a forgotten kernel leaves a note, so that what was rejected or retired cannot come back. May be
    broken off at any moment; the next one goes on. The library does it by itself, too: `esperctl library status`.

    Example:  esperctl library gc --dry-run

    Example:  esperctl library gc --keep-unused 100
    """
    request = urza_pb2.CollectGarbageRequest(dry_run=dry_run, keep_unused=keep_unused)
    last = urza_pb2.CollectGarbageResponse()
    async with call.platform() as platform:
        with _progress("forgetting") as progress:
            task = progress.add_task("", total=None)
            async for last in platform.urza.CollectGarbage(request):
                progress.update(task, total=last.doomed, completed=last.forgotten)
    would = "would be " if dry_run else ""
    pairs = [
        (f"{would}forgotten", f"{last.forgotten:,} kernels"),
        ("", f"{last.rejected:,} rejected, {last.retired:,} retired, {last.unused:,} never used"),
        (f"{would}deleted", f"{last.blobs:,} blobs, {last.bytes:,} bytes"),
        ("kept", f"{last.kept:,} kernels"),
    ]
    call.output.document(plain(last) | {"dry_run": dry_run}, fields(pairs))


@command(app, "status")
async def status(call: Invocation) -> None:
    """Tell how the collections are getting on that the library does by itself.

    How often is set at `esperctl up`: ESPER_UPKEEP__COLLECT_HOURS (6; 0 turns them off), ESPER_UPKEEP__KEEP_UNUSED (1000).

    Example:  esperctl library status
    """
    async with call.platform() as platform:
        found: urza_pb2.GetUpkeepResponse = await platform.urza.GetUpkeep(urza_pb2.GetUpkeepRequest())
    off = not found.every_seconds
    did = f"{found.forgotten:,} kernels forgotten, {found.blobs:,} blobs, {found.bytes:,} bytes deleted; {found.kept:,} kept"
    pairs = [
        ("collects", "never: it is turned off" if off else f"every {number(found.every_seconds / 3600)} h"),
        ("keeps", f"the newest {found.keep_unused:,} never used kernels"),
        ("next", f"now, by {found.holder}" if found.holder else moment(found.due)),
        ("last begun", moment(found.begun)), ("last finished", moment(found.finished)), ("it", did if found.passes else None),
        ("failed", found.reason),
    ]  # fmt: skip
    call.output.document(plain(found), fields(pairs))


@command(app, "export")
async def export(
    call: Invocation,
    file: Annotated[Path, typer.Argument(help="The file to make.", dir_okay=False)],
    blueprint: Annotated[str | None, typer.Option(help="Only of this blueprint: name, id or prefix.")] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", "-t", help="Only with this tag; repeatable.")] = None,
    interface: Annotated[str, typer.Option(help="Only for this interface id.", show_default="any")] = "",
    status: Annotated[StatusName | None, typer.Option(help="Only with this status.")] = None,
    born_of: Annotated[
        str, typer.Option(help="Only of blueprints brought by this principal.", show_default="any")
    ] = "",
    natives: Annotated[
        bool,
        typer.Option("--natives/--no-natives", help="Native parts of these kernels, too; they make the file larger."),
    ] = True,
) -> None:
    """Write blueprints and kernels, with their papers and weights, into one file signed with the operator's key.

    Without options that is the whole library; with some, the kernels they choose and the blueprints of these. Native parts
    go with the statements that their builders signed. `tar -tf` lists what is in it.

    Example:  esperctl library export library.esper

    Example:  esperctl library export mine.esper --born-of karn --status validated
    """
    from esper_core.kernel.bundle import Plan

    query = urza_pb2.QueryKernelsRequest(
        required_tags=tag or [], interface_id=interface, born_of=born_of, page_size=PAGE
    )
    if status is not None:
        query.status = enum_value(KernelStatus.DESCRIPTOR, status.name)
    async with call.platform() as platform:
        key = _key(platform.endpoints.keys_dir / KEY_FILE)
        if blueprint is not None:
            named = await platform.urza.GetBlueprint(urza_pb2.GetBlueprintRequest(blueprint_id=blueprint))
            query.blueprint_id = named.blueprint_id
        narrowed = bool(query.required_tags or interface or born_of or query.status or query.blueprint_id)
        records = [record async for record in _records(platform, query)]
        wanted = {record.manifest.blueprint_id for record in records} | {query.blueprint_id}
        designs = [one async for one in _designs(platform) if not narrowed or one.blueprint.id in wanted]
        parts = await _natives(platform, [record.manifest.kernel_id for record in records]) if natives else []
        plan = Plan(designs, records, parts)
        with _progress("fetching") as progress:
            size = await _write(platform, plan, key, file, progress)
    document: dict[str, Any] = {
        "file": str(file),
        "blueprints": len(designs),
        "kernels": len(records),
        "natives": len(parts),
        "bytes": size,
    }
    call.output.document(document, fields(document.items()))


@command(app, "import")
async def import_library(
    call: Invocation,
    file: Annotated[Path, typer.Argument(help="A file that `library export` made.", dir_okay=False)],
) -> None:
    """Take in a library file. Everything in it is verified before anything is kept; may be repeated.

    Who signed it must be on this platform's trust list (keys/trust.json) with role "library". A kernel keeps its verdict
    only when keys on that list signed its build and its validation; without a trusted validation it comes in as COMPILED
    and is measured again here, without a trusted build it is left out, and so is a native part. What is left out is listed
    with the reason; then the exit code is 11, or 5 when it was left out only because it was forgotten here for good.

    Example:  esperctl library import library.esper
    """
    if not os.access(file, os.R_OK):
        raise NotFound(f"no readable file {file}", hint="`esperctl library export` makes one")
    noted: list[urza_pb2.ImportedKernel] = []
    parts: list[urza_pb2.ImportedNative] = []
    summary = urza_pb2.ImportSummary()
    async with call.platform() as platform:
        with _progress("taking in") as progress:
            task = progress.add_task("", total=None)
            async for told in platform.urza.ImportLibrary(_pieces(file)):
                progress.update(task, total=told.total, completed=told.finished)
                if told.kernel.note and (told.kernel.created or not told.kernel.status):
                    noted.append(told.kernel)
                if told.native.note:
                    parts.append(told.native)
                if told.HasField("summary"):
                    summary = told.summary
    document = plain(summary) | {"noted": [plain(one) | {"status": _became(one)} for one in noted]}
    call.output.document(document | {"noted_natives": [plain(one) for one in parts]}, *_taken_in(summary, noted, parts))
    _complain(summary)


def _taken_in(
    summary: urza_pb2.ImportSummary, noted: list[urza_pb2.ImportedKernel], parts: list[urza_pb2.ImportedNative]
) -> list[RenderableType]:
    """What a person reads of an import: the sum, what is not as it was exported, and what can be done about that."""
    pairs = [
        ("signed by", f"key {summary.key_id}"),
        ("new", f"{summary.blueprints:,} blueprints, {summary.kernels:,} kernels, {summary.natives:,} native parts"),
        ("known", f"{summary.known:,} were there already"),
        ("to be measured", f"{summary.unmeasured:,} kernels, by this platform's Urabrask" if summary.unmeasured else None),
        ("left out", _left_out(summary)),
    ]  # fmt: skip
    rows: list[tuple[str | None, ...]] = [
        (short(one.kernel_id), one.blueprint_name, None, _became(one), one.note) for one in noted
    ]
    rows += [(short(one.kernel_id), one.blueprint_name, one.target, None, one.note) for one in parts]
    views: list[RenderableType] = [fields(pairs)]
    if rows:
        views += [words(" "), table(("KERNEL", "NAME", "NATIVE FOR", "NOW", "*WHY"), rows, empty="")]
    hints = dict.fromkeys([one.hint for one in noted if one.hint] + [one.hint for one in parts if one.hint])
    return views + [words("hint: ", hint) for hint in hints]


def _left_out(summary: urza_pb2.ImportSummary) -> str:
    """How many, in words; empty when nothing was."""
    counts = ((summary.left_out, "kernels"), (summary.natives_left_out, "native parts"))
    return ", ".join(f"{count:,} {what}" for count, what in counts if count)


def _complain(summary: urza_pb2.ImportSummary) -> None:
    """Raises: Untrusted, Conflict: something was left out."""
    if summary.untrusted:
        hint = "each is named above with its reason; keys/trust.json says whose statements count here"
        raise Untrusted(
            f"left out: {_left_out(summary)}; no trusted key speaks for {summary.untrusted:,} of them", hint=hint
        )
    if left_out := _left_out(summary):
        raise Conflict(f"left out: {left_out}; they were forgotten here for good", hint="export without them")


def _became(one: urza_pb2.ImportedKernel) -> str | None:
    return enum_name(KernelStatus.DESCRIPTOR, one.status) if one.status else None


async def _records(platform: Platform, query: urza_pb2.QueryKernelsRequest) -> AsyncIterator[KernelRecord]:
    from esper_core.kernel.record import KernelRecord
    from esper_core.rpc.convert import from_proto

    while True:
        page: urza_pb2.QueryKernelsResponse = await platform.urza.QueryKernels(query)
        for record in page.kernels:
            yield from_proto(record, KernelRecord)
        if not page.next_page_token:
            return
        query.page_token = page.next_page_token


async def _designs(platform: Platform) -> AsyncIterator[Design]:
    from esper_core.blueprint.ir import BlueprintIR
    from esper_core.kernel.bundle import Design
    from esper_core.rpc.convert import from_proto

    request = urza_pb2.ListBlueprintsRequest(page_size=PAGE)
    while True:
        page: urza_pb2.ListBlueprintsResponse = await platform.urza.ListBlueprints(request)
        for one in page.blueprints:
            yield Design(blueprint=from_proto(one.blueprint, BlueprintIR), created_by=one.created_by)
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token


async def _natives(platform: Platform, kernel_ids: list[str]) -> list[Native]:
    from esper_core.kernel.bundle import Native
    from esper_core.kernel.native import NativeRecord
    from esper_core.kernel.sign import Attestation
    from esper_core.rpc.convert import from_proto

    found: list[Native] = []
    for start in range(0, len(kernel_ids), PARTS):
        request = native_pb2.ListNativesRequest(kernel_ids=kernel_ids[start : start + PARTS])
        answer: native_pb2.ListNativesResponse = await platform.urza.ListNatives(request)
        found += [
            Native(record=from_proto(one.record, NativeRecord), attestation=from_proto(one.attestation, Attestation))
            for one in answer.natives
        ]
    return found


def _bytes_of(platform: Platform, source: KernelRecord | Native) -> AsyncIterator[bytes]:
    from esper_core.cli.download import chunks, native_chunks
    from esper_core.kernel.bundle import Native

    if isinstance(source, Native):
        return native_chunks(platform, source.record)
    return chunks(platform, source.manifest.kernel_id)


async def _write(platform: Platform, plan: Plan, key: bytes, file: Path, progress: Progress) -> int:
    """Write the file beside its place and move it there when it is whole; its size.

    Raises:
        InvalidInput: the place cannot be written.
        Corrupt: what the library sends is not what its manifests promise.
    """
    from esper_core.kernel.bundle import blob_header
    from esper_core.kernel.tape import END, padding

    task = progress.add_task("", total=len(plan.blobs))
    part, written = None, 0
    try:
        with tempfile.NamedTemporaryFile("wb", dir=file.parent, prefix=f".{file.name}.", delete=False) as out:
            part = Path(out.name)
            for piece in plan.head(key):
                written += out.write(piece)
            for digest, size in plan.blobs.items():
                written += out.write(blob_header(digest, size))
                came = hashlib.sha256()
                async for data in _bytes_of(platform, plan.source[digest]):
                    written += out.write(data)
                    came.update(data)
                if came.hexdigest() != digest:
                    raise Corrupt(f"blob {digest} came damaged", hint="export again")
                written += out.write(padding(size))
                progress.advance(task)
            written += out.write(END)
            out.flush()
            os.fsync(out.fileno())
        part.chmod(0o644)
        os.replace(part, file)
        return written
    except OSError as error:
        raise InvalidInput(f"{file} cannot be written: {error.strerror}", hint="choose another place") from None
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


async def _pieces(file: Path) -> AsyncIterator[urza_pb2.ImportLibraryRequest]:
    with file.open("rb") as source:
        while data := source.read(PIECE):
            yield urza_pb2.ImportLibraryRequest(chunk=data)


def _key(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f"no key at {path}", hint="`esperctl up` makes one; it signs what you export") from None


def _progress(what: str) -> Progress:
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, console=console(sys.stderr), transient=True, disable=not sys.stderr.isatty())
