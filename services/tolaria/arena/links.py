"""A network read as linear layers one after the other, for whoever wants to build it anew in another form."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

_ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SELU, nn.SiLU, nn.Tanh)
"""Elementwise, and zero at zero, so that a new unit with small weights says little."""


@dataclass(frozen=True)
class Link:
    """A linear layer and the elementwise function after it.

    Attributes:
        path: of the layer in its network.
    """

    path: str
    linear: nn.Linear
    activation: nn.Module


def links(network: nn.Module) -> list[Link]:
    """The layers in order; empty when the network is anything else than these, with or without a flattening before them."""
    if not isinstance(network, nn.Sequential):
        return []
    found: list[Link] = []
    before: nn.Module | None = None
    for path, part in network._modules.items():  # named_children leaves out a module that was there already
        if isinstance(part, nn.Linear):
            found.append(Link(path, part, nn.Identity()))
        elif isinstance(part, _ACTIVATIONS) and isinstance(before, nn.Linear):
            found[-1] = replace(found[-1], activation=part)
        elif not isinstance(part, nn.Flatten) or before is not None:
            return []
        before = part
    return found
