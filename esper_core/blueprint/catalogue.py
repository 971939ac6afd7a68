"""The designs that ship with Esper. ``width`` is the free symbol; everything else follows from the slot.

``attention_block`` looks only at earlier tokens: a slot does not tell whether its host is autoregressive, and a kernel
that looked ahead would leak the answer into such a host.
"""

from __future__ import annotations

from collections.abc import Iterable

from esper_core.blueprint.analyse import analyse
from esper_core.blueprint.interface import Layout, SlotInterface
from esper_core.blueprint.ir import INPUT, BlueprintIR, Node
from esper_core.errors import InvalidInput

DEFAULT_WIDTH = 8
WIDTHS = (4, 8, 16, 32)


def _node(name: str, op: str, *inputs: str, **attributes: str) -> Node:
    return Node(name=name, op=op, inputs=inputs, attributes=attributes)


def _blueprint(name: str, layouts: tuple[Layout, ...], *nodes: Node, width: bool = True) -> BlueprintIR:
    symbols = {"width": DEFAULT_WIDTH} if width else {}
    return BlueprintIR(name=name, symbols=symbols, nodes=nodes, output=nodes[-1].name, layouts=layouts)


_ROWS = (Layout.FEATURES, Layout.TOKENS)
_IMAGES = (Layout.IMAGE,)

_ENTRIES = (
    _blueprint(
        "bottleneck_mlp",  # B·s(norm(A·x + a)) + b: a widening of the spanned layer
        _ROWS,
        _node("A", "linear", INPUT, out="width", bias="source"),
        _node("norm", "host_norm", "A"),
        _node("s", "activation", "norm", kind="host", otherwise="relu"),
        _node("B", "linear", "s", out="out_width", bias="sink"),
    ),
    _blueprint(
        "low_rank",  # B·A·x
        _ROWS,
        _node("A", "linear", INPUT, out="width", bias="no"),
        _node("B", "linear", "A", out="out_width", bias="sink"),
    ),
    _blueprint("linear_bypass", _ROWS, _node("W", "linear", INPUT, out="out_width", bias="sink"), width=False),
    _blueprint(
        "conv_bypass_1x1",
        _IMAGES,
        _node("A", "conv", INPUT, out="width", stride="source", bias="source"),
        _node("norm", "host_norm", "A"),
        _node("s", "activation", "norm", kind="host", otherwise="relu"),
        _node("B", "conv", "s", out="out_width", stride="sink", bias="sink"),
        _node("fit", "match_output_size", "B"),
    ),
    _blueprint(
        "conv_bypass_3x3",  # the host's own geometry, 3×3 in the common case: a widening of the spanned convolution
        _IMAGES,
        _node("A", "source_conv", INPUT, out="width", bias="source"),
        _node("norm", "host_norm", "A"),
        _node("s", "activation", "norm", kind="host", otherwise="relu"),
        _node("B", "sink_conv", "s", out="out_width", bias="sink"),
        _node("fit", "match_output_size", "B"),
    ),
    _blueprint(
        "depthwise_separable",
        _IMAGES,
        _node("D", "depthwise_conv", INPUT, kernel="3", padding="1", stride="source"),
        _node("norm", "group_norm", "D"),
        _node("s", "activation", "norm", kind="host", otherwise="relu"),
        _node("P", "conv", "s", out="out_width", stride="sink"),
        _node("fit", "match_output_size", "P"),
        width=False,
    ),
    _blueprint(
        "squeeze_excite",
        _IMAGES,
        _node("squeeze", "global_average_pool", INPUT),
        _node("reduce", "linear", "squeeze", out="width"),
        _node("s", "activation", "reduce", kind="relu"),
        _node("expand", "linear", "s", out="in_width"),
        _node("gate", "activation", "expand", kind="sigmoid"),
        _node("excited", "multiply", INPUT, "gate"),
        _node("P", "conv", "excited", out="out_width", stride="source"),
        _node("fit", "match_output_size", "P"),
    ),
    _blueprint(
        "attention_block",
        (Layout.TOKENS,),
        _node("norm", "layer_norm", INPUT),
        _node("mix", "attention", "norm", width="width", heads="max(1, width // 8)", out="out_width"),
    ),
)


def catalogue() -> dict[str, BlueprintIR]:
    """Every built-in blueprint by name."""
    return {ir.name: ir for ir in _ENTRIES}


def candidates(
    interface: SlotInterface, widths: Iterable[int] = WIDTHS
) -> list[tuple[str, BlueprintIR, dict[str, int]]]:
    """(name, blueprint, symbols) of every built-in design and width that fits ``interface``."""
    found = []
    for ir in _ENTRIES:
        choices = [{"width": width} for width in widths] if "width" in ir.symbols else [{}]
        for symbols in choices:
            try:
                analyse(ir, interface, symbols)
            except InvalidInput:
                continue  # not for this slot
            found.append((ir.name, ir, symbols))
    return found
