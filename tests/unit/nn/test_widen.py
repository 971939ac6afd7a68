"""Folding: the same function, the same training, a plain network, and an optimiser that knows exactly its parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from esper_core.errors import Conflict, Corrupt
from esper_core.nn.host import Host, Slot, wrap
from esper_core.nn.widen import adopt, fold, forget, morphology, obstacle, reshape
from tests.unit.nn.hosts import CLASSES, batches, equal, make, planted, train, wrapped

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.05),
    "momentum": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, 1e-2),
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, 1e-2, amsgrad=True, weight_decay=0.0),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, 1e-3),
}
RESIDUAL = "layer.0.conv1:layer.0.conv2"
NORMED = [
    ("normed", "0:3", "bottleneck_mlp"),
    ("normed", "3:6", "bottleneck_mlp"),
    ("resnet", RESIDUAL, "conv_bypass_3x3"),
]
SPANS = [("mlp", "0:2", "bottleneck_mlp"), ("mlp", "2:4", "bottleneck_mlp"), ("cnn", "0:2", "conv_bypass_3x3"), *NORMED]
EVERY_FORM = [
    *SPANS,
    ("mlp", "4:6", "low_rank"),
    ("mlp", "2:4", "linear_bypass"),
    ("cnn", "0:2", "conv_bypass_1x1"),
    ("cnn", "2:4", "conv_bypass_3x3"),
    ("resnet", RESIDUAL, "conv_bypass_1x1"),
]


def host_of(family: str, dtype: torch.dtype = torch.float64) -> Host:
    return wrapped(family, make(family).to(dtype))


def graft(host: Host, name: str, blueprint: str, alpha: float = 1.0) -> Slot:
    """Plant a kernel and blend it in."""
    slot = host.slots[name]
    planted(slot, blueprint, **({} if blueprint == "linear_bypass" else {"width": 4}))
    assert slot.graft is not None
    slot.graft.alpha.fill_(alpha)
    slot.graft.attach()
    return slot


def kernel_parameters(slot: Slot) -> list[nn.Parameter]:
    """All but the way out's bias: host and kernel have one each there, and folding makes one of the two."""
    assert slot.graft is not None
    parameters = dict(slot.graft.kernel.named_parameters())
    if "B.bias" in parameters:
        parameters.pop("B.bias").requires_grad_(False)
    return list(parameters.values())


def data(family: str, count: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> list[tuple[Any, Tensor]]:
    return [(inputs.to(dtype), targets) for inputs, targets in batches(family, count, seed=seed)]


def outputs(host: Host, family: str, dtype: torch.dtype = torch.float64) -> Tensor:
    with torch.no_grad(), host.evaluating():
        return cast(Tensor, host(data(family, 1, seed=5, dtype=dtype)[0][0]))


@pytest.mark.parametrize(("family", "name", "blueprint"), EVERY_FORM)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_outputs_are_the_same(
    family: str, name: str, blueprint: str, dtype: torch.dtype, tolerance: float, alpha: float
) -> None:
    host = host_of(family, dtype)
    bare = outputs(host, family, dtype)
    slot = graft(host, name, blueprint, alpha)
    hidden = slot.interface.hidden_width
    grafted = outputs(host, family, dtype)
    assert fold(host, slot, None)
    assert slot.graft is None
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in host.modules())
    folded = outputs(host, family, dtype)
    assert (folded - grafted).abs().max() <= tolerance * grafted.abs().max()
    assert (grafted - bare).abs().max() > 1e-3  # otherwise nothing was proven
    assert slot.interface.hidden_width > hidden


@pytest.mark.parametrize(("family", "name", "blueprint"), SPANS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_as_if_nothing_had_happened(family: str, name: str, blueprint: str, optimizer: str) -> None:
    host = host_of(family)
    slot = graft(host, name, blueprint)
    host.train((family, name, blueprint) in NORMED)  # elsewhere dropout draws for other shapes
    rule = OPTIMIZERS[optimizer]([*host.parameters()])
    adopt(rule, slot.leader, kernel_parameters(slot))
    train(host, rule, data(family, 4, seed=2))
    twin, its_rule = copy.deepcopy((host, rule))
    assert fold(host, slot, rule)
    losses, its_losses = train(host, rule, data(family, 6, seed=3)), train(twin, its_rule, data(family, 6, seed=3))
    assert losses == pytest.approx(its_losses, rel=1e-9)
    assert (outputs(host, family) - outputs(twin, family)).abs().max() <= 1e-9
    if slot.norm is not None:
        its_graft = twin.slots[name].graft
        assert its_graft is not None
        its_norm, own = its_graft.kernel.get_submodule("norm"), twin.slots[name].norm
        for key, value in slot.norm.state_dict().items():
            if value.ndim:
                theirs = torch.cat([own.state_dict()[key], its_norm.state_dict()[key]])  # type: ignore[union-attr]
                torch.testing.assert_close(value, theirs, rtol=1e-9, atol=1e-9)
    assert {id(p) for p in host.parameters()} == {id(p) for group in rule.param_groups for p in group["params"]}
    assert {id(p) for p in rule.state} <= {id(p) for p in host.parameters()}


@pytest.mark.parametrize("late", [20, 200])
def test_a_kernel_that_came_late_keeps_its_pace(late: int) -> None:
    """Adam divides by how long it has averaged: moments move to an older parameter at equal corrected value."""
    host = host_of("mlp")
    rule = torch.optim.Adam(host.parameters(), 1e-2)
    train(host, rule, data("mlp", late, seed=2))
    slot = graft(host, "0:2", "bottleneck_mlp")
    adopt(rule, slot.leader, kernel_parameters(slot))
    train(host, rule, data("mlp", 6, seed=4))
    assert slot.graft is not None
    parameters = dict(slot.graft.kernel.named_parameters())
    wanted = {name: corrected(rule, parameters[name]) for name in ("A.weight", "A.bias", "B.weight")}
    twin, its_rule = copy.deepcopy((host, rule))
    assert fold(host, slot, rule)
    found = {
        "A.weight": [moment[-4:] for moment in corrected(rule, slot.source.weight)],
        "A.bias": [moment[-4:] for moment in corrected(rule, cast(nn.Parameter, slot.source.bias))],
        "B.weight": [moment[:, -4:] for moment in corrected(rule, slot.sink.weight)],
    }
    for name, moments in wanted.items():
        for mine, theirs in zip(found[name], moments, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=0)
    # And so the next steps are about as long as the kernel's own would have been.
    before = slot.source.weight.detach()[-4:].clone()
    train(host, rule, data("mlp", 3, seed=5))
    train(twin, its_rule, data("mlp", 3, seed=5))
    its_graft = twin.slots["0:2"].graft
    assert its_graft is not None
    its_weight = dict(its_graft.kernel.named_parameters())["A.weight"]
    mine, theirs = slot.source.weight[-4:] - before, its_weight - before
    assert float(mine.detach().norm() / theirs.detach().norm()) == pytest.approx(1, abs=0.35)


def corrected(rule: torch.optim.Adam, parameter: nn.Parameter) -> list[Tensor]:
    """Adam's two moments as its step uses them (Kingma and Ba, 2015, algorithm 1)."""
    state, (first, second) = rule.state[parameter], rule.param_groups[0]["betas"]
    step = float(state["step"])
    return [state["exp_avg"] / (1 - first**step), state["exp_avg_sq"] / (1 - second**step)]


def test_own_moments_of_the_host_stay() -> None:
    host = host_of("mlp")
    slot = graft(host, "0:2", "bottleneck_mlp")
    rule = torch.optim.Adam(host.parameters(), 1e-2)
    adopt(rule, slot.leader, kernel_parameters(slot))
    train(host, rule, data("mlp", 3))
    old = {key: value.clone() for key, value in rule.state[slot.source.weight].items()}
    other = {key: value.clone() for key, value in rule.state[cast(nn.Linear, slot.sink).bias].items()}
    assert fold(host, slot, rule)
    new = rule.state[slot.source.weight]
    assert torch.equal(new["step"], old["step"])
    assert torch.equal(new["exp_avg"][:8], old["exp_avg"])
    assert torch.equal(new["exp_avg_sq"][:8], old["exp_avg_sq"])
    assert equal(dict(rule.state[cast(nn.Linear, slot.sink).bias]), other)


def test_rules_of_each_group_stay_with_its_layers() -> None:
    host = host_of("mlp")
    slot = graft(host, "0:2", "bottleneck_mlp")
    rule = torch.optim.SGD(
        [
            {"params": [*slot.source.parameters()], "lr": 0.1},
            {"params": [p for name, p in host.named_parameters() if not name.startswith("model.0.")], "lr": 0.2},
        ]
    )
    adopt(rule, slot.leader, kernel_parameters(slot))
    assert len(rule.param_groups[1]["params"]) == 6 + 3
    assert fold(host, slot, rule)
    assert [len(group["params"]) for group in rule.param_groups] == [2, 6]
    assert {id(p) for p in rule.param_groups[0]["params"]} == {id(p) for p in slot.source.parameters()}


def test_neighbours_follow_and_can_grow_in_turn() -> None:
    host = host_of("mlp")
    rule = torch.optim.Adam(host.parameters(), 1e-2)
    assert fold(host, graft(host, "2:4", "bottleneck_mlp"), rule)
    widths = {
        name: (s.interface.in_width, s.interface.hidden_width, s.interface.out_width) for name, s in host.slots.items()
    }
    assert widths == {"0:2": (6, 8, 6), "2:4": (8, 6, 8), "4:6": (6, 8, CLASSES)}
    for name in host.slots:
        before = outputs(host, "mlp")
        slot = graft(host, name, "bottleneck_mlp")
        grafted = outputs(host, "mlp")
        assert (grafted - before).abs().max() > 1e-3
        assert fold(host, slot, rule)
        assert (outputs(host, "mlp") - grafted).abs().max() < 1e-9
    linears = [module for module in host.modules() if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linears] == [
        (6, 12),
        (12, 10),
        (10, 12),
        (12, CLASSES),
    ]
    assert all(layer.weight.shape == (layer.out_features, layer.in_features) for layer in linears)


@pytest.mark.parametrize("attached", [True, False])
def test_a_neighbours_kernel_bars_folding(attached: bool) -> None:
    host = host_of("mlp")
    slot = graft(host, "0:2", "bottleneck_mlp")
    neighbour = graft(host, "2:4", "bottleneck_mlp")
    assert neighbour.graft is not None
    if not attached:
        neighbour.graft.detach()
    before = (outputs(host, "mlp"), dict(host.state_dict()))
    assert not host.can_widen(slot)
    assert not fold(host, slot, None)
    assert slot.graft is not None
    assert slot.graft.attached
    assert equal((outputs(host, "mlp"), dict(host.state_dict())), before)
    neighbour.release()
    assert fold(host, slot, None)


def test_a_kernel_two_layers_on_does_not_bar_folding() -> None:
    host = host_of("mlp")
    far = graft(host, "4:6", "bottleneck_mlp")
    slot = graft(host, "0:2", "bottleneck_mlp")
    before = outputs(host, "mlp")
    assert fold(host, slot, None)
    assert (outputs(host, "mlp") - before).abs().max() < 1e-9
    assert far.graft is not None
    assert far.graft.attached


@pytest.mark.parametrize(
    ("family", "name", "blueprint", "why"),
    [
        ("transformer", "layer.linear1:layer.linear2", "bottleneck_mlp", "dropout"),
        ("resnet", RESIDUAL, "depthwise_separable", "no widening"),
    ],
)
def test_what_cannot_be_folded_stays_beside_and_says_why(family: str, name: str, blueprint: str, why: str) -> None:
    host = host_of(family)
    slot = host.slots[name]
    planted(slot, blueprint)
    assert slot.graft is not None
    slot.graft.alpha.fill_(1)
    slot.graft.attach()
    before = outputs(host, family)
    assert why in obstacle(host, slot)
    assert not fold(host, slot, None)
    assert torch.equal(outputs(host, family), before)


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


@settings(deadline=None, max_examples=12)
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
    inputs = torch.randn(6, 2, 11, 11, dtype=torch.float64)
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


@pytest.mark.parametrize("first", [True, False])
def test_the_two_linear_layers_of_an_encoder_layer_fold(first: bool) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=first).double()
    inputs = torch.randn(4, 5, 8, dtype=torch.float64)
    host = wrap(model, inputs)
    slot = graft(host, "linear1:linear2", "bottleneck_mlp")
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


def test_an_empty_slot_has_nothing_to_fold() -> None:
    host = host_of("mlp")
    with pytest.raises(Conflict, match="no kernel"):
        fold(host, host.slots["0:2"], None)


def test_adopting_needs_an_optimiser_over_the_host() -> None:
    host = host_of("mlp")
    rule = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    with pytest.raises(Conflict) as caught:
        adopt(rule, host.slots["0:2"].leader, [])
    assert caught.value.hint


def test_forgetting_leaves_no_state() -> None:
    host = host_of("mlp")
    slot = graft(host, "0:2", "bottleneck_mlp")
    rule = torch.optim.Adam(host.parameters(), 1e-2)
    parameters = kernel_parameters(slot)
    adopt(rule, slot.leader, parameters)
    train(host, rule, data("mlp", 2))
    assert all(parameter in rule.state for parameter in parameters)
    forget(rule, parameters)
    assert not any(parameter in rule.state for parameter in parameters)
    assert {id(p) for group in rule.param_groups for p in group["params"]} == {id(p) for p in host.parameters()}


@pytest.mark.parametrize(("family", "name", "blueprint"), NORMED)
def test_a_fresh_host_takes_the_shape_of_a_grown_one_with_norms(family: str, name: str, blueprint: str) -> None:
    host = host_of(family)
    assert fold(host, graft(host, name, blueprint), None)
    fresh = host_of(family)
    rule = torch.optim.Adam(fresh.parameters(), 1e-2)
    narrow = morphology(fresh)
    reshape(fresh, rule, morphology(host))
    fresh.load_state_dict(host.state_dict())
    assert torch.equal(outputs(fresh, family), outputs(host, family))
    assert {id(p) for group in rule.param_groups for p in group["params"]} == {id(p) for p in fresh.parameters()}
    norm = fresh.slots[name].norm
    assert norm is not None
    assert norm.num_features == fresh.slots[name].interface.hidden_width
    reshape(fresh, rule, narrow)
    fresh.load_state_dict(host_of(family).state_dict())
    assert torch.equal(outputs(fresh, family), outputs(host_of(family), family))


def test_a_fresh_host_takes_a_grown_ones_shape() -> None:
    host = host_of("cnn")
    assert fold(host, graft(host, "0:2", "conv_bypass_3x3"), None)
    fresh = host_of("cnn")
    rule = torch.optim.Adam(fresh.parameters(), 1e-2)
    reshape(fresh, rule, morphology(host))
    fresh.load_state_dict(host.state_dict())
    assert torch.equal(outputs(fresh, "cnn"), outputs(host, "cnn"))
    assert {id(p) for group in rule.param_groups for p in group["params"]} == {id(p) for p in fresh.parameters()}
    conv = cast(nn.Conv2d, host.model.get_submodule("0"))
    assert (conv.out_channels, conv.in_channels) == (8, 2)


@pytest.mark.parametrize("shape", [[4, 2, 5, 5], [4, 2]])
def test_shapes_of_another_host_are_refused(shape: list[int]) -> None:
    host = host_of("cnn")
    with pytest.raises(Corrupt):
        reshape(host, None, {"0": shape})


@settings(deadline=None, max_examples=15)
@given(
    order=st.lists(st.sampled_from(["0:2", "2:4", "4:6"]), min_size=1, max_size=4),
    alphas=st.lists(st.floats(0.05, 1.0), min_size=4, max_size=4),
)
def test_any_sequence_of_folds_keeps_the_function(order: list[str], alphas: list[float]) -> None:
    host = host_of("mlp")
    rule = torch.optim.SGD(host.parameters(), 0.05, momentum=0.9)
    for name, alpha in zip(order, alphas, strict=False):
        slot = graft(host, name, "bottleneck_mlp", alpha)
        adopt(rule, slot.leader, kernel_parameters(slot))
        train(host, rule, data("mlp", 1))
        before = outputs(host, "mlp")
        assert fold(host, slot, rule)
        torch.testing.assert_close(outputs(host, "mlp"), before, rtol=1e-9, atol=1e-9)
        assert {id(p) for p in host.parameters()} == {id(p) for group in rule.param_groups for p in group["params"]}
