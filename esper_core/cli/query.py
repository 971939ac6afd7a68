"""``esperctl kernel query``: finds kernels by everything that is known of them."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated

import typer

from esper_core.cli.command import Invocation, command
from esper_core.cli.output import enum_name, enum_value, number, plain, short, table
from esper_core.cli.resolve import LATEST, run_of, slot_of
from esper_core.pb.esper.core.v1.kernel_pb2 import KernelRecord, KernelStatus
from esper_core.pb.esper.urza.v1 import urza_pb2

if TYPE_CHECKING:
    from esper_core.cli.platform import Platform


class StatusName(enum.StrEnum):
    """What is known of a kernel's fitness."""

    COMPILED = "compiled"
    VALIDATED = "validated"
    REJECTED = "rejected"
    RETIRED = "retired"


class OrderName(enum.StrEnum):
    """What comes first."""

    PARAMETERS = "parameters"
    FORWARD = "forward"
    INTEREST = "interest"
    NEWEST = "newest"


def register(app: typer.Typer) -> None:
    """Put the command into ``app``."""
    command(app, "query")(query)


async def query(
    call: Invocation,
    tag: Annotated[list[str] | None, typer.Option("--tag", "-t", help="It must have this tag; repeatable.")] = None,
    without: Annotated[list[str] | None, typer.Option("--not", help="It must not have this tag; repeatable.")] = None,
    prefer: Annotated[
        list[str] | None, typer.Option(help="Those with this tag come first; repeatable, the first one counts most.")
    ] = None,
    by: Annotated[OrderName, typer.Option(help="What comes first.")] = OrderName.PARAMETERS,
    status: Annotated[StatusName | None, typer.Option(help="Only with this status.")] = None,
    slot: Annotated[str | None, typer.Option("--slot", "-s", help="Only those that fit this slot of the run.")] = None,
    run: Annotated[str, typer.Option("--run", "-r", help="The run: a name, a prefix, or latest.")] = LATEST,
    interface: Annotated[str, typer.Option(help="Only for this interface id.", show_default="any")] = "",
    blueprint: Annotated[str | None, typer.Option(help="Only of this blueprint: name, id or prefix.")] = None,
    born_of: Annotated[
        str, typer.Option(help="Only of blueprints brought by this principal.", show_default="any")
    ] = "",
    target: Annotated[str, typer.Option(help="Only as measured on this machine kind.", show_default="any")] = "",
    max_parameters: Annotated[int, typer.Option(min=0, help="At most this many.", show_default="any")] = 0,
    max_forward: Annotated[
        float, typer.Option(min=0, help="Median forward seconds at most.", show_default="any")
    ] = 0.0,
    max_forward_p99: Annotated[
        float, typer.Option(min=0, help="99th percentile of them at most.", show_default="any")
    ] = 0.0,
    max_memory: Annotated[int, typer.Option(min=0, help="Peak bytes at most.", show_default="any")] = 0,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="At most this many.")] = 50,
    tags: Annotated[bool, typer.Option("--tags", help="Show tags instead of figures.")] = False,
    after: Annotated[str, typer.Option(help="Token of the page before.", show_default="first page")] = "",
) -> None:
    """Find kernels by tags, limits, origin and interest. KEPT: of the grafts that ended; GAIN: their mean contribution in loss.

    Interest is what was done with a kernel: fetched by a run 1, a graft that ended 1, one that became part of its host 4
    more; each deed counts half as much whenever 1000 more have been done with any kernel.

    Example:  esperctl kernel query --tag foldable --not latency:high --prefer parameters:low --status validated

    Example:  esperctl kernel query --by interest --born-of karn

    Example:  esperctl kernel query --slot fc1:fc2 --max-forward 0.0002 --max-memory 1000000
    """
    request = urza_pb2.QueryKernelsRequest(
        interface_id=interface, required_tags=tag or [], excluded_tags=without or [], preferred_tags=prefer or [],
        max_parameters=max_parameters, max_forward_seconds=max_forward, max_forward_seconds_p99=max_forward_p99,
        max_memory_bytes=max_memory, target=target, born_of=born_of, page_size=limit, page_token=after,
        order=enum_value(urza_pb2.KernelOrder.DESCRIPTOR, by.name),
    )  # fmt: skip
    async with call.platform() as platform:
        await narrow(platform, request, status, slot, run, blueprint)
        answer: urza_pb2.QueryKernelsResponse = await platform.urza.QueryKernels(request)
    rows = [_row(record, usage) for record, usage in zip(answer.kernels, answer.usage, strict=True)]
    columns: tuple[str, ...] = (
        "KERNEL", "STATUS", "BLUEPRINT", "BY", ">PARAMS", ">FORWARD µs", ">KEPT", ">GAIN", ">INTEREST",
    )  # fmt: skip
    if tags:
        columns = (columns[0], "*TAGS")
        rows = [(row[0], ", ".join(record.tags)) for row, record in zip(rows, answer.kernels, strict=True)]
    call.output.document(plain(answer), table(columns, rows, empty="no kernels"))
    if answer.next_page_token and not call.output.json:
        call.output.note(f"there are more: --after {answer.next_page_token}")


async def narrow(
    platform: Platform,
    request: urza_pb2.QueryKernelsRequest,
    status: StatusName | None,
    slot: str | None,
    run: str,
    blueprint: str | None,
) -> None:
    """Ask only for a status, for a run's slot, of a blueprint, as far as they are given in people's words."""
    if status is not None:
        request.status = enum_value(KernelStatus.DESCRIPTOR, status.name)
    if slot is not None:
        request.interface_id = await interface_of(platform, slot, run)
    if blueprint is not None:
        named = await platform.urza.GetBlueprint(urza_pb2.GetBlueprintRequest(blueprint_id=blueprint))
        request.blueprint_id = named.blueprint_id


async def interface_of(platform: Platform, slot: str, run: str) -> str:
    """Content id of the interface of a run's slot."""
    from esper_core.blueprint.interface import SlotInterface
    from esper_core.rpc.convert import from_proto

    found = await run_of(platform, run)
    interfaces = {item.slot: item.interface for item in found.slots}
    return from_proto(interfaces[slot_of(found, slot)], SlotInterface).id


def _row(record: KernelRecord, usage: urza_pb2.KernelUsage) -> tuple[object, ...]:
    measured = record.measurement if record.HasField("measurement") else None
    return (
        short(record.manifest.kernel_id), enum_name(KernelStatus.DESCRIPTOR, record.status),
        record.manifest.blueprint.name, record.born_of, f"{record.manifest.parameters:,}",
        measured and number(measured.forward_seconds * 1e6), f"{usage.fossilized} of {usage.tried}" if usage.tried else None,
        usage.contribution if usage.HasField("contribution") else None, usage.interest,
    )  # fmt: skip
