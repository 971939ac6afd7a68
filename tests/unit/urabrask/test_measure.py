"""The benchmark phase measures the thing itself, and tags follow from the figures."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from esper_core.blueprint.build import build
from esper_core.blueprint.catalogue import catalogue
from esper_core.blueprint.interface import BatchNorm, Layout, SlotInterface
from esper_core.kernel.manifest import KernelManifest, Provenance
from esper_core.kernel.pack import pack
from services.urabrask.measure import BATCH_BYTES, REPETITIONS, batch_for, measure
from services.urabrask.tags import ENOUGH, LATENCY_SECONDS_PER_ROW, tags_for, thirds

SLOT = SlotInterface(layout=Layout.FEATURES, in_width=12, out_width=7, hidden_width=3, activation="relu", foldable=True)


def papers(name: str, slot: SlotInterface, **symbols: int) -> KernelManifest:
    return KernelManifest.describe(catalogue()[name], slot, b"", Provenance(), symbols=symbols)


class Slow(nn.Module):
    """Sleeps 2 ms forward, holds 32 MiB while it runs, and rounds to multiples of 2^-9 in float32 only."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.002)
        held = torch.ones(8 << 20)
        y: Tensor = self.A(x) * held[0]
        return y if x.dtype is torch.float64 else y + (torch.round(y * 512) / 512 - y).detach()


def test_time_memory_and_drift_are_those_of_the_kernel() -> None:
    torch.manual_seed(0)
    state = Slow().state_dict()

    def make() -> nn.Module:
        module = Slow()
        module.load_state_dict(state)
        return module

    found = measure(make, papers("linear_bypass", SLOT), 64)
    assert (found.batch, found.repetitions, found.deterministic) == (64, REPETITIONS, True)
    assert 0.002 <= found.forward_seconds <= found.forward_seconds_p99
    assert found.backward_seconds >= 0.002
    assert found.peak_memory_bytes >= 31 << 20  # of 32; a few of its pages may have been the process's already
    module = measure.__globals__["awaken"](make())
    with torch.no_grad():
        y = module(torch.randn(64, 12, generator=torch.Generator().manual_seed(3)))
    scale = float(y.square().mean().sqrt())
    assert 0.5 * 2**-10 / scale < found.precision_drift <= 1.01 * 2**-10 / scale


@pytest.mark.parametrize("rows", [64, 1])
def test_a_kernel_with_batch_statistics_is_measured(rows: int) -> None:
    slot = SLOT.model_copy(update={"norm": BatchNorm()})
    found = measure(lambda: build(catalogue()["bottleneck_mlp"], slot), papers("bottleneck_mlp", slot), rows)
    assert (found.batch, found.deterministic) == (rows, True)
    assert found.precision_drift < 1e-4
    assert found.gradient_norm > 0


def test_an_honest_kernel_hardly_drifts() -> None:
    ir = catalogue()["bottleneck_mlp"]
    found = measure(lambda: build(ir, SLOT), papers("bottleneck_mlp", SLOT), 64)
    assert found.precision_drift < 1e-5
    assert found.forward_seconds < found.backward_seconds


def test_the_batch_shrinks_before_memory_runs_out() -> None:
    assert batch_for(1000) == 64
    assert batch_for(BATCH_BYTES // (64 * 12)) == 64
    assert batch_for(BATCH_BYTES // (64 * 12) + 1) == 8
    assert batch_for(64_000_000) == 1


def tagged(seconds_per_row: float, population: list[float]) -> list[str]:
    ir = catalogue()["bottleneck_mlp"]
    module = build(ir, SLOT, {"width": 4})
    manifest = KernelManifest.describe(ir, SLOT, pack(module.state_dict()), Provenance(), symbols={"width": 4})
    measured = measure(lambda: build(ir, SLOT, {"width": 4}), manifest, 64)
    return tags_for(manifest, measured.model_copy(update={"forward_seconds": 64 * seconds_per_row}), population)


def test_tags_say_what_selection_asks_for() -> None:
    low, high = LATENCY_SECONDS_PER_ROW
    tags = tagged(low / 2, [])
    assert {"layout:features", "foldable", "width:4", "latency:low", "memory:low", "parameters:low"} <= set(tags)
    assert "latency:medium" in tagged((low + high) / 2, [])
    assert "latency:high" in tagged(2 * high, [])
    assert "latency:high" in tagged(low / 2, [low / 10] * ENOUGH)
    assert "latency:low" in tagged(2 * high, [10 * high] * ENOUGH)


@given(st.lists(st.floats(1e-9, 1.0), min_size=ENOUGH, max_size=200).map(sorted))
def test_thirds_cut_the_population_in_three(population: list[float]) -> None:
    bounds = thirds(population)
    assert bounds is not None
    low, high = bounds
    n = len(population)
    assert sum(value < low for value in population) < n / 3 <= sum(value <= low for value in population) + 1
    assert sum(value < high for value in population) < 2 * n / 3 <= sum(value <= high for value in population) + 1
    assert thirds(population[: ENOUGH - 1]) is None
