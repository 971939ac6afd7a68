"""Shrinking a network's weights as far as costs next to nothing on held-back data, so that what it has gained can learn.

A network that was too narrow for a while has grown large weights and is sure of itself where it is wrong; with hardly any training
loss left there is hardly any gradient, and new units stay what they are. Trained on from there it generalises worse than one that
was as wide from the start. Shrinking the weights closes most of that gap (Ash and Adams, "On Warm-Starting Neural Network
Training", 2020, who also add noise, which changes the function and is left out here).

How far is the loss's to say, which is judged as the network would be used: a batch normalisation's running statistics are of the
weights before, so a network with one is hardly shrunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

STEPS = 10
"""Factors that are tried between 1 and the smallest."""


@torch.no_grad()
def shrink(parameters: Iterable[Tensor], loss: Callable[[], float], smallest: float, rise: float = 0.0) -> float:
    """Scale all weights (parameters of two or more dimensions) by the smallest factor up to which ``loss`` hardly rises.

    Args:
        loss: of the network as it is, on held-back data.
        smallest: factor to end with at the latest, in (0, 1]; 1 changes nothing.
        rise: share of itself that the loss may rise by.

    Returns:
        The factor; exactly 1 leaves every bit as it was.
    """
    if smallest == 1:
        return 1.0
    weights = [parameter for parameter in parameters if parameter.dim() > 1]
    kept = [weight.clone() for weight in weights]
    first, factor = loss(), 1.0
    limit = first + rise * abs(first)
    for step in range(1, STEPS + 1):
        tried = 1 - (1 - smallest) * step / STEPS
        _scale(weights, kept, tried)
        if not loss() <= limit:  # what is not a number is no gain either
            break
        factor = tried
    _scale(weights, kept, factor)
    return factor


def _scale(weights: Iterable[Tensor], kept: Iterable[Tensor], factor: float) -> None:
    for weight, before in zip(weights, kept, strict=True):
        weight.copy_(before * factor)
