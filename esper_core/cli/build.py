"""``esperctl build``: how wishes for kernels are getting on in the forge."""

from __future__ import annotations

import enum
from typing import Annotated

import typer

from esper_core.cli.command import Invocation, command, noun
from esper_core.cli.output import enum_name, enum_value, plain, short, table
from esper_core.pb.esper.tezzeret.v1 import tezzeret_pb2

app = noun("build", "Builds: how wishes for kernels are getting on.")


class StateName(enum.StrEnum):
    """Build states to ask for."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@command(app, "list")
async def list_builds(
    call: Invocation,
    state: Annotated[StateName | None, typer.Option(help="Only builds in this state.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="At most this many.")] = 50,
) -> None:
    """List builds, newest first; failed ones with the reason.

    Example:  esperctl build list --state failed
    """
    request = tezzeret_pb2.ListBuildsRequest(page_size=limit)
    if state is not None:
        request.state = enum_value(tezzeret_pb2.BuildState.DESCRIPTOR, state.name)
    async with call.platform() as platform:
        answer: tezzeret_pb2.ListBuildsResponse = await platform.tezzeret.ListBuilds(request)
    rows = [
        (
            short(build.build_id), enum_name(tezzeret_pb2.BuildState.DESCRIPTOR, build.state), build.blueprint_name,
            short(build.interface_id), build.pipeline, build.attempts, build.seconds or None,
            short(build.kernel_id), _refusal(build), build.reason,
        )
        for build in answer.builds
    ]  # fmt: skip
    columns = (
        "BUILD",
        "STATE",
        "BLUEPRINT",
        "INTERFACE",
        "PIPELINE",
        ">TRIES",
        ">SECONDS",
        "KERNEL",
        "REFUSED",
        "*REASON",
    )
    call.output.document([plain(build) for build in answer.builds], table(columns, rows, empty="no builds"))


def _refusal(build: tezzeret_pb2.Build) -> str | None:
    return enum_name(tezzeret_pb2.Refusal.DESCRIPTOR, build.refusal) if build.refusal else None
