"""A kernel's weights as rows and columns for the host's own two layers: the algebra only, no host is touched here.

host(x) = V·s(U·x + u) + v      kernel(x) = B·s(A·x + a) + b
host(x) + alpha·kernel(x) = [V, alpha·B]·s([U; A]·x + [u; a]) + v + alpha·b

A batch norm before s works unit by unit, over the batch: the kernel's appended to the host's changes no unit of either, in
evaluation with the running statistics of each, in training with the same batch's. Where the host has no u, the norm takes a:
N(A·x + a) with running mean m is N(A·x) with m - a.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from esper_core.blueprint import activation as activations
from esper_core.blueprint.build import KernelModule
from esper_core.blueprint.interface import ConvGeometry, SlotInterface
from esper_core.blueprint.widening import Form, Widening, foldable, units, widening

__all__ = ["Fold", "Origin", "fold_terms", "foldable", "units"]


@dataclass(frozen=True)
class Origin:
    """A fold tensor that is a plain copy of a kernel parameter, perhaps set into a larger window of zeros.

    ``place`` carries any tensor shaped like the parameter (Adam's moments, a momentum) to the shape of the fold tensor.
    Where the window is larger, the new taps' state is zero, as fresh state is.
    """

    parameter: str
    """Name in the kernel, for example ``A.weight``."""
    place: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Fold:
    """What to append to the host's source and sink. Detached copies in the kernel's dtype and device."""

    units: int
    source_weight: Tensor
    """Rows to append: (units, in) or (units, in, kernel_h, kernel_w)."""
    source_bias: Tensor
    """(units,); all zero where the host has no bias at its source."""
    sink_weight: Tensor
    """Columns to append, alpha applied: (out, units) or (out, units, kernel_h, kernel_w)."""
    sink_bias: Tensor
    """(out,), alpha applied: to be *added* to the sink's bias; all zero where it has none."""
    norm: Mapping[str, Tensor] = field(default_factory=dict)
    """What to append to the host's norm, (units,) each, by its own names: ``weight``, ``bias``, ``running_mean``, ``running_var``."""
    origins: Mapping[str, Origin] = field(default_factory=dict)
    """By field name, ``norm.weight`` and ``norm.bias`` too, only for plain copies; the others need fresh optimiser state."""


@torch.no_grad()
def fold_terms(kernel: KernelModule, interface: SlotInterface, alpha: float = 1.0) -> Fold | None:
    """The tensors that make a host compute ``host(x) + alpha * kernel(x)`` by itself; None when there are none.

    Args:
        kernel: with its trained weights.
        interface: of the slot as it is now; its hidden width may differ from the one the kernel was built for.
        alpha: the blend factor to make permanent.
    """
    shape = widening(interface, kernel.ir.output, kernel.analysis)
    if shape is None:
        return None
    weights = {name: parameter.detach() for name, parameter in kernel.named_parameters()}
    norm = _norm(kernel, shape.norm)
    sample = next(iter(weights.values()))
    first, a = _affine(weights, shape.first, sample.new_zeros, interface.in_width)
    second, b = _affine(weights, shape.second, sample.new_zeros, interface.out_width)
    place_first = _placing(interface.source, shape.offset_source)
    place_second = _placing(interface.sink, shape.offset_sink)
    first, second = place_first(first), place_second(second)
    if shape.form is Form.MIRRORED:
        half = alpha / activations.MIRROR[interface.activation]
        return Fold(
            shape.units,
            torch.cat([first, -first]),
            torch.cat([a, -a]),
            torch.cat([second, -second], 1) * half,
            alpha * b,
        )
    origins = _origins(weights, shape, alpha, place_first, place_second)
    if shape.norm is not None and interface.source_bias_free:
        if "running_mean" in norm:
            norm["running_mean"] -= a
        a = torch.zeros_like(a)
        origins.pop("source_bias", None)
    return Fold(shape.units, first, a, second * alpha, alpha * b, norm, origins)


def _norm(kernel: KernelModule, node: str | None) -> dict[str, Tensor]:
    """Copies of what the norm at ``node`` has per unit."""
    if node is None:
        return {}
    state = {tuple(name.split(".")): value.detach() for name, value in kernel.state_dict().items()}
    return {leaf: value.clone() for (owner, *_, leaf), value in state.items() if owner == node and value.ndim == 1}


def _affine(
    weights: Mapping[str, Tensor], node: str | None, zeros: Callable[[int], Tensor], width: int
) -> tuple[Tensor, Tensor]:
    """(weight, bias) of a node, copied; the identity on ``width`` features when there is none."""
    if node is None:
        return torch.diag(zeros(width) + 1), zeros(width)
    weight = weights[f"{node}.weight"].clone()
    bias = weights.get(f"{node}.bias")
    return weight, zeros(weight.shape[0]) if bias is None else bias.clone()


def _placing(host: ConvGeometry | None, offset: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """Sets a (out, in, h, w) window into the middle of the host's, zeros around it; copies when there is none."""
    if host is None:
        return torch.clone

    def place(window: Tensor) -> Tensor:
        (top, left), (h, w) = offset, window.shape[-2:]
        placed = window.new_zeros(*window.shape[:2], *host.kernel)
        placed[..., top : top + h, left : left + w] = window
        return placed

    return place


def _origins(
    weights: Mapping[str, Tensor],
    shape: Widening,
    alpha: float,
    place_first: Callable[[Tensor], Tensor],
    place_second: Callable[[Tensor], Tensor],
) -> dict[str, Origin]:
    origins: dict[str, Origin] = {}
    if shape.first is not None:
        origins["source_weight"] = Origin(f"{shape.first}.weight", place_first)
        if f"{shape.first}.bias" in weights:
            origins["source_bias"] = Origin(f"{shape.first}.bias", torch.clone)
    if shape.norm is not None:
        for name in ("weight", "bias"):
            if f"{shape.norm}.{name}" in weights:
                origins[f"norm.{name}"] = Origin(f"{shape.norm}.{name}", torch.clone)
    if shape.second is not None and alpha == 1.0:
        origins["sink_weight"] = Origin(f"{shape.second}.weight", place_second)
    return origins
