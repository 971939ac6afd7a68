"""Kernels that raise, lie about their shape or are not finite: the host goes on as if they were not there, and counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper_core.nn.graft import BREAKER, Graft
from esper_core.nn.host import Host
from tests.unit.nn.hosts import (
    CLASSES,
    LOSS,
    batches,
    copied,
    gradients,
    perceptron,
    wrapped_perceptron,
)


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("out of order")


class Misshapen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), 1)


class OtherDtype(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), 2, dtype=torch.float16)


class NoTensor(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return [1.0]


class Says(nn.Module):
    """Gives one value everywhere, by way of a learnable weight."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2, 8), value))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class BadGradient(nn.Module):
    """Finite forwards, infinite backwards: √ at zero."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sqrt((x * 0).sum(1, keepdim=True)).expand(len(x), 2)


def slot_with(kernel: nn.Module) -> tuple[Host, Graft]:
    """A host whose second span, the one with gradients flowing on before it, carries the kernel at alpha 1."""
    torch.manual_seed(2)
    widths = (6, 8, 5, 2, CLASSES)
    host = wrapped_perceptron(perceptron(*widths), *widths)
    graft = host.slots["2:4"].bind(kernel)
    graft.alpha.fill_(1)
    graft.attach()
    return host, graft


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "raises": Raises,
    "wrong shape": Misshapen,
    "wrong dtype": OtherDtype,
    "no tensor": NoTensor,
    "nan": lambda: Says(math.nan),
    "inf": lambda: Says(math.inf),
}


@pytest.mark.parametrize("kind", [*REFUSED, "bad gradient"])
def test_a_broken_kernel_leaves_the_host_as_it_is_and_is_counted(kind: str) -> None:
    host, graft = slot_with(REFUSED[kind]() if kind in REFUSED else BadGradient())
    bare = copied(host.model)
    for module in bare.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    inputs, targets = batches("mlp", 1)[0]
    outputs = host(inputs)
    torch.testing.assert_close(outputs, bare(inputs), rtol=0, atol=0)
    LOSS(outputs, targets).backward()
    LOSS(bare(inputs), targets).backward()
    assert graft.errors == 1
    for name, gradient in gradients(bare).items():
        found = host.model.get_parameter(name).grad
        assert gradient is not None
        assert found is not None
        assert torch.equal(found, gradient), name


@pytest.mark.parametrize("kind", REFUSED)
def test_after_three_failures_a_kernel_has_no_say_any_more(kind: str) -> None:
    host, graft = slot_with(REFUSED[kind]())
    inputs, _ = batches("mlp", 1)[0]
    with torch.no_grad():
        for count in range(1, BREAKER + 1):
            host(inputs)
            assert graft.errors == count
        graft.muted = True
        bare = host(inputs)
        graft.muted = False
        graft.kernel = Says(1.0)  # it has recovered: too late
        assert torch.equal(host(inputs), bare)
        assert graft.errors == BREAKER


def test_before_that_a_kernel_that_recovers_is_heard_again() -> None:
    host, graft = slot_with(Says(math.nan))
    inputs, _ = batches("mlp", 1)[0]
    with torch.no_grad():
        bare = host(inputs)
        graft.kernel = Says(1.0)
        assert not torch.equal(host(inputs), bare)
    assert graft.errors == 1


@pytest.mark.parametrize("kind", [*REFUSED, "bad gradient"])
def test_a_whole_training_step_with_a_broken_kernel_keeps_the_host_finite(kind: str) -> None:
    host, graft = slot_with(REFUSED[kind]() if kind in REFUSED else BadGradient())
    rule = torch.optim.Adam([*host.parameters(), *graft.kernel.parameters()], 1e-2)
    for inputs, targets in batches("mlp", 6):
        rule.zero_grad()
        LOSS(host(inputs), targets).backward()
        rule.step()
    assert all(bool(parameter.isfinite().all()) for parameter in host.parameters())
