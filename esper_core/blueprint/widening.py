"""Whether a kernel is algebraically a widening of the layer its slot spans, and so can become host weights.

Recognised by structure, not by name: ``affine → host norm → host activation → affine``, and, where no norm stands between,
linear maps, which pass through an activation with s(x) - s(-x) = c·x as mirrored pairs of units. Convolutions fit when
they can be embedded in the host's own windows, biases where the host has one or its norm absorbs it. Pure: no torch.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from esper_core.blueprint import activation as activations
from esper_core.blueprint.analyse import Analysis, Step, analyse
from esper_core.blueprint.interface import ConvGeometry, Layout, SlotInterface
from esper_core.blueprint.ir import INPUT, BlueprintIR
from esper_core.errors import InvalidInput

_AFFINE = frozenset({"linear", "conv", "source_conv", "sink_conv"})


class Form(enum.Enum):
    """How the kernel's units become host units."""

    DIRECT = enum.auto()
    """Each unit is one host unit: the activation between is the host's own."""
    MIRRORED = enum.auto()
    """Each unit becomes two of opposite sign, because the kernel is linear and the host's activation is not."""


@dataclass(frozen=True)
class Widening:
    """A kernel read as B·s(N(A·x + a)) + b over the host's norm N, if any, and its activation s."""

    form: Form
    units: int
    """Host units it adds."""
    first: str | None
    """Node giving A; None for the identity."""
    second: str | None
    """Node giving B; None for the identity."""
    norm: str | None = None
    """Node giving N; None when the host has no norm there."""
    offset_source: tuple[int, int] = (0, 0)
    """Where A's window sits in the host's, IMAGE only."""
    offset_sink: tuple[int, int] = (0, 0)
    """Where B's window sits in the host's, IMAGE only."""


def foldable(ir: BlueprintIR, interface: SlotInterface, symbols: Mapping[str, int] | None = None) -> bool:
    """Whether ``ir`` fits ``interface`` and can be folded there."""
    return units(ir, interface, symbols) > 0


def units(ir: BlueprintIR, interface: SlotInterface, symbols: Mapping[str, int] | None = None) -> int:
    """Host units that folding adds; 0 when it does not fit or is no widening."""
    try:
        found = widening(interface, ir.output, analyse(ir, interface, symbols))
    except InvalidInput:
        return 0
    return found.units if found else 0


def widening(interface: SlotInterface, output: str, analysis: Analysis) -> Widening | None:
    """How the analysed blueprint, whose value leaves at node ``output``, widens the host; None when it does not."""
    chain = _chain(output, analysis) if interface.foldable else None
    if not chain:
        return None
    between = [part for part in (interface.norm, interface.activation) if part not in (None, "identity")]
    if between and [_what(step) for step in chain[1:-1]] == between:
        return _pair(chain[0], chain[-1], interface, Form.DIRECT, chain[1] if interface.norm else None)
    return _linear(chain, interface) if interface.norm is None else None


def _linear(chain: list[Step], interface: SlotInterface) -> Widening | None:
    """A linear kernel over an activation alone."""
    form = Form.DIRECT if interface.activation == "identity" else Form.MIRRORED
    if form is Form.MIRRORED and interface.activation not in activations.MIRROR:
        return None
    if not all(step.node.op in _AFFINE for step in chain) or len(chain) > 2:
        return None
    if len(chain) == 2:
        return _pair(chain[0], chain[1], interface, form)
    return _single(chain[0], interface, form) if interface.layout is not Layout.IMAGE else None


def _single(step: Step, interface: SlotInterface, form: Form) -> Widening | None:
    """One affine map beside an identity on the narrower side, or on the side where the host has a place for its bias."""
    no_place = {
        side: step.call.bias and free
        for side, free in (("source", interface.source_bias_free), ("sink", interface.sink_bias_free))
    }
    if all(no_place.values()):
        return None
    at_sink = no_place["source"] or (interface.in_width <= interface.out_width and not no_place["sink"])
    rank = interface.in_width if at_sink else interface.out_width
    first, second = (None, step.node.name) if at_sink else (step.node.name, None)
    return Widening(form, rank * (2 if form is Form.MIRRORED else 1), first, second)


def _what(step: Step) -> object:
    """What stands between two affine steps, to be held against the host's norm and activation."""
    return step.call.interface.norm if step.node.op == "host_norm" else step.call.words.get("kind", step.node.op)


def _chain(output: str, analysis: Analysis) -> list[Step] | None:
    """The steps from input to output when they form a line, without those that change nothing."""
    steps = {step.node.name: step for step in analysis.steps}
    chain: list[Step] = []
    name = output
    while name != INPUT:
        step = steps[name]
        if len(step.node.inputs) != 1:
            return None
        unchanged = (step.node.op == "match_output_size" and step.cost.shape == step.call.shape) or (
            step.node.op == "host_norm" and step.call.interface.norm is None
        )
        if not unchanged and step.call.words.get("kind") != "identity":
            chain.append(step)
        name = step.node.inputs[0]
    return chain[::-1]


def _pair(first: Step, second: Step, interface: SlotInterface, form: Form, norm: Step | None = None) -> Widening | None:
    if not {first.node.op, second.node.op} <= _AFFINE or not _biases_fit(first, second, interface):
        return None
    width = first.call.numbers["out"] * (2 if form is Form.MIRRORED else 1)
    names = (first.node.name, second.node.name, norm.node.name if norm else None)
    if interface.layout is not Layout.IMAGE:
        return Widening(form, width, *names)
    offsets = [
        _offset(step.call.geometry(step.node.op), host)
        for step, host in ((first, interface.source), (second, interface.sink))
    ]
    if offsets[0] is None or offsets[1] is None:
        return None
    return Widening(form, width, *names, offsets[0], offsets[1])


def _biases_fit(first: Step, second: Step, interface: SlotInterface) -> bool:
    """A norm subtracts what is added before it, so a bias there needs no place in the host."""
    at_source = not first.call.bias or not interface.source_bias_free or interface.norm is not None
    return at_source and (not second.call.bias or not interface.sink_bias_free)


def _offset(inner: ConvGeometry, host: ConvGeometry | None) -> tuple[int, int] | None:
    """Where ``inner``'s window sits inside ``host``'s so that both read the same pixels; None when it cannot."""
    if host is None or host.groups != 1 or inner.groups != 1 or inner.stride != host.stride:
        return None
    offsets = []
    for axis in (0, 1):
        spare = host.kernel[axis] - inner.kernel[axis]
        offset = spare // 2
        same_grid = inner.dilation[axis] == host.dilation[axis] or inner.kernel[axis] == 1
        if (
            spare < 0
            or spare % 2
            or not same_grid
            or inner.padding[axis] != host.padding[axis] - offset * host.dilation[axis]
        ):
            return None
        offsets.append(offset)
    return offsets[0], offsets[1]
