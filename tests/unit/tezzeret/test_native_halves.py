"""Every catalogue design is traced and cut for any number of rows; what no compiler is asked to take is refused by name."""

from __future__ import annotations

import pytest
import torch

from esper_core.blueprint.build import build, example_input
from esper_core.blueprint.catalogue import candidates
from esper_core.blueprint.interface import BatchNorm, SlotInterface
from esper_core.errors import Unsupported
from services.tezzeret.native import compiled, halved
from tests.unit.tezzeret.test_forge import SLOTS

CLOSED = (SLOTS[0], SLOTS[1].model_copy(update={"in_size": (6,), "out_size": (6,)}), SLOTS[2])
CASES = [
    pytest.param(slot, ir, symbols, id=f"{slot.layout.name}-{name}")
    for slot in CLOSED
    for name, ir, symbols in candidates(slot, [4])
]
TRACED = 4


@pytest.mark.parametrize(("slot", "ir", "symbols"), CASES)
def test_both_halves_compute_what_the_module_does_with_more_and_fewer_rows_than_were_traced(slot, ir, symbols):
    module = build(ir, slot, symbols, 0)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():  # awake: no parameter is zero
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    forward, backward, kept = halved(module, example_input(slot, TRACED, seed=0))
    for rows in (TRACED // 2, 3 * TRACED + 1):
        x = example_input(slot, rows, seed=rows).requires_grad_()
        y = module(x)
        gradient = torch.randn(y.shape, generator=draw)
        eager = [y, *torch.autograd.grad(y, [x, *module.parameters()], gradient)]
        with torch.no_grad():
            inputs = [x, *module.parameters()]
            leaving, *values = forward(*inputs)
            given = [inputs[-1 - k] if k < 0 else values[k] for k in kept]
            ours = [leaving, *backward(*given, gradient)]
        for a, b in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("slot", "why"),
    [
        (SLOTS[1], "number of positions open"),
        (
            SLOTS[2].model_copy(update={"norm": BatchNorm(), "source_bias_free": True, "sink_bias_free": True}),
            "statistics",
        ),
    ],
)
def test_what_cannot_be_compiled_is_refused_before_a_compiler_runs(slot: SlotInterface, why: str) -> None:
    _, ir, symbols = next(iter(candidates(slot, [4])))
    with pytest.raises(Unsupported, match=why):
        compiled(build(ir, slot, symbols, 0), example_input(slot, TRACED, seed=0))
