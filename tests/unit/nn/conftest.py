"""These tests compute on one thread, some of them on a host that has trained a little."""

from __future__ import annotations

import pytest
import torch

from esper_core.nn.host import Host, Slot
from tests.unit.nn.hosts import batches, make, train, wrapped
from tests.unit.threads import one_thread

__all__ = ["narrow", "one_thread"]


@pytest.fixture
def narrow() -> tuple[Host, Slot]:
    """A host after a little training, and its bottleneck."""
    host = wrapped("mlp", make("mlp", 1))
    rule = torch.optim.Adam(host.parameters(), 1e-2)
    for _ in range(4):
        train(host, rule, batches("mlp", 8))
    return host, host.slots["2:4"]
