"""What every unit is worth to the loss, by Taylor's first two terms, from one pass over a probe.

A gate of value 1 per sample stands before everything that reads a unit. With g the derivative of a sample's loss by its gate, which is
Σ activation · gradient over all places where the unit is read, closing the gate changes the loss by −mean(g) + ½ mean(g²): to first
order the criterion of P. Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", ICLR 2017; the
second term takes the empirical Fisher information for the curvature (L. Theis et al., "Faster gaze prediction with dense networks and
Fisher pruning", 2018) and is, squared per sample as in P. Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR
2019, what units are ranked by: near a minimum the first term is mostly noise (tests/bench/REPORT.md, section carve).

Both fall short of the truth where the network is sure of its samples, and many units together are another matter than each alone: what is
proposed by this is confirmed by ``counterfactual.missed``, with the units silenced.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from esper_core.errors import InvalidInput
from esper_core.nn.carve.anatomy import Anatomy, Cluster, Part
from esper_core.nn.graft import Graft
from esper_core.nn.host import Host, Slot
from esper_core.nn.probe import Batch, LossFunction, run

KERNEL = "kernel "
"""Begins the name of a cluster that is a whole kernel beside the host, followed by its slot."""


@dataclass(frozen=True)
class Worth:
    """What a cluster's units are worth, one number per unit, in units of the mean loss.

    Attributes:
        importance: ½ mean(g²). Never negative.
        change: how the loss would change without the unit, by both terms; negative where it would fall.
    """

    importance: tuple[float, ...]
    change: tuple[float, ...]


def weigh(host: Host, anatomy: Anatomy, batches: Sequence[Batch], loss_fn: LossFunction) -> dict[str, Worth]:
    """Worth of every unit of every cluster without an obstacle, and of every kernel beside the host, as ``kernel <slot>``, whole.

    Touches no gradient, buffer or random state.

    Raises:
        InvalidInput: there are no batches, or the loss is not a finite scalar.
    """
    if not batches:
        raise InvalidInput("no batches to measure importance on", hint="pass probe batches that can be read again")
    clusters = [cluster for cluster in anatomy.clusters.values() if not cluster.obstacle]
    kernels = [slot for slot in host.slots.values() if slot.graft is not None and slot.graft.attached]
    if not clusters and not kernels:
        return {}
    totals: list[Tensor] = []
    samples = 0
    for inputs, targets in batches:
        slopes = _slopes(host, clusters, kernels, inputs, targets, loss_fn)
        moments = [torch.stack([slope.square().sum(0) / 2, -slope.sum(0)]) for slope in slopes]
        totals = [a + b for a, b in zip(totals, moments, strict=True)] if totals else moments
        samples += len(targets)
    # One transfer for all of them.
    flat = (torch.cat(totals, dim=1) / samples).cpu()
    names = [cluster.name for cluster in clusters] + [KERNEL + slot.name for slot in kernels]
    sizes = [cluster.units for cluster in clusters] + [1] * len(kernels)
    return {
        name: Worth(tuple(part[0].tolist()), tuple(part.sum(0).tolist()))
        for name, part in zip(names, torch.split(flat, sizes, dim=1), strict=True)
    }


def _slopes(
    host: Host,
    clusters: Sequence[Cluster],
    kernels: Sequence[Slot],
    inputs: Any,
    targets: Tensor,
    loss_fn: LossFunction,
) -> list[Tensor]:
    """Each sample's ∂loss/∂gate per cluster and kernel, (samples, units), in double precision."""
    rows = len(targets)
    with ExitStack() as stack:
        stack.enter_context(host.evaluating())
        stack.enter_context(torch.enable_grad())
        gates = []
        for cluster in clusters:
            like = next(host.model.get_submodule(cluster.name).parameters())
            gate = torch.ones(rows, cluster.units, device=like.device, dtype=like.dtype, requires_grad=True)
            gates.append(gate)
            for part in cluster.readers:
                hook = host.model.get_submodule(part.path).register_forward_pre_hook(_Gate(gate, part), prepend=True)
                stack.callback(hook.remove)
        for slot in kernels:
            graft = cast(Graft, slot.graft)
            gate = torch.ones(rows, 1, device=graft.alpha.device, dtype=graft.alpha.dtype, requires_grad=True)
            gates.append(gate)
            stack.callback(graft.kernel.register_forward_hook(partial(_gated, gate)).remove)
        loss = loss_fn(run(host, inputs), targets)
        if loss.ndim or not torch.isfinite(loss):
            raise InvalidInput(
                f"the loss on a probe batch is {loss.tolist()}",
                hint="loss_fn must return a finite mean over the batch",
            )
        found = torch.autograd.grad(loss, gates, allow_unused=True)
    return [
        rows * (torch.zeros_like(gate) if slope is None else slope).detach().double()
        for gate, slope in zip(gates, found, strict=True)
    ]


class _Gate:
    """A pre-hook that multiplies what a module reads of a cluster by the cluster's gates."""

    def __init__(self, gate: Tensor, part: Part) -> None:
        self.gate = gate
        self.places = torch.tensor(part.places, device=gate.device)
        self.units = torch.tensor(part.units, device=gate.device)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        entering: Tensor = args[0]
        dim = 1 if isinstance(module, nn.Conv2d) else entering.ndim - 1
        gate = _per_row(self.gate, entering)
        factor = torch.ones(len(entering), entering.shape[dim], device=gate.device, dtype=gate.dtype)
        factor = factor.index_copy(1, self.places, gate[:, self.units])
        shape = [
            len(entering) if other == 0 else entering.shape[dim] if other == dim else 1
            for other in range(entering.ndim)
        ]
        return entering * factor.view(shape), *args[1:]


def _gated(gate: Tensor, _module: nn.Module, _args: tuple[Any, ...], leaving: Tensor) -> Tensor:
    return leaving * _per_row(gate, leaving).view(-1, *(1 for _ in leaving.shape[1:]))


def _per_row(gate: Tensor, tensor: Tensor) -> Tensor:
    """The gates of a tensor's rows; where its rows are no samples, their mean for all: squares are then of the mean slope."""
    return gate if len(tensor) == len(gate) else gate.mean(0, keepdim=True).expand(len(tensor), -1)
