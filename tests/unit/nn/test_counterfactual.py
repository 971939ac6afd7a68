"""What a graft contributes: its sign, its size, and a bound that rarely lies."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from esper_core.errors import InvalidInput
from esper_core.nn.counterfactual import contribution
from esper_core.nn.host import Host, Slot, wrap
from tests.unit.nn.hosts import LOSS, batches, copied, make, moved, planted, train, wrapped


def trained(epochs: int = 30) -> Host:
    host = wrapped("mlp", make("mlp", 2))
    rule = torch.optim.Adam(host.parameters(), 1e-2)
    for _ in range(epochs):
        train(host, rule, batches("mlp", 8))
    return host


@pytest.fixture(scope="module")
def good() -> Host:
    return trained()


def slot_of(host: Host) -> Slot:
    return host.slots["4:6"]


def test_a_useful_kernel_contributes_surely(good: Host) -> None:
    host = wrapped("mlp", copied(good.model))
    slot = slot_of(host)
    held_back = batches("mlp", 8, seed=9)
    with torch.no_grad():
        whole = sum(LOSS(host(x), y).item() for x, y in held_back) / 8
    moved(slot, 4)
    with torch.no_grad():
        without = sum(LOSS(host(x), y).item() for x, y in held_back) / 8
    assert slot.graft is not None
    slot.graft.alpha.fill_(1)
    slot.graft.attach()
    found = contribution(host, slot.graft, held_back, LOSS)
    assert found.mean == pytest.approx(without - whole, rel=1e-4)
    assert found.loss == pytest.approx(whole, rel=1e-4)
    assert 0 < found.lower < found.mean
    assert not slot.graft.muted


def test_a_silent_kernel_contributes_nothing(good: Host) -> None:
    host = wrapped("mlp", copied(good.model))
    slot = slot_of(host)
    kernel = planted(slot, "bottleneck_mlp", width=4)
    with torch.no_grad():
        for name, parameter in kernel.named_parameters():
            if name.startswith("B"):
                parameter.zero_()
    assert slot.graft is not None
    slot.graft.alpha.fill_(1)
    slot.graft.attach()
    found = contribution(host, slot.graft, batches("mlp", 8, seed=9), LOSS)
    assert (found.mean, found.lower) == (0, 0)  # and so not surely positive


@pytest.mark.parametrize("seed", range(5))
def test_a_harmful_kernel_is_seen_as_such(seed: int, good: Host) -> None:
    host = wrapped("mlp", copied(good.model))
    slot = slot_of(host)
    kernel = planted(slot, "bottleneck_mlp", seed=seed, width=4)
    with torch.no_grad():
        for parameter in kernel.parameters():
            parameter *= 5
    assert slot.graft is not None
    slot.graft.alpha.fill_(1)
    slot.graft.attach()
    found = contribution(host, slot.graft, batches("mlp", 8, seed=9), LOSS)
    assert found.mean < 0
    assert found.lower < found.mean


class Coin(nn.Module):
    """A kernel's output that helps or harms by chance: its true contribution is zero."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, x: Tensor) -> Tensor:
        return 0.3 * torch.randn(len(x), 1, generator=self.generator)


class Line(nn.Module):
    """The loss is the output itself, so that a kernel's contribution is minus what it adds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 2), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


def test_the_bound_is_wrong_about_one_time_in_twenty() -> None:
    torch.manual_seed(0)
    host = wrap(Line(), torch.zeros(4, 2))
    slot = host.slots["first:last"]
    held_back = [(torch.randn(64, 2), torch.zeros(64)) for _ in range(2)]
    wrong, trials = 0, 400
    for seed in range(trials):
        graft = slot.bind(Coin(seed))
        graft.alpha.fill_(1)
        graft.attach()
        wrong += contribution(host, graft, held_back, lambda y, _: y.mean()).lower > 0
        slot.release()
    # Binomial(400, 1/20): mean 20, deviation 4.4; beyond three deviations something is wrong with the bound.
    assert abs(wrong - trials / 20) <= 3 * math.sqrt(trials * 0.05 * 0.95)


def test_a_loss_that_is_not_finite_is_no_contribution(good: Host) -> None:
    host = wrapped("mlp", copied(good.model))
    slot = slot_of(host)
    planted(slot, "bottleneck_mlp", width=4)
    assert slot.graft is not None
    slot.graft.attach()
    found = contribution(host, slot.graft, batches("mlp", 8), lambda y, t: LOSS(y, t) + math.inf)
    assert found.lower == -math.inf
    assert found.mean == -math.inf


def test_one_sample_is_too_little(good: Host) -> None:
    host = wrapped("mlp", copied(good.model))
    planted(slot_of(host), "bottleneck_mlp", width=4)
    graft = slot_of(host).graft
    assert graft is not None
    with pytest.raises(InvalidInput) as caught:
        contribution(host, graft, batches("mlp", 1, size=1), LOSS)
    assert caught.value.hint
    assert contribution(host, graft, batches("mlp", 1, size=2), LOSS).chunks == 2


@pytest.mark.parametrize(
    ("count", "size", "chunks"), [(1, 32, 16), (4, 32, 16), (1, 16 * 256, 16), (2, 5000, 40), (3, 5, 15)]
)
def test_the_bound_rests_on_sixteen_differences_or_more(count: int, size: int, chunks: int, good: Host) -> None:
    host = wrapped("mlp", copied(good.model))
    planted(slot_of(host), "bottleneck_mlp", width=4)
    graft = slot_of(host).graft
    assert graft is not None
    assert contribution(host, graft, batches("mlp", count, size=size), LOSS).chunks == chunks
