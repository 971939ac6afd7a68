"""Karn's archive as a picture: cost to the right, leaning upwards, worth as colour. Plain SVG, or a page that holds it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from esper_core.cli.output import clean, number, short
from esper_core.pb.esper.karn.v1 import karn_pb2

CELL, LEFT, TOP, BELOW = 46, 70, 56, 64
_SCALE = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""From worth 0 to the best: dark to bright, told apart without colour as well."""


def save(archive: karn_pb2.GetArchiveResponse, path: Path) -> None:
    """Write the picture to ``path``; a page around it when that ends in .html.

    Raises:
        OSError: the file cannot be written.
    """
    picture = draw(archive)
    if path.suffix.lower() in (".html", ".htm"):
        picture = _page(archive, picture)
    path.write_text(picture, encoding="utf-8")


def draw(archive: karn_pb2.GetArchiveResponse) -> str:
    """The picture; every filled cell names its design when pointed at."""
    columns, rows = archive.cost_cells, archive.leaning_cells
    width, height = LEFT + columns * CELL + 20, TOP + rows * CELL + BELOW
    best = max((elite.proposal.worth for elite in archive.elites), default=0.0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(LEFT, 22, f"Archive of {short(archive.interface.interface_id)}", size=15),
        _text(
            LEFT,
            42,
            f"level {archive.interface.level}, {archive.interface.measured} designs measured, "
            f"{100 * archive.progress.coverage:.0f} % of the cells filled, best {number(best)}",
        ),
        f'<rect x="{LEFT}" y="{TOP}" width="{columns * CELL}" height="{rows * CELL}" fill="#f3f4f6" stroke="#9ca3af"/>',
    ]
    parts += [_cell(elite, rows, best) for elite in archive.elites]
    parts += _axes(archive, columns, rows)
    return "\n".join([*parts, "</svg>", ""])


def _cell(elite: karn_pb2.Elite, rows: int, best: float) -> str:
    x, y = LEFT + elite.cost_cell * CELL, TOP + (rows - 1 - elite.leaning_cell) * CELL
    share = max(0.0, elite.proposal.worth) / best if best > 0 else 0.0
    told = (
        f"{elite.proposal.blueprint_name}: worth {number(elite.proposal.worth)}, learned {number(elite.proposal.learned)}, "
        f"{number(elite.units)} host units, leaning {number(elite.leaning)}, {elite.proposal.operator}"
    )
    ink = "black" if share > 0.6 else "white"
    return (
        f'<g><title>{html.escape(clean(told))}</title><rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" '
        f'fill="{_colour(share)}"/>{_text(x + CELL / 2, y + CELL / 2 + 4, f"{elite.proposal.worth:.2f}", ink, "middle")}</g>'
    )


def _axes(archive: karn_pb2.GetArchiveResponse, columns: int, rows: int) -> list[str]:
    bottom = TOP + rows * CELL
    step = (archive.cost_high - archive.cost_low) / columns
    found = [
        _text(LEFT + column * CELL, bottom + 18, number(2 ** (archive.cost_low + column * step)), anchor="middle")
        for column in range(0, columns + 1, 2)
    ]
    found += [
        _text(LEFT - 8, bottom - row * CELL + 4, f"{row / rows:.1f}", anchor="end") for row in range(0, rows + 1, 2)
    ]
    middle = TOP + rows * CELL / 2
    turned = f'transform="rotate(-90 20 {middle})"'
    return [
        *found,
        _text(LEFT + columns * CELL / 2, bottom + 42, "cost in host units", anchor="middle"),
        f'<text x="20" y="{middle}" text-anchor="middle" {turned}>leaning: share learned beyond one bent layer</text>',
    ]


def _text(x: float, y: float, said: str, fill: str = "#111827", anchor: str = "start", size: int = 12) -> str:
    text = html.escape(clean(said))
    return f'<text x="{x:g}" y="{y:g}" fill="{fill}" text-anchor="{anchor}" font-size="{size}">{text}</text>'


def _colour(share: float) -> str:
    place = min(max(share, 0.0), 1.0) * (len(_SCALE) - 1)
    low = min(int(place), len(_SCALE) - 2)
    mixed = (a + (b - a) * (place - low) for a, b in zip(_SCALE[low], _SCALE[low + 1], strict=True))
    return "#" + "".join(f"{round(value):02x}" for value in mixed)


def _page(archive: karn_pb2.GetArchiveResponse, picture: str) -> str:
    columns = ("design", "worth", "learned", "host units", "leaning", "made by", "grafts", "kept")
    rows = "".join(f"<tr>{_cells('td', _row(elite))}</tr>" for elite in archive.elites)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Karn\'s archive</title><style>body{font-family:'
        "system-ui,sans-serif;margin:2rem}td,th{padding:.2rem .8rem;text-align:right}td:first-child,th:first-child"
        f"{{text-align:left}}</style></head><body>{picture}<table><tr>{_cells('th', columns)}</tr>{rows}</table></body></html>\n"
    )


def _row(elite: karn_pb2.Elite) -> Sequence[str]:
    figures = (elite.proposal.worth, elite.proposal.learned, elite.units, elite.leaning)
    made = elite.proposal.operator
    return (elite.proposal.blueprint_name, *map(number, figures), made, str(elite.grafts), str(elite.kept))


def _cells(tag: str, values: Sequence[str]) -> str:
    return "".join(f"<{tag}>{html.escape(clean(value))}</{tag}>" for value in values)
