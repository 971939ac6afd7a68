"""One pass over a probe set that sees, at every slot at once, what enters, what the sink reads, and the gradient that comes back.

Runs in evaluation mode on the eager host, touches no ``.grad``, no buffer and no random state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from esper_core.errors import InvalidInput
from esper_core.nn.host import Host, Slot

Batch = tuple[Any, Tensor]
LossFunction = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Sight:
    """What one probe batch shows at one slot.

    Attributes:
        entering: input of the source, (batch, …).
        inner: input of the sink, (batch, …).
        descent: −∂L/∂z per sample, z the sink's output, (batch, …); scaled by the batch so that it does not depend on its size.
    """

    entering: Tensor
    inner: Tensor
    descent: Tensor


def run(host: Host, inputs: Any) -> Any:
    """The host's output for one batch of inputs: a tensor, or a tuple of arguments."""
    return host(*inputs) if isinstance(inputs, tuple) else host(inputs)


def each_tensor(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A batch's inputs with every tensor in them changed: a tensor, or tuples of tensors and of other things, which stay."""
    if isinstance(inputs, tuple):
        return tuple(each_tensor(value, change) for value in inputs)
    return change(inputs) if isinstance(inputs, Tensor) else inputs


def first(batches: Iterable[Batch], samples: int) -> list[Batch]:
    """The first batches that have so many samples together, or a few more; all when there are not as many."""
    chosen: list[Batch] = []
    left = samples
    for batch in batches:
        if left <= 0:
            break
        chosen.append(batch)
        left -= len(batch[1])
    return chosen


def mean_loss(host: Host, batches: Iterable[Batch], loss_fn: LossFunction) -> float:
    """Mean loss over the samples of one batch or more, in evaluation mode."""
    with host.evaluating():
        return mean_loss_of(partial(run, host), batches, loss_fn)


@torch.no_grad()
def mean_loss_of(outputs: Callable[[Any], Any], batches: Iterable[Batch], loss_fn: LossFunction) -> float:
    """Mean loss over the samples of one batch or more, of whatever gives ``outputs`` for inputs."""
    total, count = 0.0, 0
    for inputs, targets in batches:
        total += float(loss_fn(outputs(inputs), targets)) * len(targets)
        count += len(targets)
    return total / count


def look(
    host: Host, slots: Iterable[Slot], batches: Iterable[Batch], loss_fn: LossFunction
) -> Iterator[tuple[float, dict[str, Sight]]]:
    """Yield (mean loss, sight per slot name) for each batch.

    Raises:
        InvalidInput: when the loss is not a finite scalar.
    """
    places = list(slots)
    for inputs, targets in batches:
        with host.evaluating(), torch.enable_grad(), _Eyes(places) as eyes:
            loss = loss_fn(run(host, inputs), targets)
            if loss.ndim or not torch.isfinite(loss):
                raise InvalidInput(
                    f"the loss on a probe batch is {loss.tolist()}",
                    hint="loss_fn must return a finite mean over the batch",
                )
            leaving = [eyes.leaving[slot.name] for slot in places]
            gradients = torch.autograd.grad(loss, leaving, allow_unused=True)
        sights = {}
        for slot, z, gradient in zip(places, leaving, gradients, strict=True):
            descent = torch.zeros_like(z) if gradient is None else -gradient * len(z)
            sights[slot.name] = Sight(eyes.entering[slot.name], eyes.inner[slot.name], descent.detach())
        yield float(loss.detach()), sights


class _Eyes:
    """Forward hooks on sources and sinks for the length of one batch."""

    def __init__(self, slots: list[Slot]) -> None:
        self.slots = slots
        self.entering: dict[str, Tensor] = {}
        self.inner: dict[str, Tensor] = {}
        self.leaving: dict[str, Tensor] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> _Eyes:
        for slot in self.slots:
            self._hooks.append(slot.source.register_forward_pre_hook(self._at_source(slot.name)))
            self._hooks.append(slot.sink.register_forward_hook(self._at_sink(slot.name)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _at_source(self, name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def hook(_module: Any, args: tuple[Tensor, ...]) -> None:
            self.entering[name] = args[0].detach()

        return hook

    def _at_sink(self, name: str) -> Callable[[Any, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            self.inner[name] = args[0].detach()
            # A wholly frozen prefix gives an output without a gradient; the probe needs one all the same.
            z = output if output.requires_grad else output.detach().requires_grad_()
            self.leaving[name] = z
            return z.clone()  # an activation in place would overwrite it, and its gradient with it

        return hook
