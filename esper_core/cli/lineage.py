"""``esperctl blueprint lineage``: whom a design descends from and who descends from it, as a tree."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType
from rich.text import Text
from rich.tree import Tree

from esper_core.cli.command import Invocation, command
from esper_core.cli.output import cell, clean, plain, short
from esper_core.pb.esper.urza.v1 import urza_pb2

_ABOVE = " (see above)"


def register(app: typer.Typer) -> None:
    """Put the command into ``app``."""
    command(app, "lineage")(lineage)


async def lineage(
    call: Invocation,
    blueprint: Annotated[str, typer.Argument(help="A name, an id or a prefix of one.")],
    ancestors: Annotated[bool, typer.Option("--ancestors", help="Only whom it descends from.")] = False,
    descendants: Annotated[bool, typer.Option("--descendants", help="Only who descends from it.")] = False,
    depth: Annotated[int, typer.Option("--depth", "-d", min=1, max=64, help="Generations, each way.")] = 16,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=5000, help="At most this many.")] = 1000,
    svg: Annotated[Path | None, typer.Option("--svg", help="Draw it into this file.", dir_okay=False)] = None,
) -> None:
    """Show a design's ancestors and descendants, both unless one is asked for.

    A design with several parents stands under each of them; what hangs on it is shown once.

    Example:  esperctl blueprint lineage bottleneck_mlp --descendants

    Example:  esperctl blueprint lineage blueprint-3f0c1ab2 --svg family.svg
    """
    both = ancestors == descendants
    request = urza_pb2.GetLineageRequest(
        blueprint_id=blueprint,
        ancestors=depth if ancestors or both else 0,
        descendants=depth if descendants or both else 0,
        limit=limit,
    )
    async with call.platform() as platform:
        answer: urza_pb2.GetLineageResponse = await platform.urza.GetLineage(request)
    if svg is not None:
        from esper_core.cli.drawing import draw_lineage

        draw_lineage(svg, answer)
        call.output.note(f"drawn into {svg}")
    views = [_tree(answer, up=True)] if request.ancestors else []
    views += [_tree(answer, up=False)] if request.descendants else []
    if answer.truncated:
        views.append(cell(Text(f"cut off at {limit}; there are more: --limit", style="yellow")))
    call.output.document(plain(answer), *views)


def _tree(answer: urza_pb2.GetLineageResponse, *, up: bool) -> RenderableType:
    """The relatives on one side as a tree; walked with a stack, for a line of descent may be longer than Python's."""
    known = {one.blueprint_id: one for one in answer.relatives if (one.generation <= 0 if up else one.generation >= 0)}
    next_of: dict[str, list[str]] = defaultdict(list)
    for edge in answer.descents:
        here, there = (edge.child_id, edge.parent_id) if up else (edge.parent_id, edge.child_id)
        if here in known and there in known:
            next_of[here].append(there)
    heading = "descends from" if up else "is an ancestor of"
    root = Tree(Text.assemble(_label(known[answer.blueprint_id]), (f"  {heading}", "dim")), guide_style="dim")
    shown = {answer.blueprint_id}
    waiting = [(root, one) for one in reversed(next_of[answer.blueprint_id])]
    while waiting:
        branch, one = waiting.pop()
        label = _label(known[one])
        if one in shown:
            branch.add(label.append(_ABOVE, style="dim") if next_of[one] else label)
            continue
        shown.add(one)
        leaf = branch.add(label)
        waiting += [(leaf, other) for other in reversed(next_of[one])]
    if len(shown) == 1:
        root.add(Text("nobody", style="dim"))
    return root


def _label(one: urza_pb2.Relative) -> Text:
    if not one.name:
        return Text.assemble((short(one.blueprint_id), "dim"), ("  not in this library", "dim italic"))
    name = Text(clean(one.name), style="bold")
    return Text.assemble(name, (f"  {short(one.blueprint_id)}", "dim"), (f"  by {clean(one.created_by)}", "cyan"))
