"""Torch's global random state: kept aside while something draws numbers that must not disturb the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


def random_state() -> dict[str, Tensor]:
    """The CPU's generator, and that of every CUDA device once one is in use."""
    used = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if used else []
    return {"cpu": torch.get_rng_state(), **{str(index): state for index, state in enumerate(cuda)}}


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Back to ``random_state``."""
    torch.set_rng_state(state["cpu"])
    for device, value in state.items():
        if device != "cpu":
            torch.cuda.set_rng_state(value, int(device))


@contextmanager
def undisturbed() -> Iterator[None]:
    """What is drawn or seeded inside is forgotten outside."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)
