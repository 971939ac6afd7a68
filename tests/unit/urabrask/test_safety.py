"""The safety phase: every good design passes, every bad one is found out for its own fault."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esper_core.blueprint.build import build
from esper_core.blueprint.catalogue import candidates, catalogue
from esper_core.blueprint.interface import BatchNorm, Layout, SlotInterface
from esper_core.kernel.record import RejectionReason
from services.urabrask.finding import Unfit
from services.urabrask.safety import check, gradient_norm, gradients
from tests.corpus.child import fresh
from tests.corpus.modules import FAULTS, Adapter, Raises, Sleeps, Spins, Swells, Works

ROWS = SlotInterface(layout=Layout.FEATURES, in_width=12, out_width=7, hidden_width=3, activation="relu")
TOKENS = SlotInterface(layout=Layout.TOKENS, in_width=12, out_width=12, hidden_width=3, activation="gelu")
IMAGE = SlotInterface(
    layout=Layout.IMAGE, in_width=3, out_width=5, hidden_width=3, in_size=(9, 7), out_size=(5, 4), activation="silu"
)


NORMED = [slot.model_copy(update={"norm": BatchNorm()}) for slot in (ROWS, IMAGE)]


@pytest.mark.parametrize("slot", [ROWS, TOKENS, IMAGE, *NORMED], ids=lambda s: f"{s.layout.name}-{bool(s.norm)}")
@pytest.mark.parametrize("width", [1, 2, 16])
def test_every_design_of_the_catalogue_is_safe(slot: SlotInterface, width: int) -> None:
    found = candidates(slot, [width])
    assert found
    for name, ir, symbols in found:
        try:
            check(lambda ir=ir, symbols=symbols: build(ir, slot, symbols, seed=5), slot)
        except Unfit as finding:
            pytest.fail(f"{name} {symbols}: {finding}")


@pytest.mark.parametrize("variance", [-1.0, 0.0])
def test_statistics_that_only_show_in_evaluation_are_looked_at(variance: float) -> None:
    slot = NORMED[0].model_copy(update={"norm": BatchNorm(eps=1e-12)})

    def make() -> nn.Module:
        kernel = build(catalogue()["bottleneck_mlp"], slot, seed=5)
        kernel.state_dict()["norm.running_var"].fill_(variance)
        return kernel

    with pytest.raises(Unfit):
        check(make, slot)


ENDLESS = {Sleeps, Spins, Swells, Works, Raises}  # only a child that is measured, or may die, can tell


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [item for item in FAULTS.items() if item[0] not in ENDLESS],
    ids=lambda part: part.__name__ if isinstance(part, type) else part.name,
)
def test_a_fault_is_found_and_named(kernel: type[Adapter], reason: RejectionReason) -> None:
    with pytest.raises(Unfit) as caught:
        check(lambda: fresh(kernel), ROWS)
    assert caught.value.reason is reason, caught.value.message


def test_an_honest_adapter_passes() -> None:
    check(lambda: fresh(Adapter), ROWS)


def test_the_gradient_norm_is_that_of_a_unit_scale_loss() -> None:
    linear = nn.Linear(3, 4, bias=False)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(9))
    y, at_input, at_parameters = gradients(linear, x)
    weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(2)) / 20**0.5
    torch.testing.assert_close(at_parameters[0], weight.T @ x)
    torch.testing.assert_close(at_input, weight @ linear.weight)
    torch.testing.assert_close(y, x @ linear.weight.T)
    assert gradient_norm(at_parameters) == pytest.approx(float((weight.T @ x).norm()), rel=1e-6)
