"""Vital signs of a slot's units on a probe: what is alive, how varied, how redundant. Measured, or absent."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from esper_core.blueprint.interface import Layout
from esper_core.errors import InvalidInput


@dataclass(frozen=True)
class Vitals:
    """Field names equal those of ``esper.core.v1.HealthSignal``."""

    activation_variance: float
    dead_unit_ratio: float
    mean_correlation: float
    effective_rank: float
    gradient_norm: float


class Units:
    """Running moments of the spanned layer's units over a probe, float64."""

    def __init__(self) -> None:
        self.rows = 0
        self.total: Tensor | None = None
        self.outer: Tensor | None = None
        self.peak: Tensor | None = None
        self.gradient_square = 0.0
        self.gradient_count = 0

    def add(self, inner: Tensor, descent: Tensor, layout: Layout) -> None:
        """Count one batch: the sink's input (batch, …) and the descent direction at its output."""
        rows = (inner.permute(0, 2, 3, 1).flatten(0, 2) if layout is Layout.IMAGE else inner.flatten(0, -2)).double()
        total, outer, peak = rows.sum(0), rows.T @ rows, rows.abs().amax(0)
        if self.total is None or self.outer is None or self.peak is None:
            self.total, self.outer, self.peak = total, outer, peak
        else:
            self.total, self.outer, self.peak = self.total + total, self.outer + outer, torch.maximum(self.peak, peak)
        self.rows += len(rows)
        self.gradient_square += float(descent.double().square().sum())
        self.gradient_count += descent.numel()

    def conclude(self) -> Vitals:
        """The figures, from what was counted; at least one batch is needed."""
        if self.total is None or self.outer is None or self.peak is None:
            raise InvalidInput("no batch was counted")
        mean = self.total / self.rows
        covariance = self.outer / self.rows - torch.outer(mean, mean)
        variance = covariance.diagonal().clamp_min(0)
        return Vitals(
            activation_variance=float(variance.mean()),
            dead_unit_ratio=float((self.peak == 0).double().mean()),
            mean_correlation=_mean_correlation(covariance, variance),
            effective_rank=_effective_rank(covariance),
            gradient_norm=math.sqrt(self.gradient_square / max(self.gradient_count, 1)),
        )


def _mean_correlation(covariance: Tensor, variance: Tensor) -> float:
    """Mean |off-diagonal correlation| among units that vary at all; 0 for fewer than two of them."""
    alive = variance > variance.max() * 1e-12
    count = int(alive.sum())
    if count < 2:
        return 0.0
    deviation = variance[alive].sqrt()
    correlation = (covariance[alive][:, alive] / torch.outer(deviation, deviation)).abs().clamp_max(1)
    return float((correlation.sum() - correlation.diagonal().sum()) / (count * (count - 1)))


def _effective_rank(covariance: Tensor) -> float:
    """exp(entropy) of the normalised spectrum (Roy and Vetterli, 2007); 0 when nothing varies."""
    values = torch.linalg.eigvalsh(covariance).clamp_min(0)
    total = values.sum()
    if total <= 0:
        return 0.0
    shares = values[values > 0] / total
    return float(torch.exp(-(shares * shares.log()).sum()))
