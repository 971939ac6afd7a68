"""One thread for torch: small networks lose by more, sums keep their order, and on a busy machine nobody waits for one that spins.

For the ``conftest`` of packages whose tests compute: ``from tests.unit.threads import one_thread``.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
