"""Kernels kept at hand: least recently used first out, bounded by bytes, never one that is in use."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from esper_core.errors import Exhausted

DEFAULT_BYTES = 128 * 1024 * 1024

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class CacheStats:
    """Counts since the start, and what is held now."""

    hits: int
    misses: int
    evictions: int
    entries: int
    held_bytes: int

    @property
    def hit_rate(self) -> float:
        """Hits per lookup; 0 before the first."""
        looked = self.hits + self.misses
        return self.hits / looked if looked else 0.0


class KernelCache:
    """Verified kernel weights by kernel id. Safe to use from several threads.

    Args:
        limit: bytes that may be held.
    """

    def __init__(self, limit: int = DEFAULT_BYTES) -> None:
        self.limit = limit
        self._held: OrderedDict[str, tuple[Weights, int]] = OrderedDict()
        self._pinned: set[str] = set()
        self._hits = self._misses = self._evictions = 0
        self._lock = threading.Lock()

    def get(self, kernel_id: str) -> Weights | None:
        """The weights, which become the most recently used; None when not held."""
        with self._lock:
            if kernel_id not in self._held:
                self._misses += 1
                return None
            self._hits += 1
            self._held.move_to_end(kernel_id)
            return self._held[kernel_id][0]

    def put(self, kernel_id: str, weights: Weights) -> None:
        """Keep weights, making room by letting go of the longest unused.

        Raises:
            Exhausted: when they do not fit beside what is in use; nothing is let go then.
        """
        size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
        with self._lock:
            pinned = sum(held for key, (_, held) in self._held.items() if key in self._pinned and key != kernel_id)
            if size + pinned > self.limit:
                raise Exhausted(
                    f"kernel of {size} bytes does not fit a cache of {self.limit} with {pinned} in use",
                    hint="raise morphogenetic.cache_bytes",
                )
            self._held.pop(kernel_id, None)
            while size + self._bytes() > self.limit:
                victim = next(key for key in self._held if key not in self._pinned)
                del self._held[victim]
                self._evictions += 1
            self._held[kernel_id] = (weights, size)

    def pin(self, kernel_id: str) -> None:
        """Never let this one go until it is unpinned."""
        with self._lock:
            self._pinned.add(kernel_id)

    def unpin(self, kernel_id: str) -> None:
        """It may go again."""
        with self._lock:
            self._pinned.discard(kernel_id)

    def stats(self) -> CacheStats:
        """Counts and sizes now."""
        with self._lock:
            return CacheStats(self._hits, self._misses, self._evictions, len(self._held), self._bytes())

    def _bytes(self) -> int:
        return sum(size for _, size in self._held.values())
