"""Isolated learning: the target is what no change of the sink's own weights can do, and the kernel learns it, alone."""

from __future__ import annotations

import math
from typing import cast

import pytest
import torch
from torch import nn

from esper_core.blueprint.build import KernelModule, build
from esper_core.blueprint.catalogue import catalogue
from esper_core.nn.host import Host, Slot
from esper_core.nn.isolated import Lesson, amplify, prepare, scale_output, teach
from esper_core.nn.probe import look
from tests.unit.nn.hosts import LOSS, batches, equal, make, planted, wrapped


def silent(slot: Slot, name: str = "bottleneck_mlp", **symbols: int) -> KernelModule:
    kernel = build(catalogue()[name], slot.interface, symbols)
    slot.bind(kernel)
    return kernel


def learn(kernel: nn.Module, lesson: Lesson, steps: int = 200) -> float:
    return teach(kernel, lesson, steps=steps, learning_rate=3e-3, batch=128, seed=5)


def test_the_target_is_orthogonal_to_all_that_the_sink_reads(narrow: tuple[Host, Slot]) -> None:
    host, slot = narrow
    data = batches("mlp", 4, size=64)
    lesson = prepare(host, slot, data, LOSS)
    seen = [sights[slot.name] for _, sights in look(host, [slot], data, LOSS)]
    inner = torch.cat([sight.inner for sight in seen]).double()
    inner = torch.cat([inner, torch.ones(len(inner), 1)], 1)
    wanted = torch.cat(lesson.wanted).double()
    cosines = (inner.T @ wanted).abs() / (inner.norm(dim=0)[:, None] * wanted.norm(dim=0) + 1e-30)
    assert cosines.max() < 1e-3
    assert wanted.square().mean().sqrt().item() == pytest.approx(1, rel=1e-5)
    descent = torch.cat([sight.descent for sight in seen]).double()
    rest = descent - lesson.scale * wanted  # what the sink can do by itself
    weights = torch.linalg.lstsq(inner, rest).solution
    assert (inner @ weights - rest).norm() <= 1e-3 * rest.norm()
    assert torch.equal(torch.cat(lesson.entering), torch.cat([sight.entering for sight in seen]))


def test_a_kernel_learns_and_what_it_learnt_lowers_the_loss(narrow: tuple[Host, Slot]) -> None:
    host, slot = narrow
    data = batches("mlp", 8, size=64)
    kernel = silent(slot)
    lesson = prepare(host, slot, data, LOSS)
    assert learn(kernel, lesson) > 0.01
    assert slot.graft is not None
    gain = amplify(host, slot.graft, kernel, lesson, data, LOSS)
    with torch.no_grad(), host.evaluating():
        bare = sum(LOSS(host(x), y).item() for x, y in data) / 8
        slot.graft.alpha.fill_(1)
        slot.graft.attach()
        blended = sum(LOSS(host(x), y).item() for x, y in data) / 8
    assert gain > 0
    assert bare - blended == pytest.approx(gain, rel=1e-3)


def test_lessons_depend_on_the_seed_alone(narrow: tuple[Host, Slot]) -> None:
    host, slot = narrow
    lesson = prepare(host, slot, batches("mlp", 4), LOSS)
    kernels = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        kernel = build(catalogue()["bottleneck_mlp"], slot.interface)
        state = torch.get_rng_state()
        learn(kernel, lesson, steps=40)
        assert torch.equal(torch.get_rng_state(), state)
        kernels.append(dict(kernel.state_dict()))
    assert equal(kernels[0], kernels[1])


def test_what_makes_it_worse_on_unseen_samples_is_not_kept() -> None:
    """Pairs that contradict the held-back ones (every fifth): the first weights, which give nothing, stay the best."""
    slot = wrapped("mlp", make("mlp")).slots["0:2"]
    entering = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    wanted = torch.where(torch.arange(100) % 5 == 4, -1.0, 1.0)[:, None] * entering[:, :2]
    kernel = silent(slot, width=8)
    before = {name: value.clone() for name, value in kernel.state_dict().items()}
    assert learn(kernel, Lesson([entering], [wanted], 1.0)) == 0
    assert equal(before, dict(kernel.state_dict()))


def test_a_kernel_that_is_not_finite_shows_it() -> None:
    host = wrapped("mlp", make("mlp"))
    slot = host.slots["0:2"]
    lesson = prepare(host, slot, batches("mlp", 4), LOSS)
    kernel = silent(slot)
    with torch.no_grad():
        next(kernel.parameters()).fill_(math.nan)
    assert math.isnan(learn(kernel, lesson, steps=5))


@pytest.mark.parametrize(
    ("family", "slot", "name"),
    [
        ("mlp", "0:2", "bottleneck_mlp"),
        ("mlp", "0:2", "linear_bypass"),
        ("cnn", "0:2", "conv_bypass_3x3"),
        ("cnn", "0:2", "squeeze_excite"),
        ("normed", "0:3", "bottleneck_mlp"),
        ("resnet", "layer.0.conv1:layer.0.conv2", "conv_bypass_3x3"),
        ("resnet", "layer.0.conv1:layer.0.conv2", "depthwise_separable"),
        ("transformer", "layer.linear1:layer.linear2", "attention_block"),
    ],
)
@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_scaling_the_way_out_scales_the_output(family: str, slot: str, name: str, factor: float) -> None:
    place = wrapped(family, make(family)).slots[slot]
    kernel = planted(place, name)
    entering = torch.randn(4, *place.interface.in_shape if family != "transformer" else (5, 8))
    with torch.no_grad():
        before = kernel(entering)
        scale_output(kernel, factor)
        torch.testing.assert_close(kernel(entering), factor * before, rtol=1e-5, atol=1e-6)


def test_no_length_that_helps_leaves_the_kernel_unscaled(narrow: tuple[Host, Slot]) -> None:
    host, slot = narrow
    data = batches("mlp", 4)
    kernel = planted(slot, "bottleneck_mlp")
    lesson = prepare(host, slot, data, LOSS)
    before = {key: value.clone() for key, value in kernel.state_dict().items()}
    assert slot.graft is not None

    def backwards(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """A loss that any change raises."""
        return (outputs - reference[len(outputs)]).square().mean()

    reference: dict[int, torch.Tensor] = {}
    with torch.no_grad(), host.evaluating():
        one = [(x, y) for x, y in data[:1]]
        reference[len(one[0][1])] = host(one[0][0])
    assert amplify(host, slot.graft, kernel, lesson, one, backwards) == 0
    assert equal(before, dict(kernel.state_dict()))
    assert float(slot.graft.alpha) == 0
    assert not slot.graft.attached


def test_images_and_tokens_have_targets_of_their_shape() -> None:
    for family, name in (("cnn", "0:2"), ("transformer", "layer.linear1:layer.linear2")):
        host = wrapped(family, make(family))
        lesson = prepare(host, host.slots[name], batches(family, 2), LOSS)
        seen = [sights[name] for _, sights in look(host, [host.slots[name]], batches(family, 2), LOSS)]
        assert [w.shape for w in lesson.wanted] == [sight.descent.shape for sight in seen]
        kernel = cast(
            nn.Module,
            build(catalogue()["conv_bypass_3x3" if family == "cnn" else "bottleneck_mlp"], host.slots[name].interface),
        )
        assert kernel(lesson.entering[0]).shape == lesson.wanted[0].shape
