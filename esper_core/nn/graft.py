"""A kernel blended into the host: reads what enters the span, adds ``alpha`` times its output to what leaves it.

    h ──► source ──► … ──► sink ──► z ──(+)──►
    └────────► kernel ──► · alpha ───────┘

Blending is two forward hooks, present only while the kernel is blended: a dormant or isolated slot leaves no trace in the host's
graph. A kernel that raises, gives a wrong shape or a non-finite value is left out of that forward pass and counted; after three such
passes it is not asked again. Alpha is a zero-dimensional buffer, so moving it recompiles nothing; blending and its end are marked on
both ends and what they are in, so that a host compiled before follows. A kernel with batch statistics uses those of the batch when
the host's own norm does, and its running ones otherwise.

Does not protect against a kernel that never returns, nor against one that reads or writes other memory of the process: who may bind a
kernel at all is decided by signatures, before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import structlog
import torch
from torch import Tensor, nn

from esper_core.nn.mark import mark, unmark

BREAKER = 3
"""Failures after which a kernel is not asked again."""

log = structlog.get_logger(__name__)


class Graft(nn.Module):
    """One kernel at one span.

    Args:
        source: the module whose input the kernel reads.
        sink: the module to whose output the kernel adds.
        kernel: maps (batch, …) of the interface's entering shape to its leaving shape.
        like: a tensor of the device and dtype that the kernel shall have.
        around: modules that contain source or sink; compiled, some of them run their parts without calling them.
        follows: the module of the host whose mode, training or evaluation, the kernel takes; the sink's when None.
    """

    alpha: Tensor
    faults: Tensor

    def __init__(
        self,
        source: nn.Module,
        sink: nn.Module,
        kernel: nn.Module,
        *,
        like: Tensor,
        around: Iterable[nn.Module] = (),
        follows: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.kernel = kernel.to(device=like.device, dtype=like.dtype)
        # Non-persistent: a run's checkpoint keeps both beside the seed's state.
        self.register_buffer("alpha", torch.zeros((), device=like.device, dtype=like.dtype), persistent=False)
        self.register_buffer("faults", torch.zeros((), device=like.device, dtype=torch.int64), persistent=False)
        self.muted = False
        self.learning = False
        """Whether the kernel is in training mode whatever the host is in."""
        # Kept out of the module tree: they belong to the host.
        self._ends = (source, sink)
        self._around = tuple(around)
        self._follows = (follows or sink,)
        self._entering: Tensor | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.raised = 0

    @property
    def source(self) -> nn.Module:
        """The module whose input the kernel reads."""
        return self._ends[0]

    @property
    def sink(self) -> nn.Module:
        """The module to whose output the kernel adds."""
        return self._ends[1]

    @property
    def attached(self) -> bool:
        """Whether the host's forward passes by this kernel."""
        return bool(self._hooks)

    @property
    def errors(self) -> int:
        """Failed passes so far. Reads the device once; not for the training step."""
        return self.raised + int(self.faults)

    @property
    def broken(self) -> bool:
        """Whether it has lost its say: too many failures, or weights that are not finite. Reads the device."""
        return self.errors >= BREAKER or not all(bool(t.isfinite().all()) for t in self.kernel.state_dict().values())

    def attach(self) -> None:
        """From now on the host's output includes ``alpha`` times the kernel's."""
        if not self._hooks:
            self._hooks = [
                self.source.register_forward_pre_hook(self._remember),
                self.sink.register_forward_hook(self._add),
            ]
            for module in (*self._ends, *self._around):
                mark(module)

    def detach(self) -> None:
        """The host is as it was before ``attach``, its forward bit for bit."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._entering = None
        for module in (*self._ends, *self._around):
            (mark if blended(module) else unmark)(module)

    def forward(self, entering: Tensor) -> Tensor:
        """The kernel's own output, unblended."""
        return self.kernel(entering)  # type: ignore[no-any-return]

    def _remember(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self._entering = args[0]

    def _add(self, _module: nn.Module, _args: tuple[Any, ...], leaving: Tensor) -> Tensor:
        entering, self._entering = self._entering, None
        if self.muted or entering is None or self.raised >= BREAKER:
            return leaving
        (host,) = self._follows
        learns = self.learning or host.training
        if self.kernel.training != learns:
            self.kernel.train(learns)
        # A node of its own: what comes back through the kernel can be masked apart from what comes back through the host.
        read = entering.view_as(entering)
        try:
            extra = self.kernel(read)
        except Exception as problem:  # noqa: BLE001 - a kernel may raise anything; the host must go on
            return self._refuse(leaving, f"raised {type(problem).__name__}")
        if not isinstance(extra, Tensor) or extra.shape != leaving.shape or extra.dtype != leaving.dtype:
            return self._refuse(leaving, f"gave {getattr(extra, 'shape', type(extra))}, not {tuple(leaving.shape)}")
        # The verdict stays on the device: asking for it here would stall every step.
        finite = torch.isfinite(extra.detach()).all()
        # In place and by method: `+=` would set an attribute, which splits a compiled host's graph here.
        self.faults.add_(~finite)
        usable = finite & (self.faults < BREAKER)
        if read.requires_grad:
            read.register_hook(lambda gradient: self._mask(gradient, usable))  # type: ignore[no-untyped-call]
        return leaving + self.alpha * torch.where(usable, extra, torch.zeros_like(extra))

    def _mask(self, gradient: Tensor, usable: Tensor) -> Tensor:
        """Nothing that is not finite reaches the host backwards: a zero times a NaN weight is a NaN."""
        finite = torch.isfinite(gradient).all()
        self.faults.add_(usable & ~finite)
        return torch.where(finite, gradient, torch.zeros_like(gradient))

    def _refuse(self, leaving: Tensor, why: str) -> Tensor:
        self.raised += 1
        log.warning("kernel.failed", why=why, failures=self.raised, retired=self.raised >= BREAKER)
        return leaving


def blended(module: nn.Module) -> bool:
    """Whether hooks of ours change what this module or any part of it gives: a kernel's, or those that silence units."""
    hooks = (
        hook for part in module.modules() for hook in (*part._forward_pre_hooks.values(), *part._forward_hooks.values())
    )
    return any(isinstance(getattr(hook, "__self__", None), Graft) or hasattr(hook, "silences") for hook in hooks)
