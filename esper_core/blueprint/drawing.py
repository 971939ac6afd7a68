"""A blueprint as a picture: operations as boxes in layers, with shapes and parameters where the slot is known."""

from __future__ import annotations

from collections.abc import Mapping

from esper_core.blueprint.analyse import Analysis, Step
from esper_core.blueprint.interface import Shape
from esper_core.blueprint.ir import INPUT, BlueprintIR, Node
from esper_core.blueprint.layered import Box, layout
from esper_core.blueprint.svg import Sheet, width_of

_OUTPUT = "\0output"
_KINDS: Mapping[str, str] = {
    "linear": "learns", "conv": "learns", "source_conv": "learns", "sink_conv": "learns", "depthwise_conv": "learns",
    "attention": "learns", "embedding": "learns", "scale": "learns", "activation": "bends", "softmax": "bends",
    "dropout": "bends", "add": "joins", "multiply": "joins", "concat": "joins",
}  # fmt: skip
_HEAD = 62.0
_PAD = 14.0


def draw(ir: BlueprintIR, analysis: Analysis | None = None) -> str:
    """The SVG document of ``ir``; with ``analysis``, of what it is at that slot."""
    steps = {step.node.name: step for step in analysis.steps} if analysis is not None else {}
    shapes = analysis.shapes if analysis is not None else {}
    cards = {INPUT: _Card(INPUT, "end", shapes.get(INPUT))}
    cards |= {
        node.name: _Card(node.op, _kind(node), shapes.get(node.name), node, steps.get(node.name)) for node in ir.nodes
    }
    cards[_OUTPUT] = _Card("output", "end", shapes.get(ir.output))
    edges = [(source, node.name) for node in ir.nodes for source in node.inputs] + [(ir.output, _OUTPUT)]
    placed = layout({name: card.size for name, card in cards.items()}, edges)
    heading = _heading(ir, analysis)
    width = max(placed.width, *(width_of(text, size, face) for text, size, face in heading))
    sheet = Sheet()
    y = 16.0
    for index, (text, size, face) in enumerate(heading):
        sheet.text(0, y, text, size=size, face=face, kind="dim" if index else "ink")
        y += 20
    shift, drop = (width - placed.width) / 2, _HEAD + (len(heading) - 2) * 20
    for route in placed.routes.values():
        sheet.wire([(x + shift, y + drop) for x, y in route])
    for name, box in placed.boxes.items():
        cards[name].put(sheet, Box(box.x + shift, box.y + drop, box.width, box.height))
    return sheet.page(width, placed.height + drop, f"Blueprint {ir.name}")


class _Card:
    """What stands in a box."""

    def __init__(
        self, title: str, kind: str, shape: Shape | None, node: Node | None = None, step: Step | None = None
    ) -> None:
        self.kind = kind
        self._title = title.replace("_", " ")
        self._name = node.name if node is not None and node.name != node.op else ""
        self._settings = _settings(node, step) if node is not None else []
        self._shape = _shape(shape) if shape is not None else ""
        self._cost = f"{step.cost.parameters:,} params" if step is not None and step.cost.parameters else ""
        lines = [width_of(self._title, 14, "bold") + width_of(self._name, 11, "mono") + 18 * bool(self._name)]
        lines += [width_of(line, 11.5, "mono") for line in self._settings]
        lines.append(width_of(self._cost, 11.5) + width_of(self._shape, 11.5, "mono") + 22 * bool(self._cost))
        foot = bool(self._shape or self._cost)
        self.size = (max(*lines, 64) + 2 * _PAD, 34.0 + 16 * len(self._settings) + (20 if foot else 0))

    def put(self, sheet: Sheet, box: Box) -> None:
        said = " ".join(filter(None, (self._title, self._name, *self._settings, self._shape, self._cost)))
        sheet.box(box, self.kind, said, radius=box.height / 2 if self.kind == "end" and box.height < 40 else 9.0)
        left, right, y = box.x + _PAD, box.x + box.width - _PAD, box.y + 22
        if self.kind == "end":
            sheet.text(box.middle, y, self._title, size=14, face="bold", anchor="middle")
            if self._shape:
                sheet.text(box.middle, y + 19, self._shape, size=11.5, face="mono", kind="dim", anchor="middle")
            return
        sheet.text(left, y, self._title, size=14, face="bold")
        if self._name:
            sheet.text(right, y, self._name, size=11, face="mono", kind="dim", anchor="end")
        for line in self._settings:
            y += 16
            sheet.text(left, y, line, size=11.5, face="mono", kind="dim")
        if self._cost:
            sheet.text(left, y + 20, self._cost, size=11.5, kind="dim")
        if self._shape:
            sheet.text(right, y + 20, self._shape, size=11.5, face="mono", kind="ink", anchor="end")


def _kind(node: Node) -> str:
    return "norm" if node.op.endswith("norm") else _KINDS.get(node.op, "shapes")


def _settings(node: Node, step: Step | None) -> list[str]:
    """Attributes as they stand in the blueprint; expressions also as what they come to at the slot."""
    lines = []
    for key in sorted(node.attributes):
        text = node.attributes[key]
        value = "" if step is None else str(step.call.numbers.get(key, step.call.words.get(key, "")))
        lines.append(f"{key}: {text}" + (f" → {value}" if value and value != text else ""))
    return lines


def _shape(shape: Shape) -> str:
    return " × ".join(f"{size:,}" for size in shape)


def _heading(ir: BlueprintIR, analysis: Analysis | None) -> list[tuple[str, float, str]]:
    """(text, size, face) of every line."""
    symbols = ", ".join(f"{name} = {value}" for name, value in sorted(ir.symbols.items()))
    layouts = ", ".join(layout.name.lower() for layout in ir.layouts)
    lines = [
        (ir.name, 18.0, "bold"),
        (
            " · ".join(filter(None, (f"{ir.id[:22]}", layouts, f"by default {symbols}" if symbols else ""))),
            12.0,
            "sans",
        ),
    ]
    if analysis is not None:
        kept = f"{analysis.activation_elements:,} values kept for the backward pass"
        lines.append((f"{analysis.parameters:,} parameters · {analysis.flops:,} FLOPs · {kept}", 12.0, "sans"))
    return lines
