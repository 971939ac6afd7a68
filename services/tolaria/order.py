"""The order of training rows: a pure function of (seed, epoch), so that twins and resumed runs see equal batches."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator of its own for one purpose of one seed; torch's global generator is left alone."""
    digest = hashlib.sha256(":".join(map(str, (seed, *purpose))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def batches(rows: int, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """Row numbers of each batch of an epoch: every row once, shuffled; the last batch may be smaller, or larger by one.

    A rest of a single row joins the batch before it, since batch statistics of one row do not exist.

    Args:
        rows: rows of the training part.
        batch_size: rows of a batch.
        seed: the run's seed.
        epoch: from 0.
    """
    order = torch.randperm(rows, generator=generator(seed, "order", epoch))
    chunks = torch.split(order, batch_size)
    if len(chunks) > 1 and len(chunks[-1]) == 1:
        return (*chunks[:-2], torch.cat(chunks[-2:]))
    return chunks
