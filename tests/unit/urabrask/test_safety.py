"""The safety phase: every good design passes, every bad one is found out for its own fault."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from esper_core.blueprint.build import build
from esper_core.blueprint.catalogue import candidates, catalogue
from esper_core.blueprint.interface import BatchNorm, Layout, SlotInterface
from services.urabrask.safety import Unfit, check, gradient_norm, gradients

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


class Adapter(nn.Module):
    """B·f(A·x), as fit as can be; the tests below break it in one place each."""

    def __init__(self) -> None:
        super().__init__()
        self.A, self.B = nn.Linear(12, 6), nn.Linear(6, 7)
        nn.init.zeros_(self.B.weight)
        nn.init.zeros_(self.B.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.B(torch.tanh(self.A(x)))  # type: ignore[no-any-return]


class Leaks(Adapter):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-6 * x[:, :7]


class LeaksWhenNothingEnters(Adapter):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (x.abs().sum() == 0).float()


class Mutates(Adapter):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x.mul_(2)
        return super().forward(x)


class Misshapes(Adapter):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :6]


class Broadcasts(Adapter):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(0, keepdim=True)


class Flips(Adapter):
    def forward(self, x: Tensor) -> Tensor:
        return self.B(torch.tanh(self.A(x)) + 0.1 * torch.rand(1))  # type: ignore[no-any-return]


class Overflows(Adapter):
    def forward(self, x: Tensor) -> Tensor:
        return self.B(torch.exp(self.A(x)))  # type: ignore[no-any-return]


class Divides(Adapter):
    def forward(self, x: Tensor) -> Tensor:
        return self.B(torch.tanh(self.A(x)) * x.square().sum(1, keepdim=True).sqrt())  # type: ignore[no-any-return]


class Explodes(Adapter):
    def forward(self, x: Tensor) -> Tensor:
        return self.B(1e6 * torch.tanh(self.A(x)))  # type: ignore[no-any-return]


class Idles(Adapter):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3, 3))


class Detaches(Adapter):
    def forward(self, x: Tensor) -> Tensor:
        return self.B(torch.tanh(self.A(x)).detach())  # type: ignore[no-any-return]


class Saturates(Adapter):
    def forward(self, x: Tensor) -> Tensor:
        return self.B(torch.tanh(self.A(x) + 1e6))  # type: ignore[no-any-return]


class CannotBegin(Adapter):
    def forward(self, x: Tensor) -> Tensor:
        return self.B(torch.tanh(self.A(x))) * self.B.weight.abs().sum()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (Leaks, "as inserted it adds .* an ordinary input"),
        (LeaksWhenNothingEnters, "as inserted it adds .* a zero input"),
        (Mutates, "changes its input"),
        (Misshapes, r"shape \(16, 6\)"),
        (Broadcasts, r"shape \(1, 7\)"),
        (Flips, "different results"),
        (Overflows, "not finite for a large input|adds up to nan"),
        (Divides, "not finite for a zero input"),
        (Explodes, "explodes"),
        (Idles, "no gradient reaches its weight unused"),
        (Detaches, "no gradient reaches its weight A"),
        (Saturates, "vanishes before weight A.weight"),
        (CannotBegin, "cannot learn"),
    ],
)
def test_a_fault_is_found_and_named(kernel: Callable[[], nn.Module], said: str) -> None:
    torch.manual_seed(0)
    state = kernel().state_dict()

    def make() -> nn.Module:
        module = kernel()
        module.load_state_dict(state)
        return module

    with pytest.raises(Unfit, match=said):
        check(make, ROWS)


def test_an_honest_adapter_passes() -> None:
    torch.manual_seed(0)
    state = Adapter().state_dict()

    def make() -> nn.Module:
        module = Adapter()
        module.load_state_dict(state)
        return module

    check(make, ROWS)


def test_the_gradient_norm_is_that_of_a_unit_scale_loss() -> None:
    linear = nn.Linear(3, 4, bias=False)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(9))
    y, at_input, at_parameters = gradients(linear, x)
    weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(2)) / 20**0.5
    torch.testing.assert_close(at_parameters[0], weight.T @ x)
    torch.testing.assert_close(at_input, weight @ linear.weight)
    torch.testing.assert_close(y, x @ linear.weight.T)
    assert gradient_norm(at_parameters) == pytest.approx(float((weight.T @ x).norm()), rel=1e-6)
