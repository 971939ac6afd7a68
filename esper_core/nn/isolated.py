"""TRAINING: a kernel learns, apart from the host, to reconstruct the update the host wants and cannot make.

The target is G⊥ of ``signals``, seen on probe batches; the kernel sees only what enters its span. The host runs without any hook, so
its outputs, gradients and random state are those of a run without seeds, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper_core.blueprint.build import KernelModule
from esper_core.nn.chance import undisturbed
from esper_core.nn.graft import Graft
from esper_core.nn.host import Host, Slot
from esper_core.nn.keeping import CHECK_EVERY, Best
from esper_core.nn.probe import Batch, LossFunction, look, mean_loss
from esper_core.nn.rows import inner_rows, leaving_map, leaving_rows
from esper_core.nn.signals import damped_root

AMPLITUDES = tuple(2.0**power for power in range(-3, 9))
"""Step lengths along the learnt direction that are tried before grafting, in units of the target's own scale."""


@dataclass(frozen=True)
class Lesson:
    """Pairs to learn from.

    Attributes:
        entering: what the kernel reads, per probe batch, (batch, …).
        wanted: G⊥ at the sink's output, per probe batch, scaled to unit root mean square.
        scale: the root mean square it had.
    """

    entering: list[Tensor]
    wanted: list[Tensor]
    scale: float


def prepare(host: Host, slot: Slot, batches: Iterable[Batch], loss_fn: LossFunction) -> Lesson:
    """Look at the probe once and take from G what the sink's own weights could do by themselves."""
    sights = [sights[slot.name] for _, sights in look(host, [slot], batches, loss_fn)]
    interface = slot.interface
    inner = torch.cat([inner_rows(sight.inner, interface) for sight in sights]).double()
    descent = torch.cat([leaving_rows(sight.descent, interface) for sight in sights]).double()
    residual: Tensor = descent - inner @ torch.cholesky_solve(inner.T @ descent, damped_root(inner.T @ inner))
    scale = float(residual.square().mean().sqrt())
    rows = (residual / scale if scale > 0 else residual).to(sights[0].descent.dtype)
    counts = [len(leaving_rows(sight.descent, interface)) for sight in sights]
    parts = rows.split(counts)  # type: ignore[no-untyped-call]
    wanted = [leaving_map(part, sight.descent, interface) for part, sight in zip(parts, sights, strict=True)]
    return Lesson([sight.entering for sight in sights], wanted, scale)


def teach(kernel: nn.Module, lesson: Lesson, *, steps: int, learning_rate: float, batch: int, seed: int) -> float:
    """Fit the kernel to the lesson with Adam; every fifth sample is held back, and the weights that did best on those are kept.

    Returns:
        Share of the held-back target's variance that the kernel reconstructs: 1 is perfect, 0 nothing, negative worse than nothing.
    """
    entering, wanted = torch.cat(lesson.entering), torch.cat(lesson.wanted)
    held = torch.arange(len(entering), device=entering.device) % 5 == 4
    inputs, targets = entering[~held], wanted[~held]
    optimizer = torch.optim.Adam(kernel.parameters(), lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    best = Best(kernel, _reconstruction(kernel, entering[held], wanted[held]))
    kernel.train()
    with undisturbed(), torch.enable_grad():
        torch.manual_seed(seed)
        for step in range(1, steps + 1):
            chosen = torch.randint(len(inputs), (min(batch, len(inputs)),), generator=generator).to(inputs.device)
            loss = nn.functional.mse_loss(kernel(inputs[chosen]), targets[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            due = step % CHECK_EVERY == 0 or step == steps
            if due and not best.look(_reconstruction(kernel, entering[held], wanted[held])):
                break
    optimizer.zero_grad()
    return best.restore()


@torch.no_grad()
def _reconstruction(kernel: nn.Module, entering: Tensor, wanted: Tensor) -> float:
    power = wanted.square().mean()
    kernel.eval()
    error = nn.functional.mse_loss(kernel(entering), wanted)
    kernel.train()
    return float(1 - error / power) if power > 0 else 0.0


def amplify(
    host: Host, graft: Graft, kernel: KernelModule, lesson: Lesson, batches: Sequence[Batch], loss_fn: LossFunction
) -> float:
    """Scale the kernel's way out to the step length that lowers the probe loss most.

    Returns:
        The loss decrease at that length; 0 and an unscaled kernel when no length lowers it.
    """
    was = graft.alpha.clone()
    graft.attach()
    try:
        losses = {0.0: _loss_at(host, graft, 0.0, batches, loss_fn)}
        for amplitude in AMPLITUDES:
            length = amplitude * lesson.scale
            losses[length] = _loss_at(host, graft, length, batches, loss_fn)
            if losses[length] > min(losses.values()):
                break  # along a line the loss is nearly convex: from here on it only rises
    finally:
        graft.detach()
        graft.alpha.copy_(was)
    best = min(losses, key=lambda length: losses[length])
    if best > 0:
        scale_output(kernel, best)
    return losses[0.0] - losses[best]


@torch.no_grad()
def scale_output(kernel: KernelModule, factor: float) -> None:
    """Multiply what the kernel gives by ``factor``: its output is linear in the parameters that began at zero."""
    for name in kernel.analysis.silenced:
        node = kernel.get_submodule(name)
        leaving = node.get_submodule("out") if any(child == "out" for child, _ in node.named_children()) else node
        for parameter in leaving.parameters():
            parameter.mul_(factor)


@torch.no_grad()
def _loss_at(host: Host, graft: Graft, alpha: float, batches: Sequence[Batch], loss_fn: LossFunction) -> float:
    graft.alpha.fill_(alpha)
    loss = mean_loss(host, batches, loss_fn)
    return loss if loss == loss else float("inf")
