"""These tests compute on one thread, and what came before them is none of their garbage."""

import gc
from collections.abc import Iterator

import pytest

from tests.unit.threads import one_thread

__all__ = ["frozen_past", "one_thread"]


@pytest.fixture(autouse=True)
def frozen_past() -> Iterator[None]:
    """As in the child that measures: objects of others that go meanwhile must not hide those that a kernel keeps."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
