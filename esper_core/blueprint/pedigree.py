"""A blueprint's family as a picture: ancestors above, descendants below, itself filled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from esper_core.blueprint.layered import Box, layout
from esper_core.blueprint.svg import Sheet, width_of

_HEAD = 62.0
_PAD = 13.0
_DIGITS = 12
_COLOURS = {"karn": "joins", "catalogue": "learns", "operator": "bends"}


@dataclass(frozen=True)
class Member:
    """One blueprint; name and uploader are empty when it is not in the library."""

    blueprint_id: str
    name: str
    created_by: str


def draw(members: Sequence[Member], descents: Sequence[tuple[str, str]], about: str) -> str:
    """The SVG document of a family.

    Args:
        members: everybody, each once.
        descents: (parent, child) by content id, among ``members``.
        about: content id of the one it is drawn for.
    """
    known = {member.blueprint_id: member for member in members}
    placed = layout({one: _size(member) for one, member in known.items()}, descents, gap=22.0, rise=40.0)
    name = known[about].name or _short(about)
    said = f"{len(members)} blueprints, {len(descents)} descents"
    width = max(placed.width, width_of(name, 18, "bold"), width_of(said, 12))
    shift = (width - placed.width) / 2
    sheet = Sheet()
    sheet.text(0, 16, name, size=18, face="bold")
    sheet.text(0, 36, said, size=12, kind="dim")
    for route in placed.routes.values():
        sheet.wire([(x + shift, y + _HEAD) for x, y in route])
    for one, box in placed.boxes.items():
        _put(sheet, known[one], Box(box.x + shift, box.y + _HEAD, box.width, box.height), one == about)
    return sheet.page(width, placed.height + _HEAD, f"Lineage of {name}")


def _put(sheet: Sheet, member: Member, box: Box, itself: bool) -> None:
    kind = "self" if itself else _COLOURS.get(member.created_by, "shapes") if member.name else "foreign"
    ink, dim = ("onself", "dimself") if itself else ("ink", "dim")
    sheet.box(box, kind, f"{member.name} {member.blueprint_id} {member.created_by}".strip())
    if member.name:
        sheet.text(box.x + _PAD, box.y + 21, member.name, face="bold", size=13, kind=ink)
    else:
        sheet.text(box.x + _PAD, box.y + 21, "not in this library", size=12, kind=dim)
    sheet.text(box.x + _PAD, box.y + 38, _short(member.blueprint_id), size=10.5, face="mono", kind=dim)
    if member.created_by:
        sheet.text(box.x + box.width - _PAD, box.y + 38, member.created_by, size=11, kind=dim, anchor="end")


def _short(blueprint_id: str) -> str:
    return blueprint_id.removeprefix("blueprint-")[:_DIGITS]


def _size(member: Member) -> tuple[float, float]:
    foot = width_of(_short(member.blueprint_id), 10.5, "mono") + 16 + width_of(member.created_by, 11)
    head = width_of(member.name, 13, "bold") if member.name else width_of("not in this library", 12)
    return max(foot, head) + 2 * _PAD, 50.0
