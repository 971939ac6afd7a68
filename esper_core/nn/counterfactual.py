"""What a graft really contributes: the same held-back batches, with it and without it, at the same weights.

This is the value of its *presence*, given that the host has adapted to it; what the run would have become without it needs a twin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch
from scipy.special import stdtrit

from esper_core.errors import InvalidInput
from esper_core.nn.graft import Graft
from esper_core.nn.host import Host
from esper_core.nn.probe import Batch, LossFunction, each_tensor, run

CHUNKS = 16
"""Paired differences at least, where the data allow; the bound rests on their spread."""


@dataclass(frozen=True)
class Contribution:
    """Loss without the kernel, or whatever part was asked about, minus loss with it.

    Attributes:
        mean: over samples.
        lower: one-sided 95 % lower bound, Student's t over paired chunks.
        loss: mean loss with it.
        chunks: paired differences the bound rests on.
    """

    mean: float
    lower: float
    loss: float
    chunks: int

    @property
    def upper(self) -> float:
        """One-sided 95 % upper bound; infinite when something was not finite."""
        return 2 * self.mean - self.lower if math.isfinite(self.mean) else math.inf


def contribution(host: Host, graft: Graft, batches: Sequence[Batch], loss_fn: LossFunction) -> Contribution:
    """Measure a blended graft on held-back batches.

    Raises:
        InvalidInput: with fewer than two samples.
    """

    def silence(silent: bool) -> None:
        graft.muted = silent

    return missed(host, silence, batches, loss_fn)


@torch.no_grad()
def missed(
    host: Host, silence: Callable[[bool], None], batches: Sequence[Batch], loss_fn: LossFunction
) -> Contribution:
    """What the host would miss without a part of it, measured on held-back batches.

    Args:
        silence: called with True, lets the host run without the part, and with it again when called with False.

    Raises:
        InvalidInput: with fewer than two samples.
    """
    differences, losses, weights = [], [], []
    with host.evaluating():
        for inputs, targets in _chunks(batches):
            with_it = float(loss_fn(run(host, inputs), targets))
            silence(True)
            try:
                without = float(loss_fn(run(host, inputs), targets))
            finally:
                silence(False)
            differences.append(without - with_it)
            losses.append(with_it)
            weights.append(len(targets))
    if len(differences) < 2:
        raise InvalidInput(
            "too little held-back data to judge by", hint="pass validation batches with 32 samples or more"
        )
    total = sum(weights)
    mean = sum(d * w for d, w in zip(differences, weights, strict=True)) / total
    spread = sum(w * (d - mean) ** 2 for d, w in zip(differences, weights, strict=True)) / total
    n = len(differences)
    lower = mean - float(stdtrit(n - 1, 0.95)) * math.sqrt(spread / (n - 1))
    loss = sum(value * w for value, w in zip(losses, weights, strict=True)) / total
    finite = math.isfinite(mean) and math.isfinite(loss)
    return Contribution(mean if finite else -math.inf, lower if finite else -math.inf, loss, n)


def _chunks(batches: Sequence[Batch]) -> Iterator[Batch]:
    samples = sum(len(targets) for _, targets in batches)
    size = max(1, min(256, samples // CHUNKS))
    for inputs, targets in batches:
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            yield each_tensor(inputs, itemgetter(part)), targets[part]
