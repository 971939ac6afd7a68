"""Rehearsing: a kernel learns by the loss it would bring, and nothing but the kernel changes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper_core.blueprint.build import KernelModule, build
from esper_core.blueprint.catalogue import catalogue
from esper_core.errors import InvalidInput
from esper_core.nn.graft import Graft
from esper_core.nn.host import Host, Slot, wrap
from esper_core.nn.probe import Batch, mean_loss
from esper_core.nn.rehearsal import parted, rehearse
from tests.unit.nn.hosts import LOSS, batches, equal, gradients, make, planted, wrapped

BLUEPRINTS = {
    "mlp": "bottleneck_mlp",
    "cnn": "conv_bypass_3x3",
    "resnet": "conv_bypass_3x3",
    "transformer": "attention_block",
}
WAYS = pytest.mark.parametrize("straight", [False, True], ids=["task", "straight-through"])


def silent(slot: Slot, name: str = "bottleneck_mlp", seed: int = 0) -> tuple[KernelModule, Graft]:
    """A kernel as it comes: bound, and giving nothing."""
    kernel = build(catalogue()[name], slot.interface, seed=seed)
    return kernel, slot.bind(kernel)


def practise(host: Host, graft: Graft, data: list[Batch], **changes: Any) -> float:
    options = {"steps": 40, "learning_rate": 1e-2, "seed": 5, "loss_fn": LOSS} | changes
    return rehearse(host, graft, data, options.pop("loss_fn"), **options)


@WAYS
@pytest.mark.parametrize("family", BLUEPRINTS)
def test_only_the_kernel_changes(family: str, straight: bool) -> None:
    model = make(family)
    host = wrapped(family, model)
    slot = next(iter(host.slots.values()))
    list(model.modules())[-1].eval()  # as people do with batch statistics
    data = batches(family, 3, seed=2)
    LOSS(host(data[0][0]), data[0][1]).backward()
    kernel, graft = silent(slot, BLUEPRINTS[family])
    graft.alpha.fill_(0.25)

    def seen() -> Any:
        with torch.no_grad(), host.evaluating():
            outputs = host(data[1][0])
        modes = [module.training for module in model.modules()]
        still = [parameter.requires_grad for parameter in model.parameters()]
        counted = (graft.alpha.clone(), graft.errors, graft.attached)
        return copy.deepcopy((dict(model.state_dict()), gradients(model), outputs, modes, still, counted))

    torch.manual_seed(7)
    before, dice, came = seen(), torch.get_rng_state(), copy.deepcopy(dict(kernel.state_dict()))
    gained = practise(host, graft, data, straight_through=straight, steps=20)
    assert equal(torch.get_rng_state(), dice)
    assert equal(seen(), before)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert not kernel._forward_hooks
    assert all(parameter.grad is None for parameter in kernel.parameters())
    if not straight:  # whose direction counts, and not its length
        assert gained > 0
        assert not equal(dict(kernel.state_dict()), came)


def blended_loss(host: Host, graft: Graft, data: list[Batch], alpha: float) -> float:
    """With the kernel in at that alpha, measured apart from the product's own way."""
    graft.attach()
    graft.alpha.fill_(alpha)
    loss = mean_loss(host, data, LOSS)
    graft.detach()
    graft.alpha.fill_(0)
    return loss


def test_what_it_gains_is_told_and_is_true(narrow: tuple[Host, Slot]) -> None:
    host, slot = narrow
    data = batches("mlp", 4, size=64)
    _, graft = silent(slot)
    _, held = parted(data)
    gained = practise(host, graft, data, steps=60)
    bare, blended = mean_loss(host, held, LOSS), blended_loss(host, graft, held, 1.0)
    assert gained > 0.01
    assert gained == pytest.approx((bare - blended) / bare, rel=1e-6)


def test_what_it_gains_is_counted_from_the_host_without_it_in_every_lesson(narrow: tuple[Host, Slot]) -> None:
    host, slot = narrow
    data = batches("mlp", 4, size=64)
    _, graft = silent(slot)
    first = practise(host, graft, data, steps=60)
    idle = practise(host, graft, data, steps=20, learning_rate=1e-30)
    assert idle == pytest.approx(first, rel=1e-6)
    assert practise(host, graft, data, seed=6) >= first


def test_a_kernel_that_harms_by_now_says_so(narrow: tuple[Host, Slot]) -> None:
    host, slot = narrow
    planted(slot, "bottleneck_mlp")
    assert slot.graft is not None
    with torch.no_grad():
        for parameter in slot.graft.kernel.parameters():
            parameter.mul_(20)
    assert practise(host, slot.graft, batches("mlp", 4), learning_rate=1e-30) < 0


@WAYS
def test_what_helps_only_the_samples_it_learns_from_is_not_kept(straight: bool) -> None:
    """Wanted is more of everything; on the held-back samples (every fourth) what the host gives already is right."""
    host = wrapped("mlp", make("mlp", 1))
    _, graft = silent(host.slots["4:6"])
    data = contradicting(host, 1.0, held=0.0)
    before = copy.deepcopy(dict(graft.kernel.state_dict()))
    assert practise(host, graft, data, loss_fn=nn.functional.mse_loss, straight_through=straight) == pytest.approx(0)
    assert equal(dict(graft.kernel.state_dict()), before)


def test_what_helps_the_held_back_samples_too_is_kept() -> None:
    host = wrapped("mlp", make("mlp", 1))
    _, graft = silent(host.slots["4:6"])
    before = copy.deepcopy(dict(graft.kernel.state_dict()))
    data = contradicting(host, 1.0, held=1.0)
    assert practise(host, graft, data, loss_fn=nn.functional.mse_loss) > 0.1
    assert not equal(dict(graft.kernel.state_dict()), before)


def contradicting(host: Host, learn: float, held: float) -> list[Batch]:
    """Targets that lie so far above what the host gives."""
    data = []
    for inputs, _ in batches("mlp", 2):
        with torch.no_grad(), host.evaluating():
            targets = host(inputs)
        kept = (torch.arange(len(targets)) % 4 == 3)[:, None]
        data.append((inputs, targets + torch.where(kept, held, learn)))
    return data


def first_gradients(host: Host, graft: Graft, data: list[Batch], straight: bool) -> dict[str, Tensor]:
    """What the kernel's parameters were handed in the first step."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        return lambda gradient: found.update({name: gradient.clone()})

    hooks = [parameter.register_hook(keep(name)) for name, parameter in graft.kernel.named_parameters()]
    practise(host, graft, data, steps=1, straight_through=straight)
    for hook in hooks:
        hook.remove()
    return found


def gradients_at(host: Host, graft: Graft, batch: Batch, alpha: float) -> dict[str, Tensor]:
    """Of the blended loss by autograd alone."""
    names, parameters = zip(*graft.kernel.named_parameters(), strict=True)
    graft.attach()
    graft.alpha.fill_(alpha)
    with host.evaluating():
        found = torch.autograd.grad(LOSS(host(batch[0]), batch[1]), parameters)
    graft.detach()
    return dict(zip(names, found, strict=True))


def doubles(family: str = "mlp") -> tuple[Host, list[Batch]]:
    """A host in float64, and one batch."""
    host = wrapped(family, make(family, 1).double())
    return host, [(inputs.double(), targets) for inputs, targets in batches(family, 1)]


def test_straight_through_is_the_slope_at_alpha_zero() -> None:
    """Blended at alpha, a kernel's gradient is alpha times the slope, but for alpha squared."""
    host, data = doubles()
    planted(host.slots["2:4"], "bottleneck_mlp")
    graft = host.slots["2:4"].graft
    assert graft is not None
    [batch], _ = parted(data)
    alpha = 1e-6
    near, whole = gradients_at(host, graft, batch, alpha), gradients_at(host, graft, batch, 1.0)
    start = copy.deepcopy(dict(graft.kernel.state_dict()))
    slope = first_gradients(host, graft, data, straight=True)
    graft.kernel.load_state_dict(start)
    task = first_gradients(host, graft, data, straight=False)
    assert slope.keys() == task.keys() == near.keys()
    for name in slope:
        torch.testing.assert_close(slope[name], near[name] / alpha, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(task[name], whole[name], rtol=1e-12, atol=1e-14)
    assert any(not torch.allclose(slope[name], task[name], rtol=1e-2) for name in slope)


def test_for_a_silent_kernel_both_ways_begin_alike() -> None:
    host, data = doubles()
    kernel, graft = silent(host.slots["2:4"])
    start = copy.deepcopy(dict(kernel.state_dict()))
    slope = first_gradients(host, graft, data, straight=True)
    kernel.load_state_dict(start)
    task = first_gradients(host, graft, data, straight=False)
    kernel.load_state_dict(start)
    [batch], _ = parted(data)
    near = gradients_at(host, graft, batch, 1e-6)
    assert any(bool(gradient.any()) for gradient in slope.values())
    for name in slope:
        torch.testing.assert_close(slope[name], task[name], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(slope[name], near[name] / 1e-6, rtol=1e-6, atol=1e-10)


@WAYS
def test_it_depends_on_the_seed_alone(narrow: tuple[Host, Slot], straight: bool) -> None:
    host, slot = narrow
    data = batches("mlp", 4, size=64)
    ends = []
    for noise, seed in ((1, 5), (2, 5), (1, 6)):
        torch.manual_seed(noise)
        kernel, graft = silent(slot)
        gained = practise(host, graft, data, seed=seed, straight_through=straight)
        ends.append((gained, copy.deepcopy(dict(kernel.state_dict()))))
        slot.release()
    assert ends[0][0] == ends[1][0]
    assert equal(ends[0][1], ends[1][1])
    assert not equal(ends[0][1], ends[2][1])


@pytest.mark.parametrize("value", [math.nan, 1e30])
def test_a_kernel_whose_output_is_not_finite_shows_it(narrow: tuple[Host, Slot], value: float) -> None:
    host, slot = narrow
    kernel, graft = silent(slot)
    with torch.no_grad():
        for parameter in kernel.parameters():
            parameter.fill_(value)
    assert math.isnan(practise(host, graft, batches("mlp", 4)))
    assert graft.errors == 0  # it has failed no pass of the run


def test_a_kernel_that_runs_away_shows_it(narrow: tuple[Host, Slot]) -> None:
    host, slot = narrow
    _, graft = silent(slot)
    assert math.isnan(practise(host, graft, batches("mlp", 4), learning_rate=1e30))
    assert graft.errors == 0


# -- what a probe may be --------------------------------------------------------------------------------------------


class Gated(nn.Module):
    """Two inputs with a row per sample, and a mask of features that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 2)
        self.second = nn.Linear(2, 6)

    def forward(self, x: Tensor, gate: Tensor, mask: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x * mask))) * gate


@WAYS
@pytest.mark.parametrize("size", [32, 10])
def test_inputs_may_be_tuples(straight: bool, size: int) -> None:
    torch.manual_seed(3)
    mask = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.5])
    data: list[Batch] = [((x, torch.rand(size, 1) + 0.5, mask), y) for x, y in batches("mlp", 3, size)]
    host = wrap(Gated(), data[0][0])
    _, graft = silent(host.slots["first:second"])
    gained = practise(host, graft, data, straight_through=straight)
    assert math.isfinite(gained)
    assert straight or gained > 0


def test_every_fourth_sample_is_held_back_with_its_own_inputs_and_none_is_lost() -> None:
    sizes = [8, 3, 1, 2, 1, 6]
    rows = torch.arange(sum(sizes)).float().split(sizes)
    learn, held = parted([((part, part * 2, 0.5), part * 3) for part in rows])
    for part in (learn, held):
        for (first, second, plain), targets in part:
            assert len(targets)
            assert torch.equal(first * 2, second)
            assert torch.equal(first * 3, targets)
            assert plain == 0.5
    kept = torch.cat([inputs[0] for inputs, _ in held]).tolist()
    assert kept == [float(row) for row in range(sum(sizes)) if row % 4 == 3]
    taught = torch.cat([inputs[0] for inputs, _ in learn]).tolist()
    assert sorted(kept + taught) == list(range(sum(sizes)))


@pytest.mark.parametrize("size", [1, 3])
def test_small_batches_will_do(size: int) -> None:
    host = wrapped("mlp", make("mlp", 1))
    _, graft = silent(host.slots["2:4"])
    assert math.isfinite(practise(host, graft, batches("mlp", 12, size)))


def test_too_few_samples_are_said() -> None:
    host = wrapped("mlp", make("mlp", 1))
    _, graft = silent(host.slots["2:4"])
    with pytest.raises(InvalidInput, match="3 samples") as caught:
        practise(host, graft, batches("mlp", 1, 3))
    assert caught.value.hint
