"""The benchmark phase measures the thing itself, and every figure is the artifact's."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from esper_core.blueprint.analyse import analyse
from esper_core.blueprint.build import build
from esper_core.blueprint.catalogue import candidates, catalogue
from esper_core.blueprint.interface import BatchNorm, Layout, SlotInterface
from esper_core.kernel.manifest import KernelManifest, Provenance
from esper_core.kernel.record import Measurement
from esper_core.pb.esper.core.v1 import kernel_pb2
from esper_core.rpc.convert import from_proto, to_proto
from services.urabrask.measure import BATCH_BYTES, REPETITIONS, batch_for, claimed_flops, counted, measure
from services.urabrask.safety import TOKENS, awaken, shapes
from tests.corpus.slots import SLOTS, described

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
    module = awaken(make())
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
    assert found.gradient_ratio is not None


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


def test_throughput_and_the_slowest_calls_are_those_that_were_timed() -> None:
    found = measure(lambda: Slow(), papers("linear_bypass", SLOT), 64)
    assert found.rows_per_second is not None
    assert found.backward_seconds_p99 is not None
    assert 0 < found.rows_per_second <= 64 / 0.002
    assert found.rows_per_second >= 64 / (found.forward_seconds_p99 * 2)
    assert found.backward_seconds <= found.backward_seconds_p99


@pytest.mark.parametrize("slot", SLOTS, ids=described)
def test_flops_are_counted_on_the_artifact_and_are_those_of_its_papers(slot: SlotInterface) -> None:
    """Equal to the products among the papers' operations; what is elementwise is not counted."""
    products = {"linear", "conv", "depthwise_conv", "source_conv", "sink_conv", "attention"}
    settled = slot if slot.in_size or slot.layout is not Layout.TOKENS else slot.model_copy(
        update={"in_size": (TOKENS,), "out_size": (TOKENS,)}
    )  # fmt: skip
    for name, ir, symbols in candidates(slot, [8]):
        manifest = papers(name, slot, **symbols)
        module = build(ir, slot, symbols)
        x = torch.randn(3, *shapes(slot)[0])
        steps = analyse(ir, settled, symbols).steps
        assert counted(module, x, manifest) == sum(s.cost.flops for s in steps if s.node.op in products), name
        assert claimed_flops(manifest) >= counted(module, x, manifest)


def test_gradient_health_tells_the_first_layer_from_the_last() -> None:
    """With B·(A·x) and a unit-scale loss, dA = Bᵀ·w·xᵀ and dB = w·(A·x)ᵀ."""
    torch.manual_seed(0)
    state = nn.Sequential(nn.Linear(12, 6, bias=False), nn.Linear(6, 7, bias=False)).state_dict()

    def make() -> nn.Module:
        module = nn.Sequential(nn.Linear(12, 6, bias=False), nn.Linear(6, 7, bias=False))
        module.load_state_dict(state)
        return module

    found = measure(make, papers("low_rank", SLOT, width=6), 32)
    awake = awaken(make())
    first, last = (awake[layer].weight.detach() for layer in (0, 1))
    x = torch.randn(32, 12, generator=torch.Generator().manual_seed(3))
    w = torch.randn(32, 7, generator=torch.Generator().manual_seed(2)) / (32 * 7) ** 0.5
    at_first, at_last = last.T @ w.T @ x, w.T @ (x @ first.T)
    assert found.gradient_ratio == pytest.approx(float(at_first.norm() / at_last.norm()), rel=1e-5)
    assert found.input_gradient_norm == pytest.approx(float((w @ last @ first).norm()), rel=1e-5)
    assert found.gradient_norm == pytest.approx(float((at_first.norm() ** 2 + at_last.norm() ** 2).sqrt()), rel=1e-5)


def test_a_measurement_from_before_can_still_be_read() -> None:
    found = measure(lambda: Slow(), papers("linear_bypass", SLOT), 8)
    younger = ("backward_seconds_p99", "rows_per_second", "counted_flops", "input_gradient_norm", "gradient_ratio")
    old = found.model_dump_json(exclude={*younger, "lessons"})
    read = Measurement.model_validate_json(old)
    assert [getattr(read, name) for name in younger] == [None] * len(younger)
    message = to_proto(read, kernel_pb2.Measurement)
    assert not any(message.HasField(name) for name in younger)
    assert from_proto(message, Measurement) == read
    assert from_proto(to_proto(found, kernel_pb2.Measurement), Measurement) == found
