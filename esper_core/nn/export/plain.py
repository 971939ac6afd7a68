"""A network as it is without Esper: a copy on the CPU whose kernels stand beside their spans by plain hooks.

A graft guards the host at every pass (finite values, shapes, failures); a network that is handed on needs none of it, so the
exported graph reads ``leaving + alpha * kernel(entering)`` and no more.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from esper_core.nn.graft import Graft
from esper_core.nn.host import Host


class Beside(nn.Module):
    """A kernel and the factor of what it adds."""

    def __init__(self, kernel: nn.Module, alpha: float) -> None:
        super().__init__()
        self.kernel = kernel
        self.alpha = alpha
        self._entering: Tensor | None = None

    def stand(self, source: nn.Module, sink: nn.Module) -> None:
        """From now on what leaves ``sink`` includes ``alpha`` times the kernel of what enters ``source``."""
        source.register_forward_pre_hook(self._remember)
        sink.register_forward_hook(self._add)

    def _remember(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self._entering = args[0]

    def _add(self, _module: nn.Module, _args: tuple[Any, ...], leaving: Tensor) -> Tensor:
        entering, self._entering = self._entering, None
        extra = self.kernel(entering)
        return leaving + extra if self.alpha == 1 else torch.add(leaving, extra, alpha=self.alpha)


def on_cpu(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode on the CPU, its grafts with it; a ``Host`` gives what it wraps."""
    twin = copy.deepcopy(model.model if isinstance(model, Host) else model).cpu().eval()
    for graft in grafts(twin):
        graft.cpu().eval()  # while it grows, the network's module tree does not hold it
    return twin


def plain(model: nn.Module) -> nn.Module:
    """A copy as ``on_cpu`` gives it, free of grafts: those with a say stand beside their spans, the others are left out."""
    twin = on_cpu(model)
    for graft in grafts(twin):
        graft.detach()
        graft.sink._modules.pop("graft", None)
        if graft.broken or graft.muted:
            continue
        beside = Beside(graft.kernel, float(graft.alpha))
        beside.stand(graft.source, graft.sink)
        graft.sink.add_module("graft", beside)
    return twin


def grafts(model: nn.Module) -> list[Graft]:
    """What is blended into the network, found by its hooks."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return [owner for owner in owners if isinstance(owner, Graft)]
