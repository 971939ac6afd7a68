"""A sheet to draw on: SVG 1.1 that any browser shows, in light and dark, with nothing to fetch and nothing to run."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from esper_core.blueprint.layered import Box, Point

SANS = "Inter,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"
MONO = "ui-monospace,'SF Mono',Menlo,Consolas,'DejaVu Sans Mono',monospace"
MARGIN = 28.0
_WIDE = {"sans": 0.57, "mono": 0.61, "bold": 0.62}
"""Mean advance of a character in ems; a little too wide rather than too narrow."""

_STYLE = """
  :root { color-scheme: light dark }
  .sheet { fill: #fbfbfd }
  .ink { fill: #1d2129 } .dim { fill: #6b7280 } .wire { stroke: #9aa3b2; fill: none } .tip { fill: #9aa3b2 }
  .box { stroke-width: 1.25 }
  .learns { fill: #e8f0fe; stroke: #3b6fd4 } .norm { fill: #e6f6ee; stroke: #2f9564 }
  .bends { fill: #fff3df; stroke: #cf8a1d } .joins { fill: #f1eafd; stroke: #7c52c8 }
  .shapes { fill: #e5f5f7; stroke: #24869b } .end { fill: #eceef2; stroke: #8a93a3 }
  .self { fill: #1f3a74; stroke: #1f3a74 } .onself { fill: #ffffff } .dimself { fill: #c3d2f3 }
  .foreign { fill: none; stroke: #9aa3b2; stroke-dasharray: 4 3 }
  @media (prefers-color-scheme: dark) {
    .sheet { fill: #14171c } .ink { fill: #e8eaee } .dim { fill: #9aa3b2 } .wire { stroke: #5d6675 } .tip { fill: #5d6675 }
    .learns { fill: #1b2b4a; stroke: #6f9bf0 } .norm { fill: #16352a; stroke: #4fbf8b }
    .bends { fill: #3a2c12; stroke: #e0a548 } .joins { fill: #2a2142; stroke: #a584ea }
    .shapes { fill: #143238; stroke: #4cb4c9 } .end { fill: #23272f; stroke: #6b7483 }
    .self { fill: #a9c3fa; stroke: #a9c3fa } .onself { fill: #10203f } .dimself { fill: #3d5690 }
  }
"""


def width_of(text: str, size: float, face: str = "sans") -> float:
    """About how wide ``text`` is at ``size`` pixels; ``face``: sans, mono or bold."""
    return len(text) * size * _WIDE[face]


class Sheet:
    """Collects what is drawn; coordinates are pixels from the upper left corner inside the margin."""

    def __init__(self) -> None:
        self._parts: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        said: str,
        *,
        size: float = 13,
        face: str = "sans",
        kind: str = "ink",
        anchor: str = "start",
    ) -> None:
        """Text with its baseline at ``y``; ``kind`` is a class of the style, ``anchor`` start, middle or end."""
        family = MONO if face == "mono" else SANS
        weight = ' font-weight="600"' if face == "bold" else ""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" font-family="{family}" font-size="{size:g}"{weight} '
            f'text-anchor="{anchor}">{escape(said)}</text>'
        )

    def box(self, box: Box, kind: str, said: str, radius: float = 9.0) -> None:
        """A rounded rectangle; ``said`` shows when the pointer rests on it."""
        self._parts.append(
            f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" rx="{radius:g}" '
            f'class="box {kind}"><title>{escape(said)}</title></rect>'
        )

    def wire(self, route: Sequence[Point]) -> None:
        """A smooth line with an arrow at its end."""
        (x, y), *rest = route
        path = f"M{x:.1f} {y:.1f}"
        for index, (to_x, to_y) in enumerate(rest):
            end_y = to_y - 6 if index == len(rest) - 1 else to_y
            pull = max(abs(end_y - y) / 2, 12.0)
            path += f"C{x:.1f} {y + pull:.1f} {to_x:.1f} {end_y - pull:.1f} {to_x:.1f} {end_y:.1f}"
            x, y = to_x, end_y
        self._parts.append(f'<path d="{path}" class="wire" stroke-width="1.5"/>')
        self._parts.append(f'<path d="M{x - 4:.1f} {y - 1:.1f}h8l-4 7z" class="tip"/>')

    def page(self, width: float, height: float, title: str) -> str:
        """The document, ``width`` by ``height`` inside its margin."""
        whole, high = width + 2 * MARGIN, height + 2 * MARGIN
        body = "\n    ".join(self._parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{whole:.0f}" height="{high:.0f}" '
            f'viewBox="0 0 {whole:.0f} {high:.0f}" role="img">\n  <title>{escape(title)}</title>\n'
            f"  <style>{_STYLE}</style>\n"
            f'  <rect width="100%" height="100%" class="sheet"/>\n  <g transform="translate({MARGIN:g} {MARGIN:g})">\n'
            f"    {body}\n  </g>\n</svg>\n"
        )
