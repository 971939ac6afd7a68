"""TRAINING on the task itself, still apart from the host: the kernel sees the loss that it would bring, the host sees nothing.

Two ways, both on probe batches with the host's weights held:

    task               the loss of the host with the kernel blended in at full; what the kernel gives feeds back into the loss
    straight-through   the loss of the host as it is, its gradient handed to the kernel as if it had been blended in

Only the kernel's parameters receive gradients; the host's outputs in training, its ``.grad`` and its random state stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from esper_core.nn.graft import Graft
from esper_core.nn.host import Host
from esper_core.nn.probe import Batch, LossFunction, mean_loss, run

PATIENCE = 3
"""Looks at the held-back samples without an improvement after which rehearsing ends."""
CHECK_EVERY = 20
"""Steps between looks at the held-back samples."""


def parted(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Batches to learn from and held-back ones: every fourth sample of each."""
    learn, held = [], []
    for inputs, targets in batches:
        kept = torch.arange(len(targets), device=targets.device) % 4 == 3
        learn.append((_taken(inputs, ~kept), targets[~kept]))
        held.append((_taken(inputs, kept), targets[kept]))
    return learn, [batch for batch in held if len(batch[1])]


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
        By how much the kernel, blended in at full, would lower the held-back loss, as a share of that loss; 0 and the weights
        it came with when it would not; NaN when the kernel gives something that is not finite.
    """
    learn, held = parted(batches)
    kernel = graft.kernel
    dice = torch.Generator().manual_seed(seed)
    parameters = list(kernel.parameters())
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    with _blended(graft):
        before = best = mean_loss(host, held, loss_fn)
        kept, waited = copy.deepcopy(kernel.state_dict()), 0
        for step in range(1, steps + 1):
            inputs, targets = learn[int(torch.randint(len(learn), (1,), generator=dice))]
            with host.evaluating(), torch.enable_grad(), _through(graft, straight_through):
                torch.manual_seed(seed + step)
                gradients = torch.autograd.grad(loss_fn(run(host, inputs), targets), parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            if step % CHECK_EVERY == 0 or step == steps:
                found, waited = mean_loss(host, held, loss_fn), waited + 1
                if not found >= best:  # a NaN is kept as well: the gate must see it
                    best, kept, waited = found, copy.deepcopy(kernel.state_dict()), 0
                if waited == PATIENCE or found != found:
                    break
    optimizer.zero_grad()
    kernel.load_state_dict(kept)
    return (before - best) / abs(before) if before else before - best


@contextmanager
def _blended(graft: Graft) -> Iterator[None]:
    """The kernel in the host at alpha 1; both as before afterwards."""
    alpha = graft.alpha.clone()
    graft.attach()
    graft.alpha.fill_(1.0)
    try:
        yield
    finally:
        graft.detach()
        graft.alpha.copy_(alpha)


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
    if isinstance(inputs, Tensor):
        return inputs[chosen]
    return tuple(value[chosen] if isinstance(value, Tensor) else value for value in inputs)
