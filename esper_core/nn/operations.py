"""How much a kernel adds to what a network computes: it stands for latency where a decision must not depend on machine and moment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from esper_core.blueprint.build import KernelModule
from esper_core.blueprint.interface import Layout
from esper_core.nn.host import Host, Slot
from esper_core.nn.probe import Batch, run
from esper_core.nn.trace import Growable


@contextmanager
def visited(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[torch.Size]]]:
    """Shapes of what each module gave while inside, one per call, by path; a module that did not run has none."""
    shapes: dict[str, list[torch.Size]] = {path: [] for path in modules}

    def note(path: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        shapes[path].append(output.shape)

    hooks = [module.register_forward_hook(partial(note, path)) for path, module in modules.items()]
    try:
        yield shapes
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def slowdown(host: Host, slot: Slot, batch: Batch) -> float:
    """Operations of the slot's kernel as a share of the host's own, both for one sample's forward pass.

    The host's are those of its linear and convolutional layers: every weight is used once at each position of a layer's output, for
    a product and a sum. What else it does (norms, activations, attention between tokens) is left out; 0 for one that has no such layer.
    """
    inputs, targets = batch
    layers = {path: module for path, module in host.model.named_modules() if isinstance(module, Growable)}
    with visited({**layers, slot.sink_path: slot.sink}) as shapes, host.evaluating():
        run(host, inputs)
    counted = 0
    for path, layer in layers.items():
        positions = sum(shape.numel() // len(layer.weight) for shape in shapes[path])
        counted += 2 * layer.weight.numel() * positions
    # Where the number of tokens is open, a kernel's papers speak of one.
    is_open = slot.interface.layout is Layout.TOKENS and not slot.interface.in_size
    tokens = shapes[slot.sink_path][-1][1] if is_open else 1
    assert slot.graft is not None  # noqa: S101
    kernel = cast(KernelModule, slot.graft.kernel)
    return kernel.analysis.flops * tokens * len(targets) / counted if counted else 0.0
