"""A design as numbers, for the surrogate and for novelty: what can be told from its graph without building it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from esper_core.blueprint.activation import NAMES as ACTIVATIONS
from esper_core.blueprint.analyse import Step
from esper_core.blueprint.ir import INPUT
from esper_core.blueprint.ops import REGISTRY, channels_of
from services.karn.design import Design

Vector = NDArray[np.float64]
_OPS, _KINDS = tuple(REGISTRY), tuple(ACTIVATIONS)
_AFFINE = frozenset({"linear", "conv", "source_conv", "sink_conv", "attention"})
TRAITS = (
    "log units", "log flops", "nodes", "depth", "bends deep", "log capacity", "log bent capacity", "log mixed capacity",
    "reach", *_OPS, *_KINDS,
)  # fmt: skip


def traits(design: Design) -> Vector:
    """(len(TRAITS),) numbers of order 1."""
    steps = design.analysis.steps
    deep, bends, reach = _longest(steps)
    ops = Counter(step.node.op for step in steps)
    kinds = Counter(step.call.words["kind"] for step in steps if step.node.op == "activation")
    capacity, bent, mixed = _capacities(steps, design.ir.output, channels_of(design.interface.in_shape))
    return np.array(
        [
            math.log2(design.units + 0.1), math.log2(design.analysis.flops + 1) / 4, len(steps) / 4, deep, bends,
            *(math.log2(figure + 1) for figure in (capacity, bent, mixed)), reach / 4,
            *(ops[op] for op in _OPS), *(kinds[kind] for kind in _KINDS),
        ],
        dtype=np.float64,
    )  # fmt: skip


def _longest(steps: tuple[Step, ...]) -> tuple[int, int, int]:
    """Affine maps and activations on the way with most of each, and how far a filter reaches beside its place."""
    found: dict[str, tuple[int, int, int]] = {INPUT: (0, 0, 0)}
    for step in steps:
        deep, bends, reach = (max(parts) for parts in zip(*(found[name] for name in step.node.inputs), strict=True))
        numbers = step.call.numbers
        wide = (numbers.get("kernel", 1) - 1) * numbers.get("dilation", 1) if "conv" in step.node.op else 0
        found[step.node.name] = (
            deep + (step.node.op in _AFFINE),
            bends + (step.node.op in ("activation", "multiply", "attention")),
            reach + wide,
        )
    return found[steps[-1].node.name]


def _capacities(steps: tuple[Step, ...], output: str, entering: int) -> tuple[float, float, float]:
    """How many independent numbers can reach the way out: at all, through a bend, and through a product or other places."""
    flows: dict[str, Mapping[str, float]] = {INPUT: {"any": entering, "bent": 0.0, "mixed": 0.0}}
    for step in steps:
        entering_flows = [flows[name] for name in step.node.inputs]
        together = {key: sum(flow[key] for flow in entering_flows) for key in ("any", "bent", "mixed")}
        if step.node.op == "activation":
            together["bent"] = together["any"]
        elif step.node.op in ("multiply", "attention"):
            together["mixed"] = together["bent"] = together["any"]
        width = channels_of(step.cost.shape)
        flows[step.node.name] = {key: min(width, flow) for key, flow in together.items()}
    leaving = flows[output]
    return leaving["any"], leaving["bent"], leaving["mixed"]
