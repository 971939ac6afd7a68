"""A blueprint in the making at one slot: nodes are added, joined and cut, and every step is typed by the op registry.

What does not fit is refused at once, not when the whole is analysed. ``finished`` drops what leads nowhere, orders and names
what is left, and lets :func:`esper_core.blueprint.analyse.analyse` have the last word, also on whether it could start silent.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from esper_core.blueprint.analyse import Analysis, Limits, analyse, resolve
from esper_core.blueprint.interface import Layout, Shape, SlotInterface, canonical_json
from esper_core.blueprint.ir import DIMENSIONS, INPUT, MAX_PARENTS, BlueprintIR, Node
from esper_core.blueprint.ops import REGISTRY, Kind
from esper_core.errors import InvalidInput
from esper_core.ids import sha256

MAX_NODES = 24
"""Of an invented design; the registry would take more, people would not read it."""
MAX_FACTORS = 3
"""Products in one design: each squares the scale of what it reads."""
MAX_UNITS = 64
"""Price of an invented design, in host units of its slot; see :func:`allowance`."""

_SHORT = {
    "activation": "act", "host_norm": "norm", "layer_norm": "norm", "group_norm": "norm", "global_average_pool": "pool",
    "match_output_size": "fit", "depthwise_conv": "depthwise", "multiply": "product", "add": "sum",
}  # fmt: skip
_WORD = re.compile(r"[a-z][a-z0-9_]*")


def unit(interface: SlotInterface) -> tuple[int, int]:
    """Parameters and FLOPs of one more unit in the host's own spanned layer, the currency of what a kernel costs."""
    reads, writes = interface.in_width, interface.out_width
    if interface.layout is not Layout.IMAGE:
        tokens = interface.in_size[0] if interface.in_size else 1
        return reads + writes + 1, 2 * tokens * (reads + writes)
    source, sink = interface.source, interface.sink
    taps = [side.kernel_h * side.kernel_w if side else 9 for side in (source, sink)]
    between = source.leaving((interface.in_size[0], interface.in_size[1])) if source else interface.out_size
    per_unit = reads * taps[0] + writes * taps[1] + 1
    positions = (max(1, between[0] * between[1]), interface.out_size[0] * interface.out_size[1])
    return per_unit, 2 * (reads * taps[0] * positions[0] + writes * taps[1] * positions[1])


def allowance(interface: SlotInterface) -> Limits:
    """The most that an invented design may cost at a slot: as much as ``MAX_UNITS`` host units, and never absurdly little."""
    parameters, flops = unit(interface)
    elements = sum(map(_elements, (interface.in_shape, interface.out_shape)))
    return Limits(
        parameters=max(2048, MAX_UNITS * parameters),
        flops=max(16384, 2 * MAX_UNITS * flops),
        activation_elements=max(4096, 16 * elements + MAX_UNITS * elements),
    )


def fits(ir: BlueprintIR, interface: SlotInterface) -> Analysis | None:
    """The analysis of a design that is valid and affordable at ``interface``; None for every other."""
    try:
        return analyse(ir, interface, limits=allowance(interface))
    except InvalidInput:
        return None


def form(ir: BlueprintIR) -> str:
    """Hex digest of what a design computes, whatever its nodes, its ancestors and itself are called."""
    names = {INPUT: INPUT, **{node.name: str(index) for index, node in enumerate(ir.nodes)}}
    nodes = [(node.op, [names[name] for name in node.inputs], node.attributes) for node in ir.nodes]
    return sha256(canonical_json([nodes, names[ir.output], ir.symbols]))


class Draft:
    """A design being made for ``interface``; ``stem`` is where its name begins."""

    def __init__(self, interface: SlotInterface, stem: str = "sprout") -> None:
        self.interface = interface
        self.stem = stem
        self.symbols: dict[str, int] = {}
        self.nodes: dict[str, Node] = {}
        self.shapes: dict[str, Shape] = {INPUT: interface.in_shape}
        self.output = INPUT

    @classmethod
    def of(cls, ir: BlueprintIR, interface: SlotInterface) -> Draft:
        """A copy of ``ir`` to change.

        Raises:
            InvalidInput: it does not fit the slot.
        """
        draft = cls(interface, ir.name.rsplit("-g", 1)[0])
        draft.symbols = dict(ir.symbols)
        draft.nodes = {node.name: node for node in ir.nodes}
        draft.output = ir.output
        draft.settle()
        return draft

    def add(self, op: str, *inputs: str, **attributes: str) -> str:
        """A new node's name.

        Raises:
            InvalidInput: the op cannot take these inputs or attributes.
        """
        name = next(found for n in range(len(self.nodes), 10_000) if (found := f"n{n}") not in self.nodes)
        node = Node(name=name, op=op, inputs=inputs, attributes=attributes)
        self.shapes[name] = resolve(node, self.interface, self._values(), self.shapes).cost.shape
        self.nodes[name] = node
        return name

    def change(
        self, name: str, *, op: str | None = None, inputs: Iterable[str] | None = None, **attributes: str
    ) -> None:
        """Replace parts of a node; shapes are not known again before ``settle``."""
        node = self.nodes[name]
        self.nodes[name] = Node(
            name=name,
            op=op or node.op,
            inputs=tuple(inputs) if inputs is not None else node.inputs,
            attributes=attributes if op else {**node.attributes, **attributes},
        )

    def redirect(self, old: str, new: str, spared: frozenset[str] = frozenset()) -> None:
        """Let everything but ``spared`` that read ``old``, the way out included, read ``new``."""
        for node in list(self.nodes.values()):
            if old in node.inputs and node.name not in spared:
                self.change(node.name, inputs=[new if name == old else name for name in node.inputs])
        if self.output == old:
            self.output = new

    def symbol(self, value: int) -> str:
        """A new symbol with that default."""
        name = next(f"width{n or ''}" for n in (0, *range(2, 33)) if f"width{n or ''}" not in self.symbols)
        self.symbols[name] = value
        return name

    def width_of(self, name: str) -> str:
        """An expression for the features or channels of a value: as they were asked for, so that it holds when symbols change."""
        while name != INPUT:
            node = self.nodes[name]
            if "out" in node.attributes:
                return node.attributes["out"]
            name = node.inputs[0]
        return "in_width"

    def adopt(self, other: Draft, name: str) -> str:
        """Copy ``name`` of another draft and all it is computed from; returns its name here.

        Raises:
            InvalidInput: it does not fit here.
        """
        renamed = {symbol: self._symbol_like(symbol, value, other) for symbol, value in other.symbols.items()}
        here = {INPUT: INPUT}
        for node in other.ordered(name):
            kinds = REGISTRY[node.op].attributes
            attributes = {
                key: text if kinds[key].kind is Kind.WORD else _substituted(text, renamed)
                for key, text in node.attributes.items()
            }
            here[node.name] = self.add(node.op, *(here[source] for source in node.inputs), **attributes)
        return here[name]

    def above(self, name: str) -> frozenset[str]:
        """Every node that ``name`` is computed from, itself included."""
        return frozenset(node.name for node in self.ordered(name))

    def ordered(self, name: str) -> list[Node]:
        """``name`` and what it is computed from, in order.

        Raises:
            InvalidInput: there is a cycle.
        """
        done: dict[str, Node] = {}
        self._visit(name, done, frozenset())
        return list(done.values())

    def settle(self) -> None:
        """Drop what leads nowhere and work out every shape again.

        Raises:
            InvalidInput: something does not fit any more, or there is a cycle.
        """
        nodes = self.ordered(self.output)
        self.nodes = {node.name: node for node in nodes}
        self.shapes = {INPUT: self.interface.in_shape}
        used = {word for node in nodes for text in node.attributes.values() for word in _WORD.findall(text)}
        self.symbols = {name: value for name, value in self.symbols.items() if name in used}
        for node in nodes:
            self.shapes[node.name] = resolve(node, self.interface, self._values(), self.shapes).cost.shape

    def finished(self, generation: int = 0, parents: Iterable[str] = ()) -> BlueprintIR:
        """The design, valid and affordable at its slot.

        Raises:
            InvalidInput: it is not, or grew out of hand.
        """
        self.settle()
        nodes = list(self.nodes.values())
        if not nodes or len(nodes) > MAX_NODES or sum(node.op == "multiply" for node in nodes) > MAX_FACTORS:
            raise InvalidInput("the design grew out of hand", hint="fewer nodes and products")
        names, counts = {INPUT: INPUT}, Counter[str]()
        for node in nodes:
            short = _SHORT.get(node.op, node.op)
            counts[short] += 1
            names[node.name] = f"{short}{counts[short]}"
        renamed = [
            Node(
                name=names[node.name],
                op=node.op,
                inputs=tuple(names[name] for name in node.inputs),
                attributes=node.attributes,
            )
            for node in nodes
        ]
        bare = BlueprintIR(
            name=self.stem,
            symbols=self.symbols,
            nodes=tuple(renamed),
            output=names[self.output],
            layouts=(self.interface.layout,),
            parent_ids=tuple(dict.fromkeys(parents))[:MAX_PARENTS],
        )
        analyse(bare, self.interface, limits=allowance(self.interface))
        return bare.model_copy(update={"name": f"{self.stem[:60]}-g{generation}-{form(bare)[:6]}"})

    def _values(self) -> Mapping[str, int]:
        return {**self.symbols, **{name: getattr(self.interface, name) for name in DIMENSIONS}}

    def _symbol_like(self, name: str, value: int, other: Draft) -> str:
        """Our symbol that means the other's: the same one where the value is the same, else one not used by either."""
        if self.symbols.get(name, value) == value:
            self.symbols[name] = value
            return name
        taken = {*self.symbols, *other.symbols}
        fresh = next(f"width{n}" for n in range(2, 100) if f"width{n}" not in taken)
        self.symbols[fresh] = value
        return fresh

    def _visit(self, name: str, done: dict[str, Node], above: frozenset[str]) -> None:
        if name == INPUT or name in done:
            return
        if name in above:
            raise InvalidInput("the design runs in a circle", hint="join only what comes later to what comes before")
        for source in self.nodes[name].inputs:
            self._visit(source, done, above | {name})
        done[name] = self.nodes[name]


def _elements(shape: Shape) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _substituted(text: str, renamed: Mapping[str, str]) -> str:
    return _WORD.sub(lambda match: renamed.get(match.group(), match.group()), text)
