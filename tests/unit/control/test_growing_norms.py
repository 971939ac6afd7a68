"""Growth across batch norm: whole lives on residual hosts end folded, and what is undone or resumed is exact."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from esper_core.control.grower import Grower
from esper_core.lifecycle import State
from esper_core.nn.host import Host, wrap
from services.tolaria.hosts import ResNet
from tests.unit.control.growing import Run, germinate, grower, held, offer, order, owned, settings
from tests.unit.nn.hosts import LOSS, equal, train

RESIDUAL = "layer.0.conv1:layer.0.conv2"
PLACES = [("normed", "3:6", "bottleneck_mlp"), ("resnet", RESIDUAL, "conv_bypass_3x3")]


class Images:
    """The platform's own residual network on small images whose class is where they are bright, one of its blocks narrow."""

    SLOT = "stages.0.0.conv1:stages.0.0.conv2"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = ResNet(1, (4, 6), 1, 4)
        block: Any = self.model.stages[0][0]  # type: ignore[index]
        block.conv1, block.bn1 = nn.Conv2d(4, 1, 3, padding=1, bias=False), nn.BatchNorm2d(1)
        block.conv2 = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.data, self.validation = self.batches(8, 1), self.batches(8, 2)
        self.host: Host = wrap(self.model, self.data[0][0])
        self.optimizer = torch.optim.SGD(self.host.parameters(), 0.05, momentum=0.9)
        self.grower: Grower = grower(self.host, self.optimizer, self.data[:4], self.validation)

    @staticmethod
    def batches(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        found = []
        for _ in range(count):
            targets = torch.randint(4, (32,), generator=generator)
            images = torch.randn(32, 1, 6, 6, generator=generator)
            for image, target in zip(images, targets.tolist(), strict=True):
                row, column = 3 * (target // 2), 3 * (target % 2)
                image[0, row : row + 3, column : column + 3] += 0.7
            found.append((images, targets))
        return found

    def epoch(self, number: int) -> Any:
        return self.grower.step(number, sum(train(self.host.train(), self.optimizer, self.data)) / len(self.data))

    def outputs(self) -> Tensor:
        with torch.no_grad(), self.host.evaluating():
            return self.host(self.validation[0][0])  # type: ignore[no-any-return]


def test_a_residual_network_ends_plain_and_wider() -> None:
    images = Images()
    before, unit = images.host.parameter_count, images.host.slots[images.SLOT].unit_parameters
    bare = copy.deepcopy(images.model)
    for number in range(3):
        images.epoch(number)
    germinate(images.grower, images.SLOT, "conv_bypass_3x3")
    events, outputs = [], images.outputs()
    for number in range(3, 20):
        train(images.host.train(), images.optimizer, images.data)
        outputs = images.outputs()
        events += images.grower.step(number, 1.0).events
        if events and events[-1].target is State.FOSSILIZED:
            break
    assert events[-1].target is State.FOSSILIZED, [event.reason for event in events]
    assert "folded" in events[-1].reason
    assert events[-1].measurements["folded_max_abs_diff"] < 1e-9  # in double precision
    assert (images.outputs() - outputs).abs().max() <= 1e-5  # in the host's own
    plain, report = images.grower.finish()
    assert (report.beside, report.fossilized) == ((), 1)
    assert report.added_parameters == 4 * unit == images.host.parameter_count - before
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in bare.named_modules()]
    block: Any = plain.stages[0][0]  # type: ignore[index]
    assert (block.conv1.out_channels, block.bn1.num_features, block.conv2.in_channels) == (5, 5, 5)
    assert all(not module._forward_hooks for module in plain.modules())
    assert held(images.optimizer) == owned(plain)
    losses = train(plain.train(), images.optimizer, images.data)
    assert all(loss == loss for loss in losses)
    with torch.no_grad():
        assert LOSS(plain.eval()(images.validation[0][0]), images.validation[0][1]) < 1.386  # of guessing


@pytest.mark.parametrize(("family", "slot", "blueprint"), PLACES)
def test_rolled_back_is_as_before_norm_and_all(family: str, slot: str, blueprint: str) -> None:
    run = Run(family, seed=1)
    run.epochs(0, 3)
    germinate(run.grower, slot, blueprint)
    number = run.until(State.TRAINING, slot, 3)
    seen: dict[str, Any] = {}
    while run.seed(slot).state is State.TRAINING:
        keep = run.grower._keep_snapshot

        def remembering(seed: Any, keep: Any = keep) -> None:
            keep(seed)
            seen.update(copy.deepcopy(run.grower.plot.snapshot()))

        run.grower._keep_snapshot = remembering  # type: ignore[method-assign]
        run.epoch(number)
        number += 1
    run.epoch(number)
    assert run.seed(slot).state in (State.GRAFTING, State.STABILIZATION)
    assert not equal(run.grower.plot.snapshot()["host"], seen["host"])
    run.grower.command(order(slot, State.ROLLED_BACK))
    run.epoch(number + 1)
    assert equal(run.grower.plot.snapshot(), seen)
    assert held(run.optimizer) == owned(run.host)


@pytest.mark.parametrize(("family", "slot", "blueprint"), PLACES)
def test_a_snapshot_from_before_a_fold_leads_back(family: str, slot: str, blueprint: str) -> None:
    run = Run(family, seed=1)
    run.epochs(0, 2)
    snapshot = run.grower.plot.snapshot()
    inputs = run.data[0][0]
    with torch.no_grad(), run.host.evaluating():
        before = run.host(inputs)
    chosen = offer(run.grower.source, run.host.slots[slot].interface, blueprint)
    loaded = run.grower.source.poll(chosen.kernel_id)
    assert loaded is not None
    graft = run.grower.plot.plant(run.host.slots[slot], loaded)
    graft.alpha.fill_(1)
    run.grower.plot.blend(run.host.slots[slot])
    run.grower.plot.let_go(run.host.slots[slot])
    run.epoch(2)
    difference = run.grower.plot.fold(run.host.slots[slot])
    assert difference is not None
    assert difference < 1e-6  # the two biases of the way out add up in single precision
    assert len(cast(nn.Module, run.host.slots[slot].norm).running_mean) == run.host.slots[slot].interface.hidden_width
    run.grower.plot.restore(snapshot)
    with torch.no_grad(), run.host.evaluating():
        assert torch.equal(run.host(inputs), before)
    assert equal(run.grower.plot.snapshot(), snapshot)


def test_what_holds_still_under_a_graft_includes_the_norm() -> None:
    run = Run("resnet", seed=1, settings=settings(frozen="span"))
    germinate(run.grower, RESIDUAL, "conv_bypass_3x3")
    run.until(State.GRAFTING, RESIDUAL, 0)
    still = {name for name, parameter in run.host.model.named_parameters() if not parameter.requires_grad}
    paths = (
        "layer.0.conv1.weight",
        "layer.0.bn1.weight",
        "layer.0.bn1.bias",
        "layer.0.conv2.weight",
        "layer.0.conv2.bias",
    )
    assert still == set(paths)
