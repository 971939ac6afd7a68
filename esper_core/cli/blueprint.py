"""``esperctl blueprint``: designs for kernels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType

from esper_core.cli import drawing, lineage, propose
from esper_core.cli.command import Invocation, command, noun
from esper_core.cli.output import cell, enum_name, fields, moment, plain, short, table
from esper_core.errors import InvalidInput, nearest
from esper_core.pb.esper.core.v1 import blueprint_pb2
from esper_core.pb.esper.urza.v1 import urza_pb2

if TYPE_CHECKING:
    from esper_core.blueprint.ir import BlueprintIR

app = noun("blueprint", "Blueprints: designs for kernels, typed graphs of named operations.")


@command(app, "submit")
async def submit(
    call: Invocation, file: Annotated[Path, typer.Argument(help="A YAML or JSON file.", dir_okay=False)]
) -> None:
    """Check a design and store it in the library under its content id. May be repeated.

    Every width may be a number or an expression over in_width, out_width, hidden_width and the blueprint's symbols.

    Example:  esperctl blueprint submit narrow.yaml
    """
    from esper_core.rpc.convert import to_proto

    design = read_design(file)
    async with call.platform() as platform:
        request = urza_pb2.UploadBlueprintRequest(blueprint=to_proto(design, blueprint_pb2.BlueprintIR))
        answer: urza_pb2.UploadBlueprintResponse = await platform.urza.UploadBlueprint(request)
    said = "stored" if answer.created else "was there already"
    call.output.document(plain(answer) | {"name": design.name}, fields([(said, answer.blueprint_id)]))


@command(app, "list")
async def list_blueprints(
    call: Invocation,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="At most this many.")] = 100,
) -> None:
    """List designs, newest first.

    Example:  esperctl blueprint list
    """
    async with call.platform() as platform:
        request = urza_pb2.ListBlueprintsRequest(page_size=limit)
        answer: urza_pb2.ListBlueprintsResponse = await platform.urza.ListBlueprints(request)
    rows = [
        (
            short(item.blueprint_id), item.blueprint.name, _layouts(item.blueprint), len(item.blueprint.nodes),
            _symbols(item.blueprint), item.created_by, moment(item.created),
        )
        for item in answer.blueprints
    ]  # fmt: skip
    columns = ("BLUEPRINT", "NAME", "LAYOUTS", ">NODES", "SYMBOLS", "BY", "CREATED")
    call.output.document([plain(item) for item in answer.blueprints], table(columns, rows, empty="no blueprints"))


@command(app, "show")
async def show_blueprint(
    call: Invocation, blueprint: Annotated[str, typer.Argument(help="A name, an id or a prefix of one.")]
) -> None:
    """Show a design node by node.

    Example:  esperctl blueprint show linear_bypass
    """
    async with call.platform() as platform:
        request = urza_pb2.GetBlueprintRequest(blueprint_id=blueprint)
        answer: urza_pb2.GetBlueprintResponse = await platform.urza.GetBlueprint(request)
    call.output.document(plain(answer), _summary(answer), cell(" "), _nodes(answer.blueprint))


def read_design(path: Path) -> BlueprintIR:
    """The design in a file; layouts may be named, attribute values may be numbers.

    Raises:
        NotFound: there is no such file.
        InvalidInput: malformed, or no blueprint.
    """
    from esper_core.blueprint.interface import Layout
    from esper_core.blueprint.ir import BlueprintIR, Node
    from esper_core.config import read_yaml

    given = read_yaml(path)
    _known(given, BlueprintIR.model_fields, f"{path}")
    known = {layout.name: layout.value for layout in Layout}
    layouts = []
    for name in _list(given, "layouts", path):
        word = str(name).upper().removeprefix("LAYOUT_")
        if word not in known and name not in known.values():
            raise InvalidInput(f"{path}: unknown layout {name!r}", hint=nearest(word, known))
        layouts.append(known.get(word, name))
    nodes = []
    for index, node in enumerate(_list(given, "nodes", path)):
        if not isinstance(node, dict):
            raise InvalidInput(f"{path}: nodes.{index} is no mapping", hint="write name, op and inputs")
        _known(node, Node.model_fields, f"{path}: nodes.{index}")
        attributes = node.get("attributes") or {}
        if not isinstance(attributes, dict):
            raise InvalidInput(f"{path}: nodes.{index}.attributes is no mapping", hint="write `name: value` lines")
        nodes.append(node | {"attributes": {str(key): str(value) for key, value in attributes.items()}})
    return BlueprintIR.model_validate(given | {"layouts": layouts, "nodes": nodes})


def _list(given: dict[str, Any], name: str, path: Path) -> list[Any]:
    value = given.get(name)
    if not isinstance(value, list):
        raise InvalidInput(f"{path}: {name} is no list", hint=f"a blueprint has a list of {name}")
    return value


def _known(given: dict[str, Any], fields_of: Any, where: str) -> None:
    for key in given:
        if key not in fields_of:
            raise InvalidInput(f"{where}: {key!r} is no field", hint=nearest(str(key), fields_of))


def _layouts(design: blueprint_pb2.BlueprintIR) -> str:
    return ", ".join(enum_name(blueprint_pb2.Layout.DESCRIPTOR, layout) for layout in design.layouts)


def _symbols(design: blueprint_pb2.BlueprintIR) -> str:
    return ", ".join(f"{name}={design.symbols[name]}" for name in sorted(design.symbols))


def _summary(answer: urza_pb2.GetBlueprintResponse) -> RenderableType:
    design = answer.blueprint
    return fields(
        [
            ("blueprint", answer.blueprint_id), ("name", design.name), ("layouts", _layouts(design)),
            ("symbols", _symbols(design)), ("output", design.output), ("descends from", ", ".join(design.parent_ids)),
            ("created", f"{moment(answer.created)} by {answer.created_by}"),
        ]
    )  # fmt: skip


def _nodes(design: blueprint_pb2.BlueprintIR) -> RenderableType:
    rows = [
        (
            node.name, node.op, ", ".join(node.inputs),
            ", ".join(f"{name}={node.attributes[name]}" for name in sorted(node.attributes)),
        )
        for node in design.nodes
    ]  # fmt: skip
    return table(("NODE", "OP", "FROM", "*ATTRIBUTES"), rows, empty="no nodes")


lineage.register(app)
drawing.register(app)
propose.register(app)
