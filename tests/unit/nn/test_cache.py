"""The kernel cache: bounded by bytes, least recently used first out, never what is in use."""

from __future__ import annotations

import threading
from collections import OrderedDict

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from esper_core.errors import Exhausted
from esper_core.nn.cache import DEFAULT_BYTES, KernelCache


def weights(size: int) -> dict[str, torch.Tensor]:
    """Weights of ``size`` bytes in two tensors."""
    return {"a": torch.zeros(size // 2, dtype=torch.uint8), "b": torch.zeros(size - size // 2, dtype=torch.uint8)}


def test_what_was_put_is_got() -> None:
    cache, kernel = KernelCache(100), weights(40)
    assert cache.get("k") is None
    cache.put("k", kernel)
    assert cache.get("k") is kernel


def test_the_least_recently_used_goes_first() -> None:
    cache = KernelCache(100)
    for name in "abc":
        cache.put(name, weights(30))
    cache.get("a")
    cache.put("d", weights(30))
    assert [name for name in "abcd" if cache.get(name)] == ["a", "c", "d"]
    assert cache.stats().evictions == 1


def test_putting_again_replaces_and_counts_bytes_once() -> None:
    cache = KernelCache(100)
    cache.put("a", weights(60))
    cache.put("a", weights(80))
    assert (cache.stats().entries, cache.stats().held_bytes, cache.stats().evictions) == (1, 80, 0)


def test_bytes_are_counted_by_dtype() -> None:
    cache = KernelCache(100)
    cache.put("a", {"w": torch.zeros(10, dtype=torch.float64)})
    assert cache.stats().held_bytes == 80


def test_what_is_in_use_stays_and_what_does_not_fit_beside_it_is_refused() -> None:
    cache = KernelCache(100)
    cache.put("a", weights(60))
    cache.put("b", weights(30))
    cache.pin("a")
    with pytest.raises(Exhausted) as caught:
        cache.put("c", weights(50))
    assert caught.value.hint
    assert cache.get("b") is not None  # nothing was let go in vain
    cache.put("c", weights(40))
    assert cache.get("a") is not None
    cache.unpin("a")
    cache.put("d", weights(100))
    assert cache.stats().entries == 1


def test_what_is_larger_than_the_cache_is_refused() -> None:
    with pytest.raises(Exhausted):
        KernelCache(100).put("a", weights(101))
    KernelCache(100).put("a", weights(100))


def test_the_hit_rate() -> None:
    cache = KernelCache()
    assert cache.stats().hit_rate == 0
    assert cache.limit == DEFAULT_BYTES == 128 * 1024 * 1024
    cache.put("a", weights(1))
    for name in "aaab":
        cache.get(name)
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.hit_rate) == (3, 1, 0.75)


def test_many_threads() -> None:
    cache, problems = KernelCache(500), []

    def work(seed: int) -> None:
        try:
            for number in range(300):
                name = str((seed * 7 + number) % 20)
                cache.put(name, weights(50))
                cache.get(name)
        except (Exhausted, KeyError, RuntimeError) as problem:
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert cache.stats().held_bytes <= 500


class AgainstAModel(RuleBasedStateMachine):
    """The cache beside the simplest thing that could be right."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KernelCache(100)
        self.model: OrderedDict[str, int] = OrderedDict()
        self.pinned: set[str] = set()

    names = st.sampled_from("abcdefgh")

    @rule(name=names, size=st.integers(0, 110))
    def put(self, name: str, size: int) -> None:
        in_use = sum(held for key, held in self.model.items() if key in self.pinned and key != name)
        if size + in_use > 100:
            with pytest.raises(Exhausted):
                self.cache.put(name, weights(size))
            return
        self.cache.put(name, weights(size))
        self.model.pop(name, None)
        for key in [key for key in self.model if key not in self.pinned]:
            if size + sum(self.model.values()) > 100:
                del self.model[key]
        self.model[name] = size

    @rule(name=names)
    def get(self, name: str) -> None:
        assert (self.cache.get(name) is not None) == (name in self.model)
        if name in self.model:
            self.model.move_to_end(name)

    @rule(name=names)
    def pin(self, name: str) -> None:
        self.cache.pin(name)
        self.pinned.add(name)

    @rule(name=names)
    def unpin(self, name: str) -> None:
        self.cache.unpin(name)
        self.pinned.discard(name)

    @invariant()
    def agrees(self) -> None:
        stats = self.cache.stats()
        assert stats.held_bytes == sum(self.model.values()) <= 100
        assert stats.entries == len(self.model)


AgainstAModel.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAgainstAModel = AgainstAModel.TestCase
