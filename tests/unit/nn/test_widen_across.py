"""Folding across norms, windows of any geometry and missing biases; and what stands in the way, told."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from esper_core.blueprint.build import build
from esper_core.blueprint.catalogue import catalogue
from esper_core.errors import Conflict
from esper_core.nn.host import Host, wrap
from esper_core.nn.rehearsal import rehearse
from esper_core.nn.widen import adopt, fold, morphology, obstacle, reshape
from services.tolaria.hosts import Block
from tests.unit.nn.grafts import NORMED, RESIDUAL, data, graft, host_of, kernel_parameters, outputs
from tests.unit.nn.hosts import LOSS, equal, make, planted


def test_what_cannot_be_folded_stays_beside_and_says_why() -> None:
    host = host_of("resnet")
    slot = host.slots[RESIDUAL]
    planted(slot, "depthwise_separable")
    assert slot.graft is not None
    slot.graft.alpha.fill_(1)
    slot.graft.attach()
    before = outputs(host, "resnet")
    assert "no widening" in obstacle(host, slot)
    assert not fold(host, slot, None)
    assert torch.equal(outputs(host, "resnet"), before)


def test_folded_units_come_under_the_hosts_dropout() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Dropout(1.0), nn.Linear(5, 3)).double()
    inputs = torch.randn(6, 4, dtype=torch.float64)
    host = wrap(model, inputs).train()
    slot = graft(host, "0:3", "bottleneck_mlp")
    with torch.no_grad():
        beside = host(inputs)
        assert fold(host, slot, None)
        nothing = slot.sink.bias.expand(6, 3)
        torch.testing.assert_close(host(inputs), nothing, rtol=0, atol=0)
    assert (beside - nothing).abs().max() > 1e-3


def test_nothing_stands_in_the_way_of_a_widening() -> None:
    host = host_of("resnet")
    slot = graft(host, RESIDUAL, "conv_bypass_3x3")
    assert obstacle(host, slot) == ""
    assert fold(host, slot, None)
    with pytest.raises(Conflict, match="no kernel"):
        obstacle(host, slot)


def test_a_kernel_that_reads_before_the_norm_bars_folding() -> None:
    model = make("resnet").double()
    host = wrap(
        model, torch.zeros(4, 2, 6, 6).double(), [("layer.0.conv1", "layer.0.conv2"), ("layer.0.bn1", "layer.1")]
    )
    slot = graft(host, RESIDUAL, "conv_bypass_3x3")
    graft(host, "layer.0.bn1:layer.1", "conv_bypass_1x1")
    assert "neighbouring" in obstacle(host, slot)
    assert not fold(host, slot, None)
    host.slots["layer.0.bn1:layer.1"].release()
    assert fold(host, slot, None)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_kernel_takes_the_mode_of_the_hosts_norm(frozen: bool) -> None:
    host = host_of("resnet")
    slot = graft(host, RESIDUAL, "conv_bypass_3x3")
    host.train()
    assert slot.norm is not None
    slot.norm.train(not frozen)
    kernel = cast(Any, slot.graft).kernel
    before = kernel.get_submodule("norm").running_mean.clone()
    inputs = data("resnet", 1)[0][0]
    wanted = host(inputs)
    assert torch.equal(kernel.get_submodule("norm").running_mean, before) == frozen
    twin = copy.deepcopy(host)
    assert fold(twin, twin.slots[RESIDUAL], None)
    torch.testing.assert_close(twin(inputs), host(inputs), rtol=1e-9, atol=1e-9)
    with host.evaluating():
        host(inputs)
    assert not kernel.training
    assert wanted.requires_grad


@pytest.mark.parametrize(("family", "name", "blueprint"), NORMED)
@pytest.mark.parametrize("straight_through", [False, True])
def test_a_kernel_rehearses_with_the_statistics_of_its_batches(
    family: str, name: str, blueprint: str, straight_through: bool
) -> None:
    host = host_of(family).train()
    slot = host.slots[name]
    slot.bind(build(catalogue()[blueprint], slot.interface, {"width": 4}))
    assert slot.graft is not None
    before = copy.deepcopy(dict(host.state_dict()))
    gained = rehearse(
        host, slot.graft, data(family, 4), LOSS, steps=20, learning_rate=3e-3, seed=1, straight_through=straight_through
    )
    norm = slot.graft.kernel.get_submodule("norm")
    seen = cast(Tensor, norm.num_batches_tracked).item()
    assert seen == (20 if gained > 0 else 0)  # what it came with is kept when nothing was gained
    assert gained > 0 or straight_through
    assert bool(cast(Tensor, norm.running_mean).any()) == (gained > 0)
    assert equal(dict(host.state_dict()), before)


def test_a_unit_costs_its_row_its_norm_and_its_column() -> None:
    for family, name, blueprint in NORMED:
        host = host_of(family)
        slot, before, unit = graft(host, name, blueprint), host.parameter_count, host.slots[name].unit_parameters
        assert fold(host, slot, None)
        assert host.parameter_count - before == 4 * unit
    assert host.slots[RESIDUAL].unit_parameters == 4 * 9 + 0 + 2 + 4 * 9


class Whole(nn.Module):
    """A convolution, its norm, an activation and a convolution, with any geometry."""

    def __init__(self, source: nn.Conv2d, norm: nn.Module, sink: nn.Conv2d) -> None:
        super().__init__()
        self.source, self.norm, self.sink = source, norm, sink

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.sink(torch.nn.functional.silu(self.norm(self.source(x)))))


AXIS = st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(0, 2), st.integers(1, 2))


CONVS = st.fixed_dictionaries({"h": AXIS, "w": AXIS, "bias": st.booleans()})


def conv(width: int, out: int, drawn: dict[str, Any]) -> nn.Conv2d:
    kernel, stride, padding, dilation = zip(drawn["h"], drawn["w"], strict=True)
    return nn.Conv2d(width, out, kernel, stride, padding, dilation, bias=drawn["bias"]).double()


@settings(deadline=None, max_examples=30)
@given(
    source=CONVS,
    sink=CONVS,
    norm=st.fixed_dictionaries({"affine": st.booleans(), "track_running_stats": st.booleans()}),
    alpha=st.floats(0.1, 1.0),
)
def test_any_geometry_folds_from_the_network_itself(
    source: dict[str, Any], sink: dict[str, Any], norm: dict[str, Any], alpha: float
) -> None:
    torch.manual_seed(0)
    model = Whole(conv(2, 3, source), nn.BatchNorm2d(3, **norm).double(), conv(3, 2, sink))
    inputs = torch.randn(6, 2, 14, 14, dtype=torch.float64)
    host = wrap(model, inputs)
    slot = graft(host, "source:sink", "conv_bypass_3x3", alpha)
    rule = torch.optim.SGD(host.parameters(), 0.01, momentum=0.9)
    adopt(rule, slot.leader, kernel_parameters(slot))
    assert slot.interface.foldable
    step(host, rule, inputs)
    twin, its_rule = copy.deepcopy((host, rule))
    assert fold(host, slot, rule)
    for training in (False, True):
        host.train(training)
        twin.train(training)
        torch.testing.assert_close(host(inputs), twin(inputs), rtol=1e-9, atol=1e-9)
    if alpha == 1.0:
        step(host, rule, inputs)
        step(twin, its_rule, inputs)
        torch.testing.assert_close(host(inputs), twin(inputs), rtol=1e-9, atol=1e-9)


def step(host: Host, rule: torch.optim.Optimizer, inputs: Tensor) -> None:
    rule.zero_grad()
    host.train()(inputs).square().mean().backward()
    rule.step()


@pytest.mark.parametrize("source", ["same", "valid"])
def test_paddings_given_as_words(source: Any) -> None:
    torch.manual_seed(0)
    first, last = nn.Conv2d(2, 3, (3, 5), padding=source, dilation=2), nn.Conv2d(3, 2, 3, padding="same", bias=False)
    host = wrap(Whole(first, nn.BatchNorm2d(3), last).double(), inputs := torch.randn(4, 2, 11, 11).double())
    slot = graft(host, "source:sink", "conv_bypass_3x3")
    host.eval()
    grafted = host(inputs)
    assert fold(host, slot, None)
    torch.testing.assert_close(host(inputs), grafted, rtol=1e-9, atol=1e-9)


ENCODER = partial(nn.TransformerEncoderLayer, 8, 2, 12, dropout=0.0, batch_first=True)


@pytest.mark.parametrize(
    ("make_block", "name"),
    [
        (partial(ENCODER, norm_first=True), "linear1:linear2"),
        (partial(ENCODER, norm_first=False, bias=False), "linear1:linear2"),
        (partial(Block, 8, 2, 12, "gelu"), "fc1:fc2"),
    ],
)
def test_the_two_linear_layers_of_a_transformer_block_fold(make_block: Callable[[], nn.Module], name: str) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(4, 5, 8, dtype=torch.float64)
    host = wrap(make_block().double(), inputs)
    slot = graft(host, name, "bottleneck_mlp")
    for training in (True, False):
        host.train(training)
        with torch.no_grad():
            grafted = host(inputs)
            twin = copy.deepcopy(host)
            assert fold(twin, twin.slots[slot.name], None)
            torch.testing.assert_close(twin(inputs), grafted, rtol=1e-9, atol=1e-9)
            slot.graft.muted = True  # type: ignore[union-attr]
            assert (host(inputs) - grafted).abs().max() > 1e-3
            slot.graft.muted = False  # type: ignore[union-attr]


@pytest.mark.parametrize(("family", "name", "blueprint"), NORMED)
def test_a_fresh_host_takes_the_shape_of_a_grown_one_with_norms(family: str, name: str, blueprint: str) -> None:
    host = host_of(family)
    assert fold(host, graft(host, name, blueprint), None)
    fresh = host_of(family)
    rule = torch.optim.Adam(fresh.parameters(), 1e-2)
    narrow = morphology(fresh)
    reshape(fresh.model, rule, morphology(host))
    fresh.load_state_dict(host.state_dict())
    assert torch.equal(outputs(fresh, family), outputs(host, family))
    assert {id(p) for group in rule.param_groups for p in group["params"]} == {id(p) for p in fresh.parameters()}
    norm = fresh.slots[name].norm
    assert norm is not None
    assert norm.num_features == fresh.slots[name].interface.hidden_width
    reshape(fresh.model, rule, narrow)
    fresh.load_state_dict(host_of(family).state_dict())
    assert torch.equal(outputs(fresh, family), outputs(host_of(family), family))
