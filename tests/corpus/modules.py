"""Kernels that no blueprint can express, as plain modules: each is fit but for one fault.

They reach Urabrask's checks through ``tests.corpus.child``. The op registry knows no randomness, no in-place operation,
no memory between calls and nothing that crosses rows, so only code could bring these.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from esper_core.kernel.record import RejectionReason


class Adapter(nn.Module):
    """B·f(A·x), 12 → 6 → 7, as fit as can be; the others break it in one place each."""

    def __init__(self) -> None:
        super().__init__()
        self.A, self.B = nn.Linear(12, 6), nn.Linear(6, 7)
        nn.init.zeros_(self.B.weight)
        nn.init.zeros_(self.B.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.B(torch.tanh(self.A(x)))  # type: ignore[no-any-return]


class Adds(Adapter):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-6 * x[:, :7]


class AddsWhenNothingEnters(Adapter):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (x.abs().sum() == 0).float()


class Mutates(Adapter):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x.mul_(2)
        return super().forward(x)


class Misshapes(Adapter):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :6]


class Broadcasts(Adapter):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(0, keepdim=True)


class Flips(Adapter):
    def forward(self, x: Tensor) -> Tensor:
        return self.B(torch.tanh(self.A(x)) + 0.1 * torch.rand(1))  # type: ignore[no-any-return]


class Overflows(Adapter):
    def forward(self, x: Tensor) -> Tensor:
        return self.B(torch.exp(self.A(x)))  # type: ignore[no-any-return]


class Divides(Adapter):
    """Finite, but for the gradient where nothing enters."""

    def forward(self, x: Tensor) -> Tensor:
        return self.B(torch.tanh(self.A(x)) * x.square().sum(1, keepdim=True).sqrt())  # type: ignore[no-any-return]


class Explodes(Adapter):
    def forward(self, x: Tensor) -> Tensor:
        return self.B(1e6 * torch.tanh(self.A(x)))  # type: ignore[no-any-return]


class Idles(Adapter):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3, 3))


class Detaches(Adapter):
    def forward(self, x: Tensor) -> Tensor:
        return self.B(torch.tanh(self.A(x)).detach())  # type: ignore[no-any-return]


class Saturates(Adapter):
    def forward(self, x: Tensor) -> Tensor:
        return self.B(torch.tanh(self.A(x) + 1e6))  # type: ignore[no-any-return]


class CannotBegin(Adapter):
    def forward(self, x: Tensor) -> Tensor:
        return self.B(torch.tanh(self.A(x))) * self.B.weight.abs().sum()  # type: ignore[no-any-return]


class LooksAround(Adapter):
    """Normalises by the batch it happens to be in."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class LooksBack(Adapter):
    """Only later rows know of earlier ones."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.cumsum(0))


class Remembers(Adapter):
    """Keeps a few bytes of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().mean(0))
        return super().forward(x)


class Hoards(Adapter):
    """Keeps a megabyte of every call where no collector of Python's counts it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = bytearray()

    def forward(self, x: Tensor) -> Tensor:
        self.seen += b"x" * (1 << 20)
        return super().forward(x)


class Sleeps(Adapter):
    """Never answers, and takes no processor time over it."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(3600)
        return super().forward(x)


class Spins(Adapter):
    """Never answers."""

    def forward(self, x: Tensor) -> Tensor:
        while True:
            pass


class Swells(Adapter):
    """Asks for a terabyte."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.ones(1 << 38)[:7]


class Works(Adapter):
    """Computes more than any blueprint of its figures would."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x @ torch.eye(12, 64, dtype=x.dtype) @ torch.eye(64, 12, dtype=x.dtype))


class Raises(Adapter):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no")


FAULTS: Mapping[type[Adapter], RejectionReason] = {
    Adds: RejectionReason.NOT_SILENT,
    AddsWhenNothingEnters: RejectionReason.NOT_SILENT,
    Mutates: RejectionReason.MUTATES_INPUT,
    Misshapes: RejectionReason.SHAPE,
    Broadcasts: RejectionReason.SHAPE,
    Flips: RejectionReason.NONDETERMINISTIC,
    Overflows: RejectionReason.OUTPUT_NOT_FINITE,
    Divides: RejectionReason.GRADIENT_NOT_FINITE,
    Explodes: RejectionReason.EXPLODES,
    Idles: RejectionReason.UNREACHED,
    Detaches: RejectionReason.UNREACHED,
    Saturates: RejectionReason.VANISHES,
    CannotBegin: RejectionReason.CANNOT_LEARN,
    LooksAround: RejectionReason.LEAKS_ROWS,
    LooksBack: RejectionReason.LEAKS_ROWS,
    Remembers: RejectionReason.LEAKS_MEMORY,
    Hoards: RejectionReason.LEAKS_MEMORY,
    Works: RejectionReason.MANIFEST,
    Sleeps: RejectionReason.TIMEOUT,
    Spins: RejectionReason.TIMEOUT,
    Swells: RejectionReason.MEMORY,
    Raises: RejectionReason.FAILS,
}
"""What is wrong with each."""
