"""``esperctl forge``: who compiles kernels, what waits for them, and what they have done."""

from __future__ import annotations

from rich.console import RenderableType

from esper_core.cli.command import Invocation, command, noun
from esper_core.cli.output import cell, fields, number, plain, short, table
from esper_core.pb.esper.tezzeret.v1 import tezzeret_pb2

app = noun("forge", "The forge: who compiles kernels, and how it goes.")


@command(app, "status")
async def status(call: Invocation) -> None:
    """Show the forges alive, the queue, what is built right now and for how long, and what each pipeline has done.

    One more forge on this machine:  python -m services.tezzeret

    Example:  esperctl forge status

    Example:  esperctl forge status -o json
    """
    async with call.platform() as platform:
        answer: tezzeret_pb2.GetForgeStatusResponse = await platform.tezzeret.GetForgeStatus(
            tezzeret_pb2.GetForgeStatusRequest()
        )
    views: list[RenderableType] = [_queue(answer), cell(" "), _forges(answer)]
    if answer.running:
        views += [cell(" "), _running(answer)]
    if answer.pipelines:
        views += [cell(" "), _pipelines(answer)]
    call.output.document(plain(answer), *views)


def _queue(answer: tezzeret_pb2.GetForgeStatusResponse) -> RenderableType:
    waiting = f"{answer.queued:,}" + (f" ({answer.postponed:,} for their surroundings)" if answer.postponed else "")
    stranded = (
        f"{answer.stranded:,} builds are for machines or toolchains of no living forge" if answer.stranded else ""
    )
    alive = sum(forge.alive for forge in answer.forges)
    pairs = [("forges alive", alive), ("queued", waiting), ("stranded", stranded), ("running", len(answer.running))]
    return fields([*pairs, ("done", f"{answer.done:,}"), ("failed", f"{answer.failed:,}")])


def _forges(answer: tezzeret_pb2.GetForgeStatusResponse) -> RenderableType:
    rows = [
        (
            short(forge.forge), "yes" if forge.alive else "no", f"{forge.host}:{forge.pid}", _seconds(forge.up_seconds),
            _seconds(forge.silent_seconds), f"{forge.done:,}", f"{forge.failed:,}", forge.target, forge.toolchain,
        )
        for forge in answer.forges
    ]  # fmt: skip
    columns = ("FORGE", "ALIVE", "WHERE", ">UP", ">SILENT", ">DONE", ">FAILED", "*TARGET", "*TOOLCHAIN")
    return table(columns, rows, empty="no forge was heard of lately")


def _running(answer: tezzeret_pb2.GetForgeStatusResponse) -> RenderableType:
    rows = [
        (
            short(build.build_id), build.blueprint_name, build.pipeline, short(build.forge),
            _seconds(build.age_seconds), "lapsed" if build.lapsed else None,
        )
        for build in answer.running
    ]  # fmt: skip
    return table(("RUNNING", "BLUEPRINT", "PIPELINE", "FORGE", ">FOR", "LEASE"), rows, empty="nothing is built")


def _pipelines(answer: tezzeret_pb2.GetForgeStatusResponse) -> RenderableType:
    rows = [
        (
            found.pipeline, f"{found.done:,}", f"{found.failed:,}", _seconds(found.median_seconds),
            f"{found.shipped:,} of {found.compiled:,}" if found.compiled else None,
            number(found.median_native_ratio) if found.compiled else None,
        )
        for found in answer.pipelines
    ]  # fmt: skip
    columns = ("PIPELINE", ">DONE", ">FAILED", ">MEDIAN", ">NATIVE SHIPPED", ">NATIVE/EAGER")
    return table(columns, rows, empty="nothing was built yet")


def _seconds(value: float) -> str:
    return f"{number(value)} s"
