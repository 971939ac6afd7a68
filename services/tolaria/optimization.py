"""Optimiser and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from services.tolaria.config import OptimizationConfig


def optimizer_for(config: OptimizationConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The configured optimiser over ``parameters``."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
        )
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)


def learning_rate(config: OptimizationConfig, epoch: int) -> float:
    """The rate of one epoch: linear rise over the warm-up, then constant or half a cosine down to its last epoch."""
    if epoch < config.warmup_epochs:
        return config.learning_rate * (epoch + 1) / (config.warmup_epochs + 1)
    if config.schedule == "constant":
        return config.learning_rate
    last = max(config.epochs - 1 - config.warmup_epochs, 1)
    way = min((epoch - config.warmup_epochs) / last, 1.0)
    left = config.final_fraction
    return config.learning_rate * (left + (1 - left) * 0.5 * (1 + math.cos(math.pi * way)))
