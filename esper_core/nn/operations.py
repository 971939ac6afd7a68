"""How much a kernel adds to what a network computes: it stands for latency where a decision must not depend on machine and moment."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from esper_core.blueprint.build import KernelModule
from esper_core.blueprint.interface import Layout
from esper_core.nn.host import Host, Slot
from esper_core.nn.probe import Batch, run
from esper_core.nn.trace import Growable


@torch.no_grad()
def slowdown(host: Host, slot: Slot, batch: Batch) -> float:
    """Operations of the slot's kernel as a share of the host's own, both for one sample's forward pass.

    The host's are those of its linear and convolutional layers: every weight is used once at each position of a layer's output, for
    a product and a sum. What else it does (norms, activations, attention between tokens) is left out; 0 for one that has no such layer.
    """
    counted, tokens = 0, 1

    def count(layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        nonlocal counted
        weight = cast(Tensor, layer.weight)
        counted += 2 * weight.numel() * (output.numel() // len(weight))

    def look(_sink: nn.Module, _inputs: Any, output: Tensor) -> None:
        nonlocal tokens
        tokens = output.shape[1]

    inputs, targets = batch
    layers = [module for module in host.model.modules() if isinstance(module, Growable)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    # Where the number of tokens is open, a kernel's papers speak of one.
    if slot.interface.layout is Layout.TOKENS and not slot.interface.in_size:
        hooks.append(slot.sink.register_forward_hook(look))
    try:
        with host.evaluating():
            run(host, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    assert slot.graft is not None  # noqa: S101
    kernel = cast(KernelModule, slot.graft.kernel)
    return kernel.analysis.flops * tokens * len(targets) / counted if counted else 0.0
