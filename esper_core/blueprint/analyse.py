"""What a blueprint costs at a slot, and whether it fits there.

Pure arithmetic: a bomb is refused before anything is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from esper_core.blueprint import expression, ops
from esper_core.blueprint.interface import MAX_WIDTH, Shape, SlotInterface
from esper_core.blueprint.ir import DIMENSIONS, INPUT, BlueprintIR, Node
from esper_core.blueprint.ops import Call, Kind, Silence
from esper_core.blueprint.refusal import Refusal


class Limits(BaseModel):
    """The most that a kernel may ask for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters: int = 64_000_000
    """Trainable parameters."""
    activation_elements: int = 64_000_000
    """Elements kept for the backward pass of one sample."""
    flops: int = 100_000_000_000
    """Floating-point operations of one sample's forward pass."""


LIMITS = Limits()
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Step:
    """One node, resolved at a slot."""

    node: Node
    call: Call
    cost: ops.Cost

    @property
    def silence(self) -> Silence:
        return ops.silence(self.node.op, self.call.words)


@dataclass(frozen=True)
class Analysis:
    """What a blueprint is at one slot."""

    parameters: int
    """Trainable parameters."""
    flops: int
    """Of one sample's forward pass: multiply-adds times two, plus one per element of elementwise ops."""
    activation_elements: int
    """Elements kept for the backward pass of one sample."""
    shapes: Mapping[str, Shape]
    """Per-sample shape of ``input`` and of every node."""
    steps: tuple[Step, ...]
    """The nodes, resolved, in order."""
    silenced: frozenset[str]
    """Nodes whose weight and bias start at zero, so that inserting the kernel changes nothing."""

    def memory_bytes(self, rows: int) -> int:
        """Estimate of what training it takes: weights, their gradients and two moments of Adam, and what ``rows`` samples keep
        for the backward pass, all in float32."""
        return FLOAT_BYTES * (4 * self.parameters + rows * self.activation_elements)


def analyse(
    ir: BlueprintIR, interface: SlotInterface, symbols: Mapping[str, int] | None = None, limits: Limits = LIMITS
) -> Analysis:
    """Resolve ``ir`` at ``interface`` with ``symbols`` overriding its defaults.

    Raises:
        Refused: when the layout, a shape or the output does not fit, when it could not start silent or some of its weights
            could never learn, or when it exceeds ``limits``; its code says which.
    """
    if interface.layout not in ir.layouts:
        served = ", ".join(layout.name for layout in ir.layouts)
        raise Refusal.WRONG_LAYOUT.because(
            f"blueprint {ir.name!r} does not serve {interface.layout.name} slots", hint=f"it serves {served}"
        )
    values = {**ir.bind(symbols), **{name: getattr(interface, name) for name in DIMENSIONS}}
    shapes: dict[str, Shape] = {INPUT: interface.in_shape}
    steps: list[Step] = []
    totals = {"parameters": 0, "flops": 0, "activation_elements": 0}
    for node in ir.nodes:
        step = resolve(node, interface, values, shapes)
        steps.append(step)
        shapes[node.name] = step.cost.shape
        totals["parameters"] += step.cost.parameters
        totals["flops"] += step.cost.flops
        totals["activation_elements"] += math.prod(step.cost.shape) + step.cost.extra
        for name, total in totals.items():
            if total > getattr(limits, name):
                raise Refusal.TOO_LARGE.because(
                    f"blueprint {ir.name!r} exceeds {getattr(limits, name)} {name} at node {node.name!r}",
                    hint="make it narrower",
                )
    if shapes[ir.output] != interface.out_shape:
        raise Refusal.BAD_SHAPE.because(
            f"blueprint {ir.name!r} gives {shapes[ir.output]}, the slot needs {interface.out_shape}",
            hint="end with out_width features, and match_output_size for images",
        )
    return Analysis(**totals, shapes=shapes, steps=tuple(steps), silenced=_silenced(ir.output, tuple(steps)))


def resolve(node: Node, interface: SlotInterface, values: Mapping[str, int], shapes: Mapping[str, Shape]) -> Step:
    """One node whose inputs have these shapes, with these values of every symbol and dimension.

    Raises:
        InvalidInput: when it does not fit them.
    """
    op = ops.REGISTRY[node.op]
    inputs = tuple(shapes[name] for name in node.inputs)
    if len(inputs[0]) not in op.ranks:
        raise Refusal.BAD_SHAPE.because(
            f"node {node.name!r}: {op.name} cannot take shape {inputs[0]}", hint=f"it takes rank {op.ranks}"
        )
    numbers: dict[str, int] = {}
    words: dict[str, str] = {}
    stride = (1, 1)
    for key, attribute in op.attributes.items():
        text = node.attributes.get(key, attribute.default or "")
        if attribute.kind is Kind.WORD:
            words[key] = text
        elif attribute.kind is Kind.STRIDE:
            stride = _stride(node, text, interface, values)
        else:
            numbers[key] = _number(node, key, text, values, 1 if attribute.kind is Kind.WIDTH else 0)
    if words.get("kind") == "host":
        words["kind"] = _host_activation(node, interface, words["otherwise"])
    if words.get("bias") in ("source", "sink"):
        words["bias"] = "yes" if interface.takes_bias(words["bias"]) else "no"
    call = Call(interface, inputs, numbers, words, stride)
    return Step(node, call, op.cost(call))


def _number(node: Node, key: str, text: str, values: Mapping[str, int], least: int) -> int:
    value = expression.evaluate(text, values)
    if not least <= value <= MAX_WIDTH:
        raise Refusal.BAD_SHAPE.because(
            f"node {node.name!r}: {key} = {text!r} is {value}", hint=f"{least} to {MAX_WIDTH}"
        )
    return value


def _stride(node: Node, text: str, interface: SlotInterface, values: Mapping[str, int]) -> tuple[int, int]:
    if text in ("source", "sink"):
        host = interface.source if text == "source" else interface.sink
        return host.stride if host else (1, 1)
    stride = _number(node, "stride", text, values, 1)
    return stride, stride


def _host_activation(node: Node, interface: SlotInterface, otherwise: str) -> str:
    kind = interface.activation or otherwise
    if not kind:
        hint = "name the kind, or what to use 'otherwise'"
        raise Refusal.BAD_SHAPE.because(f"node {node.name!r}: the slot's activation is unknown", hint=hint)
    return kind


def _silenced(output: str, steps: tuple[Step, ...]) -> frozenset[str]:
    """The nodes to zero so that ``output`` gives zeros and they still receive a gradient."""
    silent: dict[str, frozenset[str] | None] = {INPUT: None}
    ancestry: dict[str, frozenset[str]] = {INPUT: frozenset()}
    for step in steps:
        node = step.node
        ancestry[node.name] = frozenset({node.name}).union(*(ancestry[name] for name in node.inputs))
        parts = [silent[name] for name in node.inputs]
        known = [part for part in parts if part is not None]
        match step.silence:
            case Silence.HERE:
                silent[node.name] = frozenset({node.name})
            case Silence.NEVER:
                silent[node.name] = None
            case Silence.ONE:
                silent[node.name] = _silent_factor(node, silent, ancestry)
            case Silence.THROUGH | Silence.EVERY:
                silent[node.name] = frozenset().union(*known) if len(known) == len(parts) else None
    found = silent[output]
    if found is None:
        raise Refusal.NOT_SILENT.because(
            "the kernel could not start as a no-op that still learns",
            hint="end with linear, conv, attention, a norm or scale",
        )
    return found


def _silent_factor(
    node: Node, silent: Mapping[str, frozenset[str] | None], ancestry: Mapping[str, frozenset[str]]
) -> frozenset[str] | None:
    """The first factor that can be zeroed while no other factor depends on it: two zeros would stop the gradient."""
    for position, name in enumerate(node.inputs):
        option = silent[name]
        others = (other for index, other in enumerate(node.inputs) if index != position)
        if option is not None and not any(option & ancestry[other] for other in others):
            return option
    return None
