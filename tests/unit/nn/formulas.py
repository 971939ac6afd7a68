"""The growth signal written out by hand, row by row, in numpy: what the fast one is compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from esper_core.nn.signals import FOLDS
from tests.unit.nn.hosts import LOSS

Rows = NDArray[np.float64]
EPSILON = 1e-6


@dataclass
class Figures:
    """What the formulas give."""

    gain: float
    share: float
    score: float
    gain_relative: float
    gain_of_loss: float
    spectrum: list[float]


def inverse_root(moment: Rows) -> Rows:
    """(S + εI)^-½."""
    values, vectors = np.linalg.eigh(damped(moment))
    total = np.zeros_like(moment)
    for value, vector in zip(values, vectors.T, strict=True):
        total += np.outer(vector, vector) / math.sqrt(value)
    return total


def damped(moment: Rows) -> Rows:
    """ε is a share of the mean eigenvalue."""
    ridge: Rows = moment + (EPSILON * np.trace(moment) / len(moment) or EPSILON) * np.eye(len(moment))
    return ridge


def formulas(h0: Rows, h: Rows, g: Rows, loss: float, positions: float) -> Figures:
    """3-growth §2 on rows: what enters the span, what the sink reads, −∂L/∂z; a unit acts at every position of a sample."""
    n = len(h0)
    h1 = np.hstack([h, np.ones((n, 1))])
    moment = h1.T @ h1
    weights = np.linalg.solve(damped(moment), h1.T @ g)
    orthogonal = g - h1 @ weights
    cross = np.zeros((h0.shape[1], g.shape[1]))
    for entering, wanted in zip(h0, orthogonal, strict=True):
        cross += np.outer(entering, wanted) / n
    whitened = inverse_root(h0.T @ h0 / n) @ cross
    spectrum = np.linalg.svd(whitened, compute_uv=False) ** 2 * positions
    own = np.sum((inverse_root(moment / n) @ (h1.T @ g / n)) ** 2) * positions
    natural = np.linalg.svd(whitened @ inverse_root(g.T @ g / n), compute_uv=False) ** 2
    gain = spectrum.sum()
    power = np.mean(np.sum(g**2, axis=1)) * positions
    return Figures(gain, gain / (gain + own), natural.sum(), gain / power, gain / abs(loss), spectrum.tolist())


@dataclass
class Sight:
    """Rows of one batch at one span that the loss hears, its samples, and its loss."""

    entering: Rows
    inner: Rows
    descent: Rows
    samples: int
    loss: float


def sights(model: nn.Sequential, source: int, sink: int, data: Sequence[tuple[Tensor, Tensor]]) -> list[Sight]:
    """The same figures as the probe's, by running the layers one after the other."""
    found = []
    model.eval()
    for inputs, targets in data:
        value, tensors = inputs, {}
        for index, layer in enumerate(model):
            tensors[index] = value
            value = layer(value)
            if index == sink:
                value = value.detach().requires_grad_()
                leaving = value
        loss = LOSS(value if value.ndim == 2 else value.mean(1), targets)
        (gradient,) = torch.autograd.grad(loss, leaving)
        convs = (model[source], model[sink])
        entering, inner, descent = tensors[source].detach(), tensors[sink].detach(), -gradient * len(targets)
        if isinstance(convs[1], nn.Conv2d):
            first, last = cast(tuple[nn.Conv2d, nn.Conv2d], convs)
            grid = descent.shape[2:]
            both = (first.stride[0] * last.stride[0], first.stride[1] * last.stride[1])
            rows = (patches(entering, first, both, grid), patches(inner, last, last.stride, grid))
            rows = (*rows, descent.permute(0, 2, 3, 1).reshape(-1, descent.shape[1]).numpy())
        else:
            rows = tuple(t.reshape(-1, t.shape[-1]).numpy() for t in (entering, inner, descent))
        heard = [bool(np.any(row)) for row in rows[2]]
        found.append(Sight(*(part[heard] for part in rows), samples=len(targets), loss=loss.item()))  # type: ignore[call-arg]
    return found


def patches(maps: Tensor, conv: nn.Conv2d, stride: tuple[int, ...], grid: Sequence[int]) -> Rows:
    """What a convolution's window sees at each position of ``grid``; zero outside the image."""
    rows = []
    padding = cast(tuple[int, int], conv.padding)
    for image in maps.numpy():
        for top in range(grid[0]):
            for left in range(grid[1]):
                row = []
                for channel in image:
                    for i in range(conv.kernel_size[0]):
                        for j in range(conv.kernel_size[1]):
                            y = top * stride[0] - padding[0] + i * conv.dilation[0]
                            x = left * stride[1] - padding[1] + j * conv.dilation[1]
                            inside = 0 <= y < channel.shape[0] and 0 <= x < channel.shape[1]
                            row.append(channel[y, x] if inside else 0.0)
                rows.append(row)
    return np.array(rows)


def oracle(found: Sequence[Sight]) -> tuple[Figures, float]:
    """(figures of all rows, confidence by a delete-one jackknife over the folds)."""
    positions = sum(len(sight.descent) for sight in found) / sum(sight.samples for sight in found)
    mean = sum(sight.loss for sight in found) / len(found)
    folds: list[list[tuple[Rows, Rows, Rows]]] = [[] for _ in range(FOLDS)]
    for number, sight in enumerate(found):
        parts = [np.array_split(rows, FOLDS) for rows in (sight.entering, sight.inner, sight.descent)]
        for offset in range(FOLDS):
            folds[(number + offset) % FOLDS].append((parts[0][offset], parts[1][offset], parts[2][offset]))

    def of(kept: list[list[tuple[Rows, Rows, Rows]]]) -> Figures:
        pieces = [piece for fold in kept for piece in fold]
        h0, h, g = (np.vstack([piece[k] for piece in pieces]) for k in range(3))
        return formulas(h0, h, g, mean, positions)

    whole = of(folds)
    logs = [math.log(need(of(folds[:k] + folds[k + 1 :]))) for k in range(FOLDS)]
    centre = sum(logs) / FOLDS
    error = math.sqrt((FOLDS - 1) / FOLDS * sum((value - centre) ** 2 for value in logs))
    return whole, 0.5 * (1 + math.erf(math.log(need(whole)) / error / math.sqrt(2)))


def need(figures: Figures) -> float:
    return min(figures.share / 0.5, figures.gain_of_loss / 0.002)
