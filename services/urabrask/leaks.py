"""Leaks: what flows where it must not, between rows, from later tokens, or from call to call. In the child only.

A row's output may depend on no other row, or a prediction would depend on what it is batched with; only a host's own
batch normalisation mixes rows, and only while it does so itself. A token's output may depend on no later token: a slot
does not tell whether its host is autoregressive, and a kernel that looks ahead hands such a host its answers.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from esper_core.blueprint.interface import Layout, SlotInterface
from esper_core.kernel.record import RejectionReason
from services.sandbox import resident
from services.urabrask.finding import Unfit

TOLERANCE = 1e-6
"""Of the output's scale: what another order of additions may change."""
STRANGE = 30.0
"""Scale of what the other rows or the later tokens are replaced with."""
CALLS = 8
"""In one round of looking for memory that is not given back."""
ROUNDS = 2
"""A leak shows in every one."""
BYTES_PER_CALL = 64 << 10
"""Resident bytes by which every call must grow to be called a leak; an allocator's habits stay below."""


def rows(module: nn.Module, x: Tensor, interface: SlotInterface) -> None:
    """Refuse an awake kernel whose rows know of one another; where the host itself mixes them nothing can be said.

    Args:
        x: (batch, …), two rows or more.

    Raises:
        Unfit: LEAKS_ROWS.
    """
    norm = interface.norm
    if norm is not None and (module.training or not norm.track_running_stats):
        return
    half = len(x) // 2
    for kept, changed in ((slice(None, half), slice(half, None)), (slice(half, None), slice(None, half))):
        if _differs(module, x, _strange(x, (changed,)), (kept,)):
            raise Unfit(RejectionReason.LEAKS_ROWS, "a row of its output depends on other rows of the batch")


def future(module: nn.Module, x: Tensor, interface: SlotInterface) -> None:
    """Refuse an awake kernel whose tokens see later ones.

    Args:
        x: (batch, tokens, features).

    Raises:
        Unfit: LEAKS_FUTURE.
    """
    if interface.layout is not Layout.TOKENS or x.shape[1] < 2:
        return
    for cut in {1, x.shape[1] // 2, x.shape[1] - 1}:
        everything = slice(None)
        if _differs(module, x, _strange(x, (everything, slice(cut, None))), (everything, slice(None, cut))):
            raise Unfit(RejectionReason.LEAKS_FUTURE, "a token of its output depends on later tokens")


def memory(call: Callable[[], object]) -> None:
    """Refuse what holds on to more objects, or to more memory, after every ``call``.

    Raises:
        Unfit: LEAKS_MEMORY.
    """
    for _ in range(2):
        call()
    # Collecting garbage takes longer than all the calls; only what seems to leak is worth it.
    if not _leaves(_growth(call, collect=False)):
        return
    objects, size = _growth(call, collect=True)
    if _leaves((objects, size)):
        raise Unfit(
            RejectionReason.LEAKS_MEMORY,
            f"{CALLS} calls leave at least {max(0, objects)} objects and {max(0, size)} bytes behind, every time",
        )


def _leaves(growth: tuple[int, int]) -> bool:
    objects, size = growth
    return objects >= CALLS or size >= CALLS * BYTES_PER_CALL


def _growth(call: Callable[[], object], *, collect: bool) -> tuple[int, int]:
    """Objects and bytes by which every round of calls grew at least."""
    automatic = gc.isenabled()
    gc.disable()  # or a collection in between would hide growth
    try:
        held = [_held(collect=collect)]
        for _ in range(ROUNDS):
            for _ in range(CALLS):
                call()
            held.append(_held(collect=collect))
    finally:
        if automatic:
            gc.enable()
    growth = [(after[0] - before[0], after[1] - before[1]) for before, after in itertools.pairwise(held)]
    return min(grown for grown, _ in growth), min(grown for _, grown in growth)


def _held(*, collect: bool) -> tuple[int, int]:
    if collect:
        gc.collect()
    return len(gc.get_objects()), resident()


def _strange(x: Tensor, where: tuple[slice, ...]) -> Tensor:
    other = x.clone()
    draw = torch.Generator().manual_seed(4)
    other[where] = STRANGE * torch.randn(other[where].shape, generator=draw)
    return other


@torch.no_grad()
def _differs(module: nn.Module, x: Tensor, other: Tensor, where: tuple[slice, ...]) -> bool:
    first = module(x)
    scale = float(first.square().mean().sqrt())
    return float((first[where] - module(other)[where]).abs().max()) > TOLERANCE * scale
