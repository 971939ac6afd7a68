"""``esperctl kernel bench`` and ``kernel retag``: what Urabrask measures, again, and what it calls kernels by now."""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from esper_core.cli.command import Invocation, command
from esper_core.cli.output import cell, console, enum_name, fields, number, plain, short, table
from esper_core.cli.resolve import kernel_of
from esper_core.errors import Conflict, DeadlineExceeded, NotFound, Unsupported
from esper_core.pb.esper.core.v1.kernel_pb2 import KernelStatus, Measurement, RejectionReason
from esper_core.pb.esper.urabrask.v1 import urabrask_pb2

if TYPE_CHECKING:
    from esper_core.cli.platform import Platform

POLL_SECONDS = 0.1
FIGURES = {
    "forward_seconds": "forward",
    "forward_seconds_p99": "forward p99",
    "backward_seconds": "forward+backward",
    "backward_seconds_p99": "forward+backward p99",
    "rows_per_second": "rows/s",
    "peak_memory_bytes": "peak memory",
    "learned": "learned",
}
"""What may differ from run to run, and what a person calls it; the rest is a property of the kernel."""


def register(app: typer.Typer) -> None:
    """Hang the commands into ``esperctl kernel``."""
    command(app, "bench")(bench)
    command(app, "retag")(retag)


async def bench(
    call: Invocation,
    kernel: Annotated[str, typer.Argument(help="The kernel's id or a prefix of it.")],
    repeat: Annotated[int, typer.Option("--repeat", "-N", min=1, max=100, help="Measure so often.")] = 5,
) -> None:
    """Have a kernel measured again and show every figure with its spread from run to run.

    Each run is a full evaluation: a kernel that fails one is withdrawn. The last run's figures stay. Exit code 9 when one
    is not over within upkeep.verdict_seconds (set by ESPER_UPKEEP__VERDICT_SECONDS at `esperctl up`); it may still end.

    Example:  esperctl kernel bench kernel-3f0c1ab2 --repeat 10
    """
    runs: list[urabrask_pb2.Evaluation] = []
    async with call.platform() as platform:
        record = await kernel_of(platform, kernel)
        with _progress() as progress:
            task = progress.add_task("measuring", total=repeat)
            for _ in range(repeat):
                runs.append(await _measured(platform, record.manifest.kernel_id))
                progress.advance(task)
    spread = {name: _spread([value for run in runs if (value := _figure(run, name)) is not None]) for name in FIGURES}
    last = runs[-1]
    document = {
        "kernel_id": last.kernel_id,
        "verdict": enum_name(KernelStatus.DESCRIPTOR, last.verdict),
        "target": last.measurement.target,
        "risk": last.risk if last.HasField("risk") else None,
        "risk_model": last.risk_model,
        "figures": spread,
        "lessons": [plain(lesson) for lesson in last.measurement.lessons],
        "runs": [plain(run.measurement) for run in runs],
    }
    call.output.document(document, _summary(last, repeat), cell(" "), _spreads(spread), *_lessons(last.measurement))


async def retag(
    call: Invocation,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would change.")] = False,
) -> None:
    """Bring the tags of all validated kernels up to date with everything that was measured by now.

    Tiers of latency, memory and parameters are thirds of the kernels measured on the same kind of machine, so they move
    as the library grows. It happens by itself; this does it now.

    Example:  esperctl kernel retag --dry-run
    """
    async with call.platform() as platform:
        answer: urabrask_pb2.RetagResponse = await platform.urabrask.Retag(
            urabrask_pb2.RetagRequest(dry_run=dry_run), timeout=300.0
        )
    rows = [
        (short(change.kernel_id), ", ".join(change.removed), ", ".join(change.added), change.target)
        for change in answer.changes
    ]
    verb = "would change" if dry_run else "changed"
    call.output.document(
        plain(answer) | {"dry_run": dry_run},
        table(("KERNEL", "*WAS", "*IS" if not dry_run else "*WOULD BE", "*ON"), rows, empty="every tag is up to date"),
        cell(f"{answer.changed} of {answer.examined} {verb}"),
    )


async def evaluation_of(platform: Platform, kernel_id: str) -> urabrask_pb2.Evaluation | None:
    """What Urabrask found; None when it never looked, or is not among the services that run."""
    try:
        answer = await platform.urabrask.GetEvaluation(urabrask_pb2.GetEvaluationRequest(kernel_id=kernel_id))
    except (NotFound, Unsupported):
        return None
    found: urabrask_pb2.Evaluation = answer.evaluation
    return found


def findings(found: urabrask_pb2.Evaluation | None) -> dict[str, Any]:
    """Risk and rejection as plain data; None where nothing is known."""
    risk = found.risk if found is not None and found.HasField("risk") else None
    fault = enum_name(RejectionReason.DESCRIPTOR, found.rejection) if found and found.HasField("rejection") else None
    return {"risk": risk, "risk_model": found.risk_model if found else "", "rejection": fault}


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    return f"{number(seconds * 1e6)} µs" if seconds < 1e-3 else f"{number(seconds * 1e3)} ms"


async def _measured(platform: Platform, kernel_id: str) -> urabrask_pb2.Evaluation:
    """One more evaluation, waited for.

    Raises:
        Conflict: it ended without a measurement.
        DeadlineExceeded: it did not end while the platform's patience lasts.
    """
    patience = platform.endpoints.upkeep.verdict_seconds
    end = time.monotonic() + patience
    await platform.urabrask.Evaluate(urabrask_pb2.EvaluateRequest(kernel_id=kernel_id))
    request = urabrask_pb2.GetEvaluationRequest(kernel_id=kernel_id)
    while True:
        found: urabrask_pb2.Evaluation = (await platform.urabrask.GetEvaluation(request)).evaluation
        if found.phase == urabrask_pb2.PHASE_DONE:
            break
        if time.monotonic() > end:
            raise DeadlineExceeded(
                f"{short(kernel_id)} is not judged after {patience:g} s: {_phase(found)}",
                hint="`esperctl status` says whether Urabrask is there; `esperctl kernel show` what it found later",
            )
        await asyncio.sleep(POLL_SECONDS)
    if found.verdict != KernelStatus.KERNEL_STATUS_VALIDATED or not found.HasField("measurement"):
        status = enum_name(KernelStatus.DESCRIPTOR, found.verdict)
        raise Conflict(f"{short(kernel_id)} is {status}: {found.reason}", hint="only what is fit is measured")
    return found


def _phase(found: urabrask_pb2.Evaluation) -> str:
    """How far it is, in words."""
    if found.phase == urabrask_pb2.PHASE_QUEUED:
        return "it waits for a judge"
    return f"it is in phase {enum_name(urabrask_pb2.Phase.DESCRIPTOR, found.phase)}"


def _figure(run: urabrask_pb2.Evaluation, name: str) -> float | None:
    measured = run.measurement
    if name == "learned":
        return statistics.fmean(lesson.explained for lesson in measured.lessons) if measured.lessons else None
    if Measurement.DESCRIPTOR.fields_by_name[name].has_presence and not measured.HasField(name):
        return None
    return float(getattr(measured, name))


def _spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Median, interquartile range and coefficient of variation; the latter two need two values."""
    if not values:
        return {"n": 0, "median": None, "iqr": None, "cv": None}
    median, mean = statistics.median(values), statistics.fmean(values)
    if len(values) < 2:
        return {"n": 1, "median": median, "iqr": None, "cv": None}
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "n": len(values),
        "median": median,
        "iqr": high - low,
        "cv": statistics.stdev(values) / abs(mean) if mean else None,
    }


def _summary(run: urabrask_pb2.Evaluation, repeat: int) -> RenderableType:
    return fields(
        [
            ("kernel", run.kernel_id), ("verdict", enum_name(KernelStatus.DESCRIPTOR, run.verdict)),
            ("tags", ", ".join(run.tags)), ("batch", run.measurement.batch),
            ("runs", f"{repeat} of {run.measurement.repetitions} repetitions"), ("measured on", run.measurement.target),
            ("risk", f"{number(run.risk)} by {run.risk_model}" if run.HasField("risk") else None),
        ]
    )  # fmt: skip


def _spreads(spread: dict[str, dict[str, float | int | None]]) -> RenderableType:
    rows = [
        (FIGURES[name], found["n"], _shown(name, found["median"]), _shown(name, found["iqr"]), _share(found["cv"]))
        for name, found in spread.items()
        if found["n"]
    ]
    return table(("FIGURE", ">RUNS", ">MEDIAN", ">IQR", ">CV"), rows, empty="nothing was measured")


def _shown(name: str, value: float | int | None) -> str | None:
    if value is None:
        return None
    if name.endswith(("_seconds", "_p99")):
        return duration(value)
    return f"{value:,.0f} bytes" if name.endswith("_bytes") else number(value)


def _share(value: float | int | None) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"


def _lessons(measured: Measurement) -> list[RenderableType]:
    if not measured.lessons:
        return []
    rows = [(lesson.name, lesson.level, lesson.explained, lesson.steps) for lesson in measured.lessons]
    return [cell(" "), table(("LESSON", ">LEVEL", ">EXPLAINED", ">STEPS"), rows, empty="")]


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console(sys.stderr), transient=True, disable=not sys.stderr.isatty())
