"""Hosts with a trained kernel blended in, ready to be folded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from esper_core.nn.host import Host, Slot
from tests.unit.nn.hosts import batches, make, planted, wrapped

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.05),
    "momentum": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, 1e-2),
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, 1e-2, amsgrad=True, weight_decay=0.0),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, 1e-3),
}


RESIDUAL = "layer.0.conv1:layer.0.conv2"


NORMED = [
    ("normed", "0:3", "bottleneck_mlp"),
    ("normed", "3:6", "bottleneck_mlp"),
    ("resnet", RESIDUAL, "conv_bypass_3x3"),
]


def host_of(family: str, dtype: torch.dtype = torch.float64) -> Host:
    return wrapped(family, make(family).to(dtype))


def graft(host: Host, name: str, blueprint: str, alpha: float = 1.0) -> Slot:
    """Plant a kernel and blend it in."""
    slot = host.slots[name]
    planted(slot, blueprint, **({} if blueprint == "linear_bypass" else {"width": 4}))
    assert slot.graft is not None
    slot.graft.alpha.fill_(alpha)
    slot.graft.attach()
    return slot


def kernel_parameters(slot: Slot) -> list[nn.Parameter]:
    """All but the way out's bias: host and kernel have one each there, and folding makes one of the two."""
    assert slot.graft is not None
    parameters = dict(slot.graft.kernel.named_parameters())
    if "B.bias" in parameters:
        parameters.pop("B.bias").requires_grad_(False)
    return list(parameters.values())


def data(family: str, count: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> list[tuple[Any, Tensor]]:
    return [(inputs.to(dtype), targets) for inputs, targets in batches(family, count, seed=seed)]


def outputs(host: Host, family: str, dtype: torch.dtype = torch.float64) -> Tensor:
    with torch.no_grad(), host.evaluating():
        return cast(Tensor, host(data(family, 1, seed=5, dtype=dtype)[0][0]))
