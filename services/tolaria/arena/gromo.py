"""The rival as its authors' own package has it: a network that grows once by gromo's TINY, in the same training as the others.

gromo is imported only when this arm runs. It applies to linear layers one after the other, which is what a chain of gromo's is.
"""

from __future__ import annotations

import importlib.util
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from esper_core.errors import Unsupported
from services.tolaria.arena.effort import counted
from services.tolaria.arena.links import links
from services.tolaria.arena.rivals import WIDTH
from services.tolaria.arena.task import Setup, Task
from services.tolaria.arena.trial import Counter, Row, probe, to_row, train, wrapped
from services.tolaria.trainer import score

if TYPE_CHECKING:
    from services.tolaria.arena.chain import Chain


def grown(task: Task, setup: Setup, arm: str, seed: int) -> Row | None:
    """A network that grows where and as gromo says, at the first boundary at which other arms may grow.

    Its new units are there at full strength from the next step on. The optimiser is made anew: parameters that stay keep what
    it remembers of them, those of the two layers that grew begin without.

    Returns:
        None for a network that is no chain, or has no slot.

    Raises:
        Unsupported: gromo is not installed.
    """
    chain = chained(setup)
    if chain is None:
        return None
    torch.manual_seed(seed)
    optimizer = task.optimizer(list(chain.parameters()))
    before, count = chain.number_of_parameters(), Counter()
    first = max(task.settings.warmup_epochs, 1)
    train(task, setup, chain, optimizer, seed, range(min(first, task.epochs)), count)
    growth = _grow(task, setup, chain) if first <= task.epochs else {}
    train(task, setup, chain, _renewed(task, chain, optimizer), seed, range(first, task.epochs), count)
    added = chain.number_of_parameters() - before
    return to_row(task, setup, arm, seed, chain, before, count, added=added, shapes=chain.shapes, **growth)


def chained(setup: Setup) -> Chain | None:
    """The setup's network as a chain that may grow where the host has slots; None where it is no chain, or has no slot.

    Raises:
        Unsupported: gromo is not installed.
    """
    if importlib.util.find_spec("gromo") is None:
        raise Unsupported("the arm gromo needs the package of that name", hint="pip install gromo")
    from services.tolaria.arena.chain import Chain

    network = setup.made()
    found = links(network)
    if not found:
        return None
    entry = next(network.children())
    chain = Chain(entry if isinstance(entry, nn.Flatten) else nn.Identity(), found, wrapped(setup).slots)
    return chain if chain.slots else None


def _grow(task: Task, setup: Setup, chain: Chain) -> dict[str, Any]:
    """Grow, and give what the row says of it.

    The search for the units' scale is no scoring: it stands where other arms teach their kernels, which no figure counts either.
    """
    rows, loss_fn, began = probe(task, setup), setup.data.loss, time.process_time()
    with counted() as effort:
        slot = chain.choose(rows, loss_fn, WIDTH, task.budget)
    slots = (slot,) if slot else ()
    kept = bool(slots) and chain.insert(rows, loss_fn)
    return {
        "growing_seconds": time.process_time() - began,
        "slots": slots,
        "kept": slots if kept else (),
        "culled": len(slots) - kept,
        "scoring_flops": effort.flops,
        "at_full": (score(chain, setup.data, setup.data.test).accuracy or 0.0,) if kept else (),
    }


def _renewed(task: Task, chain: Chain, old: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimiser over the chain's present parameters."""
    present = list(chain.parameters())
    new = task.optimizer(present)
    new.state.update({parameter: old.state[parameter] for parameter in present if parameter in old.state})
    return new
