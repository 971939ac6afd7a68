"""TRAINING on the task itself, still apart from the host: the kernel sees the loss that it would bring, the host sees nothing.

Two ways, both on probe batches with the host's weights held:

    task               the loss of the host with the kernel blended in at full; what the kernel gives feeds back into the loss
    straight-through   the loss of the host as it is, its gradient handed to the kernel as if it had been blended in

Only the kernel's parameters receive gradients; the host's outputs in training, its ``.grad`` and its random state stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from esper_core.errors import InvalidInput
from esper_core.nn.graft import Graft
from esper_core.nn.host import Host
from esper_core.nn.keeping import CHECK_EVERY, Best
from esper_core.nn.probe import Batch, LossFunction, each_tensor, mean_loss, run


def parted(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Batches to learn from and held-back ones: every fourth sample, counted across batches, however small they are.

    Raises:
        InvalidInput: when there are too few samples to hold one back.
    """
    learn: list[Batch] = []
    held: list[Batch] = []
    seen = 0
    for inputs, targets in batches:
        kept = torch.arange(seen, seen + len(targets), device=targets.device) % 4 == 3
        seen += len(targets)
        for part, chosen in ((learn, ~kept), (held, kept)):
            if bool(chosen.any()):
                part.append((_taken(inputs, chosen), targets[chosen]))
    if not held:
        raise InvalidInput(
            f"the probe has {seen} samples, of which none can be held back",
            hint="pass a list of (inputs, targets), 1024 samples or more in all",
        )
    return learn, held


def rehearse(
    host: Host,
    graft: Graft,
    batches: Sequence[Batch],
    loss_fn: LossFunction,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    straight_through: bool = False,
) -> float:
    """Train a bound kernel with Adam at alpha 1 and keep the weights that did best on the held-back samples.

    Returns:
        By how much the kernel, blended in at full, lowers the held-back loss of the host without it, as a share of that loss:
        0 for a silent kernel that learnt nothing, negative for one that harms by now; NaN when what the kernel gives is not
        finite. A kernel that these steps did not improve has the weights that it came with.

    Raises:
        InvalidInput: when there are too few samples to hold one back.
    """
    learn, held = parted(batches)
    before = mean_loss(host, held, loss_fn)
    kernel = graft.kernel
    dice = torch.Generator().manual_seed(seed)
    parameters = list(kernel.parameters())
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    with _blended(graft):
        best = Best(kernel, -_look(host, graft, held, loss_fn))
        for step in range(1, steps + 1 if math.isfinite(best.figure) else 1):
            inputs, targets = learn[int(torch.randint(len(learn), (1,), generator=dice))]
            with host.evaluating(), torch.enable_grad(), _through(graft, straight_through):
                torch.manual_seed(seed + step)
                gradients = torch.autograd.grad(loss_fn(run(host, inputs), targets), parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            due = step % CHECK_EVERY == 0 or step == steps
            if due and not best.look(-_look(host, graft, held, loss_fn)):
                break
    optimizer.zero_grad()
    gained = before + best.restore()
    return gained / abs(before) if before else gained


@contextmanager
def _blended(graft: Graft) -> Iterator[None]:
    """The kernel in the host at alpha 1; both as before afterwards. What fails in rehearsing is no failure on the stage."""
    alpha, faults, raised = graft.alpha.clone(), graft.faults.clone(), graft.raised
    graft.attach()
    graft.alpha.fill_(1.0)
    try:
        yield
    finally:
        graft.detach()
        graft.alpha.copy_(alpha)
        graft.faults.copy_(faults)
        graft.raised = raised


def _look(host: Host, graft: Graft, held: Sequence[Batch], loss_fn: LossFunction) -> float:
    """The held-back loss; NaN when the kernel was left out of a pass."""
    graft.faults.zero_()
    graft.raised = 0
    loss = mean_loss(host, held, loss_fn)
    return math.nan if graft.errors else loss


@contextmanager
def _through(graft: Graft, straight: bool) -> Iterator[None]:
    """While inside the kernel learns; if ``straight``, its output counts as zero forwards and as itself backwards."""

    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output - output.detach() if straight else output

    handle = graft.kernel.register_forward_hook(hook)
    graft.learning = True
    try:
        yield
    finally:
        graft.learning = False
        handle.remove()


def _taken(inputs: Any, chosen: Tensor) -> Any:
    """The chosen samples; what has no row per sample, a mask of all positions say, as it is."""
    return each_tensor(inputs, lambda value: value[chosen] if value.ndim and len(value) == len(chosen) else value)
