"""``esperctl runs``: what was trained, how it went, and what goes on now."""

from __future__ import annotations

import enum
from typing import Annotated

import typer
from rich.console import RenderableType

from esper_core.cli.command import Invocation, command, noun
from esper_core.cli.output import STYLES, cell, enum_name, enum_value, fields, moment, number, plain, table
from esper_core.cli.resolve import LATEST, run_of
from esper_core.pb.esper.core.v1.run_pb2 import EpochMetrics, Run, RunState
from esper_core.pb.esper.nissa.v1 import nissa_pb2
from esper_core.pb.esper.tolaria.v1 import tolaria_pb2

app = noun("runs", "Training runs: what was trained, how it went, what goes on now.")

RunArgument = Annotated[str, typer.Argument(metavar="[RUN]", help="A run's name or a prefix of it.", show_default=True)]


class StateName(enum.StrEnum):
    """Run states to ask for."""

    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"


def state_of(run: Run) -> str:
    """Its state's short name."""
    return enum_name(RunState.DESCRIPTOR, run.state)


def figure(metrics: EpochMetrics, name: str) -> float | None:
    """An optional figure of an epoch; nothing when it was not measured."""
    return getattr(metrics, name) if metrics.HasField(name) else None


@command(app, "list")
async def list_runs(
    call: Invocation,
    state: Annotated[StateName | None, typer.Option(help="Only runs in this state.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="At most this many.")] = 50,
) -> None:
    """List runs, newest first.

    Example:  esperctl runs list --state running
    """
    request = tolaria_pb2.ListRunsRequest(page_size=limit)
    if state is not None:
        request.state = enum_value(RunState.DESCRIPTOR, state.name)
    async with call.platform() as platform:
        answer: tolaria_pb2.ListRunsResponse = await platform.tolaria.ListRuns(request)
    rows = [
        (
            run.run_id, state_of(run), run.host, run.dataset, _progress(run),
            figure(run.latest, "validation_accuracy") if run.HasField("latest") else None,
            run.morphogenetic, len(run.slots), moment(run.started),
        )
        for run in answer.runs
    ]  # fmt: skip
    columns = ("RUN", "STATE", "HOST", "DATA", ">EPOCH", ">ACCURACY", "GROWS", ">SLOTS", "STARTED")
    call.output.document([plain(run) for run in answer.runs], table(columns, rows, empty="no runs yet"))


@command(app, "show")
async def show_run(
    call: Invocation,
    run: RunArgument = LATEST,
    history: Annotated[bool, typer.Option("--history/--no-history", help="With every epoch's figures.")] = True,
) -> None:
    """Show a run: its slots, its results, every epoch.

    Example:  esperctl runs show digits-1
    """
    epochs: list[EpochMetrics] = []
    async with call.platform() as platform:
        found = await run_of(platform, run)
        if history:
            request = nissa_pb2.GetRunHistoryRequest(run_id=found.run_id)
            answer: nissa_pb2.GetRunHistoryResponse = await platform.nissa.GetRunHistory(request)
            epochs = list(answer.epochs)
    views = [_summary(found), cell(" "), _slots(found)]
    if history:
        views += [cell(" "), _epochs(epochs)]
    document = plain(found) | ({"history": [plain(epoch) for epoch in epochs]} if history else {})
    call.output.document(document, *views)


@command(app, "watch")
async def watch_run(call: Invocation, run: RunArgument = LATEST) -> None:
    """Follow a run epoch by epoch, from its first one, until it ends.

    Example:  esperctl runs watch latest -o json | jq .latest.validation_accuracy
    """
    async with call.platform() as platform:
        found = await run_of(platform, run)
        seen = found
        async for news in platform.tolaria.WatchRun(tolaria_pb2.WatchRunRequest(run_id=found.run_id)):
            seen = news.run
            call.output.line(plain(seen), _epoch_line(seen))
    if seen.state != RunState.RUN_STATE_RUNNING:
        results = "  ".join(f"{name} {number(seen.results[name])}" for name in sorted(seen.results))
        call.output.note(f"{seen.run_id} {state_of(seen)}  {results}  {seen.reason}".rstrip())


def _progress(run: Run) -> str:
    done = run.latest.epoch + 1 if run.HasField("latest") else 0
    return f"{done}/{run.epochs}"


def _summary(run: Run) -> RenderableType:
    results = ", ".join(f"{name} {number(run.results[name])}" for name in sorted(run.results))
    return fields(
        [
            ("run", run.run_id), ("state", state_of(run)), ("reason", run.reason), ("host", run.host),
            ("data", run.dataset), ("epoch", _progress(run)), ("seed", str(run.seed)), ("grows", run.morphogenetic),
            ("started", moment(run.started)), ("last word", moment(run.updated)), ("results", results),
            ("report", run.report),
        ]
    )  # fmt: skip


def _slots(run: Run) -> RenderableType:
    rows = [
        (
            slot.slot, slot.interface.in_width, slot.interface.hidden_width, slot.interface.out_width,
            slot.interface.activation, slot.interface.foldable,
        )
        for slot in run.slots
    ]  # fmt: skip
    return table(("SLOT", ">IN", ">HIDDEN", ">OUT", "ACTIVATION", "FOLDABLE"), rows, empty="no slots: it cannot grow")


def _epochs(epochs: list[EpochMetrics]) -> RenderableType:
    columns = (">EPOCH", ">TRAIN LOSS", ">VAL LOSS", ">ACCURACY", ">LR", ">PARAMETERS", ">TRAIN S", ">BOUNDARY S")
    rows = [
        (
            epoch.epoch, epoch.train_loss, figure(epoch, "validation_loss"), figure(epoch, "validation_accuracy"),
            epoch.learning_rate, f"{epoch.parameters:,}", epoch.train_seconds, epoch.boundary_seconds,
        )
        for epoch in epochs
    ]  # fmt: skip
    return table(columns, rows, empty="no epoch is over yet")


def _epoch_line(run: Run) -> RenderableType:
    if not run.HasField("latest"):
        return f"{run.run_id}  {state_of(run)}  no epoch is over yet"
    latest = run.latest
    parts = [f"epoch {latest.epoch + 1:>4}/{run.epochs}", f"loss {number(latest.train_loss):<8}"]
    if latest.HasField("validation_loss"):
        parts.append(f"val {number(latest.validation_loss):<8}")
    if latest.HasField("validation_accuracy"):
        parts.append(f"accuracy {latest.validation_accuracy:.4f}")
    line = cell("  ".join([*parts, f"parameters {latest.parameters:,}"]))
    return line.append(f"  {state_of(run)}", STYLES.get(state_of(run), ""))
