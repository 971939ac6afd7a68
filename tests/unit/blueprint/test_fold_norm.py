"""Folding across a norm and into layers without bias; which fold tensors are plain copies."""

import pytest
import torch

from esper_core.blueprint.build import build, example_input
from esper_core.blueprint.catalogue import candidates, catalogue
from esper_core.blueprint.fold import fold_terms, foldable, units
from esper_core.blueprint.interface import BatchNorm, Layout, SlotInterface
from esper_core.blueprint.ir import BlueprintIR, Node
from tests.unit.blueprint.pairs import Pair, assert_exact, trained


def over_a_norm(bias: str) -> BlueprintIR:
    nodes = (
        Node(name="A", op="linear", inputs=("input",), attributes={"out": "4", "bias": bias}),
        Node(name="norm", op="host_norm", inputs=("A",)),
        Node(name="s", op="activation", inputs=("norm",)),
        Node(name="B", op="linear", inputs=("s",), attributes={"out": "out_width", "bias": "sink"}),
    )
    return BlueprintIR(name="x", nodes=nodes, output="B", layouts=(Layout.FEATURES,))


@pytest.mark.parametrize("source_bias_free", [True, False])
@pytest.mark.parametrize("bias", ["yes", "no", "source"])
def test_a_norm_absorbs_a_bias_that_the_host_has_no_place_for(
    features: SlotInterface, bias: str, *, source_bias_free: bool
) -> None:
    slot = features.model_copy(update={"norm": BatchNorm(), "source_bias_free": source_bias_free})
    assert_exact(slot, over_a_norm(bias), {}, 0.7)


def test_a_bias_without_place_or_another_norm_is_no_widening(features: SlotInterface) -> None:
    ir = over_a_norm("yes")
    assert foldable(ir, features)
    assert not foldable(ir, features.model_copy(update={"source_bias_free": True}))
    with_bias = ir.model_copy(
        update={"nodes": (*ir.nodes[:-1], ir.nodes[-1].model_copy(update={"attributes": {"out": "out_width"}}))}
    )
    assert foldable(with_bias, features)
    assert not foldable(with_bias, features.model_copy(update={"sink_bias_free": True}))
    # Built for another norm than the host has now, or for none.
    normed = features.model_copy(update={"norm": BatchNorm()})
    for mine, hosts in (
        (normed, features),
        (features, normed),
        (normed, normed.model_copy(update={"norm": BatchNorm(eps=0.1)})),
    ):
        assert fold_terms(build(ir, mine), mine) is not None
        assert fold_terms(build(ir, mine), hosts) is None
    bare = ir.model_copy(
        update={"nodes": (ir.nodes[0], ir.nodes[2].model_copy(update={"inputs": ("A",)}), ir.nodes[3])}
    )
    assert foldable(bare, features)
    assert not foldable(bare, normed)


def test_plain_copies_say_where_they_came_from(interface: SlotInterface) -> None:
    for name, ir, symbols in candidates(interface, widths=(4,)):
        kernel = trained(build(ir, interface, symbols))
        fold = fold_terms(kernel, interface)
        if fold is None:
            continue
        parameters = dict(kernel.named_parameters())
        for field, origin in fold.origins.items():
            place, _, leaf = field.partition(".")
            appended = getattr(fold, place)[leaf] if leaf else getattr(fold, place)
            assert torch.equal(origin.place(parameters[origin.parameter].detach()), appended), name
        copies = {"A.weight": "source_weight", "A.bias": "source_bias", "B.weight": "sink_weight"}
        copies |= {f"norm.{leaf}": f"norm.{leaf}" for leaf in ("weight", "bias")}
        direct = units(ir, interface, symbols) == 4
        expected = {field for parameter, field in copies.items() if direct and parameter in parameters}
        if name not in ("low_rank", "linear_bypass"):
            assert set(fold.origins) == expected, name
        assert "sink_bias" not in fold.origins
        half = fold_terms(kernel, interface, alpha=0.5)
        assert half is not None
        assert set(half.origins) == set(fold.origins) - {"sink_weight"}  # a scaled copy is no plain one


def test_gradients_of_plain_copies_agree_so_their_moments_may_move(features: SlotInterface) -> None:
    ir = catalogue()["bottleneck_mlp"]
    host, kernel = Pair(features), trained(build(ir, features))
    fold = fold_terms(kernel, features)
    assert fold is not None
    wide, x = host.widened(fold), example_input(features, 5, 1).double()
    (host(x) + kernel(x)).pow(2).sum().backward()
    wide(x).pow(2).sum().backward()
    grads = {name: p.grad for name, p in kernel.named_parameters()}
    assert torch.allclose(wide.source.weight.grad[-8:], grads["A.weight"])
    assert torch.allclose(wide.source.bias.grad[-8:], grads["A.bias"])
    assert torch.allclose(wide.sink.weight.grad[:, -8:], grads["B.weight"])


def test_gradients_at_the_norm_agree_too(features: SlotInterface) -> None:
    slot = features.model_copy(update={"norm": BatchNorm(), "source_bias_free": True, "sink_bias_free": True})
    host, kernel = Pair(slot), trained(build(catalogue()["bottleneck_mlp"], slot))
    fold = fold_terms(kernel, slot)
    assert fold is not None
    assert {name: origin.parameter for name, origin in fold.origins.items()} == {
        "source_weight": "A.weight",
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
        "sink_weight": "B.weight",
    }
    wide, x = host.widened(fold), example_input(slot, 5, 1).double()
    (host(x) + kernel(x)).pow(2).sum().backward()
    wide(x).pow(2).sum().backward()
    grads = {name: p.grad for name, p in kernel.named_parameters()}
    assert torch.allclose(wide.source.weight.grad[-8:], grads["A.weight"])
    assert torch.allclose(wide.norm.weight.grad[-8:], grads["norm.weight"])
    assert torch.allclose(wide.norm.bias.grad[-8:], grads["norm.bias"])
    assert torch.allclose(wide.sink.weight.grad[:, -8:], grads["B.weight"])
