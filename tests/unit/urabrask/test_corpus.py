"""Every adversary is rejected for its own reason and every honest kernel passes, each run as Urabrask runs it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from esper_core.kernel.record import RejectionReason
from tests.corpus.kernels import IMPATIENT, LIMITS, STUBBORN, adapter, bad, good
from tests.corpus.trial import Trial, trial


@pytest.fixture(scope="module")
async def bench(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Trial]:
    async with trial(tmp_path_factory.mktemp("forge"), LIMITS) as bench:
        yield bench


async def test_adversaries_are_rejected_each_for_its_reason_every_time(bench: Trial) -> None:
    """A verdict is a property of the kernel: nothing that is timed enters it."""
    adversaries = [kernel for kernel in bad() if kernel.reason not in STUBBORN]
    first = [(await bench.of(kernel))[:2] for kernel in adversaries]
    second = [(await bench.of(kernel))[:2] for kernel in reversed(adversaries)]
    said = {kernel.name: found for kernel, found in zip(adversaries, first, strict=True)}
    assert len(said) == len(adversaries) > 30
    assert {name: reason for name, (reason, _) in said.items()} == {
        kernel.name: kernel.reason for kernel in adversaries
    }
    assert all(words for _, words in said.values())
    assert said == {kernel.name: found for kernel, found in zip(adversaries, second[::-1], strict=True)}


async def test_honest_kernels_pass(bench: Trial) -> None:
    honest = list(good(widths=(8,)))
    said = {kernel.name: (await bench.of(kernel))[:2] for kernel in honest}
    assert len(said) == len(honest) > 50
    assert not {name: found for name, found in said.items() if found[0] is not None}


async def test_what_never_answers_costs_its_child_and_the_next_kernel_goes_on(tmp_path: Path) -> None:
    stubborn = {kernel.name: kernel for kernel in bad() if kernel.reason in STUBBORN}
    async with trial(tmp_path, IMPATIENT) as bench:
        assert (await bench.of(adapter()))[0] is None
        first = bench.child.pid
        for name in ("a hang", "a memory bomb"):
            assert (await bench.of(stubborn[name]))[0] is stubborn[name].reason, name
        assert (await bench.of(adapter()))[0] is None
        assert bench.child.pid not in (None, first)


def test_every_reason_has_an_adversary() -> None:
    assert {kernel.reason for kernel in bad()} == set(RejectionReason)
