"""Floating-point operations of a training step and of growing, as torch counts them plus the factorisations it does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from esper_core.nn.chance import undisturbed
from esper_core.nn.probe import LossFunction

_aten: Any = torch.ops.aten


def _cholesky(shape: Any, *_: Any, **__: Any) -> int:
    return int(shape[-1] ** 3 // 3)


def _triangular(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return int(a[-1] ** 2 * b[-1])


def _cholesky_solve(b: Any, a: Any, *_: Any, **__: Any) -> int:
    return int(2 * a[-1] ** 2 * b[-1])


def _eigenvalues(shape: Any, *_: Any, **__: Any) -> int:
    return int(4 * shape[-1] ** 3 // 3)


_FACTORISATIONS = {
    _aten.linalg_cholesky_ex: _cholesky,
    _aten.linalg_solve_triangular: _triangular,
    _aten.cholesky_solve: _cholesky_solve,
    _aten._linalg_eigh: _eigenvalues,
}
"""Usual operation counts (Golub and Van Loan, Matrix Computations)."""


@dataclass
class Effort:
    """Operations counted so far."""

    flops: int = 0


@contextmanager
def counted() -> Iterator[Effort]:
    """Counts what runs inside; slows it down."""
    effort = Effort()
    with FlopCounterMode(display=False, custom_mapping=_FACTORISATIONS) as counter:
        yield effort
    effort.flops = counter.get_total_flops()


def step_flops(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, loss_fn: LossFunction) -> int:
    """Of one forward and backward pass; gradients and buffers, running statistics say, stay as they were."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with undisturbed(), counted() as effort:
        torch.autograd.grad(loss_fn(model(inputs), targets), parameters, allow_unused=True)
    for buffer, before in buffers:
        buffer.copy_(before)
    return effort.flops
