"""``esperctl kernel``: kernels in the library, on this disk, and in a run's slots."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

from esper_core.cli import query
from esper_core.cli.command import Invocation, command, noun
from esper_core.cli.evaluation import duration, evaluation_of, findings
from esper_core.cli.output import cell, console, enum_name, fields, number, plain, short, table
from esper_core.cli.query import StatusName, narrow
from esper_core.cli.resolve import LATEST, content_id, kernel_of, run_of, slot_of
from esper_core.cli.seed import ordered
from esper_core.ids import new_id
from esper_core.pb.esper.core.v1.kernel_pb2 import KernelManifest, KernelRecord, KernelStatus, Measurement
from esper_core.pb.esper.kasmina.v1 import kasmina_pb2
from esper_core.pb.esper.urza.v1 import urza_pb2

app = noun("kernel", "Kernels: blueprints built for a slot, measured and signed.")
query.register(app)

KernelArgument = Annotated[str, typer.Argument(help="The kernel's id or a prefix of it.")]
RunOption = Annotated[str, typer.Option("--run", "-r", help="The run: a name, a prefix, or latest.")]
SlotOption = Annotated[str | None, typer.Option("--slot", "-s", help="Only those that fit this slot of the run.")]


@command(app, "list")
async def list_kernels(
    call: Invocation,
    slot: SlotOption = None,
    run: RunOption = LATEST,
    status: Annotated[StatusName | None, typer.Option(help="Only with this status.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Only with this tag; may be repeated.")] = None,
    blueprint: Annotated[str | None, typer.Option(help="Only of this blueprint: name, id or prefix.")] = None,
    max_parameters: Annotated[int, typer.Option(min=0, help="At most this many.", show_default="any")] = 0,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="At most this many.")] = 100,
) -> None:
    """List kernels, fewest parameters first.

    Example:  esperctl kernel list --slot fc1:fc2 --status validated
    """
    request = urza_pb2.QueryKernelsRequest(required_tags=tag or [], max_parameters=max_parameters, page_size=limit)
    async with call.platform() as platform:
        await narrow(platform, request, status, slot, run, blueprint)
        answer: urza_pb2.QueryKernelsResponse = await platform.urza.QueryKernels(request)
    rows = [
        (
            short(record.manifest.kernel_id), _status(record), record.manifest.blueprint.name,
            _symbols(record), f"{record.manifest.parameters:,}", f"{record.manifest.flops:,}", _latency(record),
            ", ".join(record.tags), record.reason if record.status == KernelStatus.KERNEL_STATUS_REJECTED else None,
        )
        for record in answer.kernels
    ]  # fmt: skip
    columns = ("KERNEL", "STATUS", "BLUEPRINT", "SYMBOLS", ">PARAMETERS", ">FLOPS", ">FORWARD", "*TAGS", "*WHY")
    call.output.document([plain(record) for record in answer.kernels], table(columns, rows, empty="no kernels"))


@command(app, "show")
async def show_kernel(call: Invocation, kernel: KernelArgument) -> None:
    """Show a kernel: what it is, what was measured, who signed it.

    Example:  esperctl kernel show kernel-3f0c1ab2
    """
    async with call.platform() as platform:
        request = urza_pb2.GetKernelRequest(kernel_id=content_id("kernel", kernel))
        answer: urza_pb2.GetKernelResponse = await platform.urza.GetKernel(request)
        found = findings(await evaluation_of(platform, answer.kernel.manifest.kernel_id))
    record = answer.kernel
    views = [_summary(record), *([fields(_found(found))] if any(found.values()) else [])]
    if record.HasField("measurement"):
        views += [cell(" "), _measurement(record)]
    views += [cell(" "), _usage(answer.usage)]
    call.output.document(plain(record) | found | {"usage": plain(answer.usage)}, *views)


@command(app, "pull")
async def pull(
    call: Invocation,
    kernel: KernelArgument,
    to: Annotated[Path, typer.Option(help="The folder to put it into.", file_okay=False)] = Path(),
) -> None:
    """Fetch a kernel's weights and record; goes on where a broken pull stopped.

    Makes <id>.safetensors and <id>.json. Check them with `esperctl kernel verify <id>.safetensors`.

    Example:  esperctl kernel pull kernel-3f0c1ab2 --to kernels
    """
    from esper_core.cli.download import download, record_path, unwritable

    async with call.platform() as platform:
        record = await kernel_of(platform, kernel)
        try:
            to.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(to, error) from None
        blob = to / f"{record.manifest.kernel_id}.safetensors"
        with _progress() as progress:
            task = progress.add_task("", total=record.manifest.blob_bytes)
            fetched = await download(platform, record, blob, lambda had: progress.update(task, completed=had))
    document = {"kernel_id": record.manifest.kernel_id, "blob": str(blob), "record": str(record_path(blob))}
    pairs = [("kernel", document["kernel_id"]), ("weights", document["blob"]), ("record", document["record"])]
    call.output.document(document | {"bytes": record.manifest.blob_bytes, "fetched": fetched}, fields(pairs))


@command(app, "verify")
async def verify(
    call: Invocation,
    kernel: Annotated[str, typer.Argument(metavar="KERNEL|FILE", help="An id or a prefix, or a pulled .safetensors.")],
) -> None:
    """Check a kernel's digest and both signatures against this platform's trusted keys.

    Passes when the build and the validation are signed by different listed keys, each for this very kernel, and the
    weights match. Exit code 10: damaged; 11: not trusted.

    Example:  esperctl kernel verify kernel-3f0c1ab2
    """
    from esper_core.cli.download import chunks, read_local
    from esper_core.cli.verify import verified

    path = Path(kernel)
    if path.suffix == ".safetensors":
        from esper_core.config import read_endpoints

        record, blob = read_local(path)
        keys = read_endpoints(call.data_dir).keys_dir
    else:
        async with call.platform() as platform:
            record = await kernel_of(platform, kernel)
            blob = b"".join([data async for data in chunks(platform, record.manifest.kernel_id)])
            keys = platform.endpoints.keys_dir
    proof = verified(record, blob, keys)
    pairs = [("kernel", proof.kernel_id), ("weights", f"{len(blob):,} bytes, sha256 {proof.blob_sha256[:16]}…")]
    signed = [(f"{role} signed", f"by key {key}") for role, key in proof.signers.items()]
    call.output.document(proof.document(), fields([("verified", True), *pairs, *signed]))


@command(app, "load")
async def load(
    call: Invocation,
    kernel: KernelArgument,
    slot: Annotated[str, typer.Argument(help="The slot, e.g. fc1:fc2, or a prefix of it.")],
    run: RunOption = LATEST,
) -> None:
    """Order a kernel into a slot at the run's next epoch boundary; the same as `seed germinate`.

    Example:  esperctl kernel load kernel-3f0c1ab2 fc1:fc2
    """
    async with call.platform() as platform:
        found = await run_of(platform, run)
        record = await kernel_of(platform, kernel)
        request = kasmina_pb2.LoadKernelRequest(
            command_id=new_id(),
            run_id=found.run_id,
            slot=slot_of(found, slot),
            kernel_id=record.manifest.kernel_id,
        )
        answer: kasmina_pb2.LoadKernelResponse = await platform.kasmina.LoadKernel(request)
    ordered(call, answer.command)


@command(app, "unload")
async def unload(
    call: Invocation,
    slot: Annotated[str, typer.Argument(help="The slot, e.g. fc1:fc2, or a prefix of it.")],
    run: RunOption = LATEST,
) -> None:
    """Order a slot's kernel out at the run's next epoch boundary; the same as `seed transition SLOT culled`.

    Example:  esperctl kernel unload fc1:fc2
    """
    async with call.platform() as platform:
        found = await run_of(platform, run)
        request = kasmina_pb2.UnloadKernelRequest(command_id=new_id(), run_id=found.run_id, slot=slot_of(found, slot))
        answer: kasmina_pb2.UnloadKernelResponse = await platform.kasmina.UnloadKernel(request)
    ordered(call, answer.command)


def _progress() -> Progress:
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=console(sys.stderr), transient=True, disable=not sys.stderr.isatty())


def _status(record: KernelRecord) -> str:
    return enum_name(KernelStatus.DESCRIPTOR, record.status)


def _symbols(record: KernelRecord) -> str:
    symbols = record.manifest.symbols
    return ", ".join(f"{name}={symbols[name]}" for name in sorted(symbols))


def _latency(record: KernelRecord) -> str | None:
    return duration(record.measurement.forward_seconds) if record.HasField("measurement") else None


def _summary(record: KernelRecord) -> RenderableType:
    manifest = record.manifest
    interface = manifest.interface
    return fields(
        [
            ("kernel", manifest.kernel_id), ("status", _status(record)), ("why", record.reason),
            ("tags", ", ".join(record.tags)), ("blueprint", f"{manifest.blueprint.name} ({manifest.blueprint_id})"),
            ("born of", record.born_of), ("symbols", _symbols(record)),
            ("interface", f"{interface.in_width} → {interface.hidden_width} → {interface.out_width}"),
            ("interface id", record.interface_id), ("pipeline", manifest.pipeline),
            ("parameters", f"{manifest.parameters:,}"), ("flops", f"{manifest.flops:,}"),
            ("weights", f"{manifest.blob_bytes:,} bytes, sha256 {manifest.blob_sha256}"),
            ("built by", f"{manifest.provenance.compiler} in {number(manifest.provenance.build_seconds)} s"),
            ("parity", f"{number(manifest.provenance.parity_max_abs_diff)} largest difference"),
            ("compiled", _compiled(manifest)),
            ("signed by", ", ".join(f"key {statement.key_id}" for statement in record.attestations)),
        ]
    )  # fmt: skip


def _compiled(manifest: KernelManifest) -> str | None:
    """What came of compiling it; None where nobody tried."""
    if not manifest.provenance.HasField("native"):
        return None
    native = manifest.provenance.native
    if not native.shipped:
        return f"no: {native.reason}"
    return f"a step of {native.rows} rows takes {number(native.step_ratio)} of an eager one"


def _found(found: dict[str, Any]) -> list[tuple[str, Any]]:
    risk = None if found["risk"] is None else f"{number(found['risk'])} by {found['risk_model']}"
    return [("risk", risk), ("fault", found["rejection"])]


def _measurement(record: KernelRecord) -> RenderableType:
    measured = record.measurement
    return fields(
        [
            ("batch", measured.batch), ("forward", duration(measured.forward_seconds)),
            ("forward p99", duration(measured.forward_seconds_p99)),
            ("forward+backward", duration(measured.backward_seconds)),
            ("forward+backward p99", _known(measured, "backward_seconds_p99", duration)),
            ("rows/s", _known(measured, "rows_per_second", number)),
            ("peak memory", f"{measured.peak_memory_bytes:,} bytes"), ("drift", measured.precision_drift),
            ("counted flops", _known(measured, "counted_flops", "{:,}".format)),
            ("gradient norm", measured.gradient_norm),
            ("at the input", _known(measured, "input_gradient_norm", number)),
            ("first/last layer", _known(measured, "gradient_ratio", number)),
            ("deterministic", measured.deterministic),
            ("repetitions", measured.repetitions), ("measured on", measured.target),
        ]
    )  # fmt: skip


def _usage(usage: urza_pb2.KernelUsage) -> RenderableType:
    grafts = f"{usage.tried:,}: {usage.fossilized:,} kept, {usage.culled:,} culled, {usage.rolled_back:,} rolled back"
    contribution = f"{number(usage.contribution)} in loss, on average" if usage.HasField("contribution") else None
    return fields(
        [
            ("fetched by runs", f"{usage.streams:,}"), ("grafts", grafts), ("contribution", contribution),
            ("interest", usage.interest),
        ]
    )  # fmt: skip


def _known(measured: Measurement, name: str, show: Callable[[Any], str]) -> str | None:
    return show(getattr(measured, name)) if measured.HasField(name) else None
