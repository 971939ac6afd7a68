"""Batches to measure and to judge by, taken from a trainer's own data loader without disturbing it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from esper_core.errors import InvalidInput
from esper_core.nn.chance import undisturbed
from esper_core.nn.probe import Batch, each_tensor

GIVE_THEM = "pass probe=[...] and validation=[...], lists of batches, to the callback"


def collect(loader: Any, split: Callable[[Any], Batch], rows: int, seed: int) -> list[Batch]:
    """Up to ``rows`` samples of the loader's data set as batches of the loader's size.

    Samples are drawn by ``seed`` alone (an iterable data set gives its first), so a resumed run gets the same ones. The loader itself
    is not iterated: its sampler, its workers and every global random state stay as they are. All samples are collated at once, so
    that sequences padded to the longest have one length.

    Args:
        split: a collated batch → (inputs, targets), inputs a tensor or a tuple of arguments.

    Raises:
        InvalidInput: when there is no such loader, or nothing can be had from it.
    """
    if not isinstance(loader, DataLoader):
        raise InvalidInput(f"no batches can be collected from a {type(loader).__name__}", hint=GIVE_THEM)
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    if size is None:
        raise InvalidInput("no batches can be collected from a loader that does not batch", hint=GIVE_THEM)
    with _own_chance(seed):
        samples = _samples(loader.dataset, rows)
        if not samples:
            raise InvalidInput("the data loader has no rows to measure by", hint=GIVE_THEM)
        inputs, targets = split(loader.collate_fn(samples))
    pieces = (slice(start, start + size) for start in range(0, len(targets), size))
    return [(each_tensor(inputs, itemgetter(piece)), targets[piece]) for piece in pieces]


def moved(batches: list[Batch], device: torch.device) -> list[Batch]:
    """The batches on a device."""
    return [(each_tensor(inputs, lambda value: value.to(device)), targets.to(device)) for inputs, targets in batches]


def pair(batch: Any) -> Batch:
    """A batch that is (inputs, targets); inputs a tensor, or several as one tuple.

    Raises:
        InvalidInput: when it is anything else.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor):
        inputs = tuple(batch[0]) if isinstance(batch[0], list) else batch[0]
        if isinstance(inputs, (Tensor, tuple)):
            return inputs, batch[1]
    shape = f"with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f"of {type(batch).__name__}"
    raise InvalidInput(
        f"a batch {shape} is no pair (inputs, targets)", hint="pass split=, a function from a batch to such a pair"
    )


def _samples(dataset: Any, rows: int) -> list[Any]:
    if isinstance(dataset, IterableDataset):
        return list(itertools.islice(dataset, rows))
    return [dataset[index] for index in torch.randperm(len(dataset))[:rows].tolist()]


@contextmanager
def _own_chance(seed: int) -> Iterator[None]:
    """Random numbers of one's own inside; PyTorch's, NumPy's and Python's as before afterwards."""
    plain, vectors = random.getstate(), np.random.get_state()
    try:
        with undisturbed():
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(vectors)
