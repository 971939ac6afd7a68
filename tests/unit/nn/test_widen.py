"""Folding: the same function, the same training, a plain network, and an optimiser that knows exactly its parameters."""

from __future__ import annotations

import copy
from typing import cast

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from esper_core.errors import Conflict, Corrupt
from esper_core.nn.widen import adopt, fold, forget, morphology, reshape
from tests.unit.nn.grafts import NORMED, OPTIMIZERS, RESIDUAL, data, graft, host_of, kernel_parameters, outputs
from tests.unit.nn.hosts import CLASSES, equal, train

SPANS = [("mlp", "0:2", "bottleneck_mlp"), ("mlp", "2:4", "bottleneck_mlp"), ("cnn", "0:2", "conv_bypass_3x3"), *NORMED]


EVERY_FORM = [
    *SPANS,
    ("mlp", "4:6", "low_rank"),
    ("mlp", "2:4", "linear_bypass"),
    ("cnn", "0:2", "conv_bypass_1x1"),
    ("cnn", "2:4", "conv_bypass_3x3"),
    ("resnet", RESIDUAL, "conv_bypass_1x1"),
    ("transformer", "layer.linear1:layer.linear2", "bottleneck_mlp"),
]


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


def test_a_fresh_host_takes_a_grown_ones_shape() -> None:
    host = host_of("cnn")
    assert fold(host, graft(host, "0:2", "conv_bypass_3x3"), None)
    fresh = host_of("cnn")
    rule = torch.optim.Adam(fresh.parameters(), 1e-2)
    reshape(fresh.model, rule, morphology(host))
    fresh.load_state_dict(host.state_dict())
    assert torch.equal(outputs(fresh, "cnn"), outputs(host, "cnn"))
    assert {id(p) for group in rule.param_groups for p in group["params"]} == {id(p) for p in fresh.parameters()}
    conv = cast(nn.Conv2d, host.model.get_submodule("0"))
    assert (conv.out_channels, conv.in_channels) == (8, 2)


@pytest.mark.parametrize("shape", [[4, 2, 5, 5], [4, 2]])
def test_shapes_of_another_host_are_refused(shape: list[int]) -> None:
    host = host_of("cnn")
    with pytest.raises(Corrupt):
        reshape(host.model, None, {"0": shape})


@pytest.mark.parametrize("family", ["mlp", "normed"])
@settings(deadline=None, max_examples=15)
@given(
    order=st.lists(st.integers(0, 2), min_size=1, max_size=4),
    alphas=st.lists(st.floats(0.05, 1.0), min_size=4, max_size=4),
)
def test_any_sequence_of_folds_keeps_the_function(family: str, order: list[int], alphas: list[float]) -> None:
    host = host_of(family)
    names = list(host.slots)
    rule = torch.optim.SGD(host.parameters(), 0.05, momentum=0.9)
    for number, alpha in zip(order, alphas, strict=False):
        slot = graft(host, names[number % len(names)], "bottleneck_mlp", alpha)
        adopt(rule, slot.leader, kernel_parameters(slot))
        train(host, rule, data(family, 1))
        before = outputs(host, family)
        assert fold(host, slot, rule)
        torch.testing.assert_close(outputs(host, family), before, rtol=1e-9, atol=1e-9)
        assert {id(p) for p in host.parameters()} == {id(p) for group in rule.param_groups for p in group["params"]}
