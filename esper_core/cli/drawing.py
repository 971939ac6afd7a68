"""``esperctl blueprint draw``: a design as a picture; and families as pictures for ``lineage --svg``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from esper_core.cli.command import Invocation, command
from esper_core.cli.output import fields
from esper_core.cli.resolve import LATEST, kernel_of, run_of, slot_of
from esper_core.errors import InvalidInput
from esper_core.pb.esper.urza.v1 import urza_pb2

if TYPE_CHECKING:
    from esper_core.blueprint.analyse import Analysis
    from esper_core.blueprint.ir import BlueprintIR
    from esper_core.cli.platform import Platform


def register(app: typer.Typer) -> None:
    """Put the command into ``app``."""
    command(app, "draw")(draw)


async def draw(
    call: Invocation,
    blueprint: Annotated[
        str, typer.Argument(metavar="BLUEPRINT|FILE", help="A name, an id or a prefix of one; or a YAML or JSON file.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The SVG file to make.", dir_okay=False)],
    slot: Annotated[str | None, typer.Option("--slot", "-s", help="With the shapes at this slot of the run.")] = None,
    run: Annotated[str, typer.Option("--run", "-r", help="The run: a name, a prefix, or latest.")] = LATEST,
    kernel: Annotated[str | None, typer.Option(help="With the shapes of this kernel.")] = None,
) -> None:
    """Draw a design: operations as boxes, from the input down to the output; shapes where the slot is known.

    Example:  esperctl blueprint draw bottleneck_mlp --out bottleneck.svg --slot fc1:fc2

    Example:  esperctl blueprint draw narrow.yaml --out narrow.svg
    """
    from esper_core.blueprint.drawing import draw as drawn

    path = Path(blueprint)
    local = path.suffix in (".yaml", ".yml", ".json")
    if local and slot is None and kernel is None:
        from esper_core.cli.blueprint import read_design

        design, analysis = read_design(path), None
    else:
        async with call.platform() as platform:
            design = await _design(platform, blueprint, local)
            analysis = await _analysis(platform, design, slot, run, kernel)
    _write(out, drawn(design, analysis))
    document = {"file": str(out), "blueprint_id": design.id, "nodes": len(design.nodes)}
    if analysis is not None:
        document |= {"parameters": analysis.parameters, "flops": analysis.flops}
    call.output.document(document, fields(document.items()))


def draw_lineage(out: Path, answer: urza_pb2.GetLineageResponse) -> None:
    """Draw a family into ``out``.

    Raises:
        InvalidInput: the place cannot be written.
    """
    from esper_core.blueprint import pedigree

    members = [pedigree.Member(one.blueprint_id, one.name, one.created_by) for one in answer.relatives]
    descents = [(one.parent_id, one.child_id) for one in answer.descents]
    _write(out, pedigree.draw(members, descents, answer.blueprint_id))


async def _design(platform: Platform, given: str, local: bool) -> BlueprintIR:
    from esper_core.blueprint.ir import BlueprintIR
    from esper_core.cli.blueprint import read_design
    from esper_core.rpc.convert import from_proto

    if local:
        return read_design(Path(given))
    answer: urza_pb2.GetBlueprintResponse = await platform.urza.GetBlueprint(
        urza_pb2.GetBlueprintRequest(blueprint_id=given)
    )
    return from_proto(answer.blueprint, BlueprintIR)


async def _analysis(
    platform: Platform, design: BlueprintIR, slot: str | None, run: str, kernel: str | None
) -> Analysis | None:
    from esper_core.blueprint.analyse import analyse
    from esper_core.blueprint.interface import SlotInterface
    from esper_core.rpc.convert import from_proto

    if kernel is not None:
        manifest = (await kernel_of(platform, kernel)).manifest
        if manifest.blueprint_id != design.id:
            raise InvalidInput(
                f"{manifest.kernel_id} is no kernel of {design.name}", hint=f"draw {manifest.blueprint.name}"
            )
        return analyse(design, from_proto(manifest.interface, SlotInterface), dict(manifest.symbols))
    if slot is None:
        return None
    found = await run_of(platform, run)
    interfaces = {item.slot: item.interface for item in found.slots}
    return analyse(design, from_proto(interfaces[slot_of(found, slot)], SlotInterface))


def _write(out: Path, text: str) -> None:
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"{out} cannot be written: {error.strerror}", hint="choose another place") from None
