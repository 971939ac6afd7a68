"""These tests compute on one thread."""

from tests.unit.threads import one_thread

__all__ = ["one_thread"]
