"""Built kernels: silent, able to learn, deterministic, and as large as the analysis said."""

import itertools

import pytest
import torch
from torch import nn

from esper_core.blueprint import activation as activations
from esper_core.blueprint.analyse import analyse
from esper_core.blueprint.build import ACTIVATIONS, MAKERS, build, example_input, skeleton
from esper_core.blueprint.catalogue import candidates, catalogue
from esper_core.blueprint.interface import BatchNorm, Layout, SlotInterface
from esper_core.blueprint.ir import BlueprintIR, Node
from esper_core.blueprint.ops import REGISTRY
from esper_core.errors import InvalidInput


def leaving(kernel: nn.Module, silenced: frozenset[str]) -> list[nn.Parameter]:
    """Parameters that start at zero so that the kernel is silent."""
    return [p for name, p in kernel.named_parameters() if name.split(".")[0] in silenced and ".qkv." not in name]


def test_candidates_are_silent_can_learn_and_cost_what_was_said(interface: SlotInterface) -> None:
    for name, ir, symbols in candidates(interface, widths=(4, 8)):
        kernel = build(ir, interface, symbols, seed=1)
        x = example_input(interface, batch=6, seed=2)
        y = kernel(x)
        sample = (x.shape[1], *interface.out_shape[1:]) if interface.layout is Layout.TOKENS else interface.out_shape
        assert y.shape == (6, *sample), name
        assert torch.count_nonzero(y) == 0, name
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
        last = leaving(kernel, kernel.analysis.silenced)
        assert last, name
        assert all(p.grad is not None and torch.count_nonzero(p.grad) for p in last), name
        assert sum(p.numel() for p in kernel.parameters()) == analyse(ir, interface, symbols).parameters, name
        normed = interface.norm is not None and any(node.op == "host_norm" for node in ir.nodes)
        assert bool(list(kernel.buffers())) == normed, name
        assert torch.count_nonzero(kernel.eval()(x)) == 0, name


def test_the_whole_kernel_learns_once_it_has_left_zero(interface: SlotInterface) -> None:
    for name, ir, symbols in candidates(interface, widths=(8,)):
        kernel = build(ir, interface, symbols, seed=1)
        with torch.no_grad():
            for p in leaving(kernel, kernel.analysis.silenced):
                p.uniform_(-1, 1, generator=torch.Generator().manual_seed(5))
        kernel(example_input(interface, batch=6, seed=2)).square().sum().backward()
        # A bias before attention's softmax over keys cancels out, so tensors are judged whole.
        assert all(p.grad is not None and torch.count_nonzero(p.grad) for p in kernel.parameters()), name


def test_weights_depend_on_the_seed_alone_and_leave_the_global_state(features: SlotInterface) -> None:
    ir = catalogue()["bottleneck_mlp"]
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = build(ir, features, seed=2**64 - 1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    again, other = build(ir, features, seed=2**64 - 1), build(ir, features, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.state_dict()["A.weight"], other.state_dict()["A.weight"])


def test_a_norm_is_born_with_statistics_of_its_own(features: SlotInterface) -> None:
    norm = BatchNorm(eps=0.01, momentum=0.25)
    kernel = build(catalogue()["bottleneck_mlp"], features.model_copy(update={"norm": norm}), {"width": 3})
    state = {name: value.tolist() for name, value in kernel.state_dict().items() if name.startswith("norm.")}
    assert state == {
        "norm.weight": [1, 1, 1],
        "norm.bias": [0, 0, 0],
        "norm.running_mean": [0, 0, 0],
        "norm.running_var": [1, 1, 1],
        "norm.num_batches_tracked": 0,
    }
    x = example_input(features, batch=6, seed=2)
    kernel(x)
    wanted = 0.25 * torch.nn.functional.linear(x, kernel.state_dict()["A.weight"]).mean(0)
    torch.testing.assert_close(kernel.state_dict()["norm.running_mean"], wanted)


def test_a_skeleton_has_names_and_shapes_but_no_memory(features: SlotInterface) -> None:
    bones = skeleton(catalogue()["bottleneck_mlp"], features, {"width": 5})
    assert {name: tuple(p.shape) for name, p in bones.named_parameters()} == {
        "A.weight": (5, 12),
        "A.bias": (5,),
        "B.weight": (10, 5),
        "B.bias": (10,),
    }
    assert all(p.is_meta for p in bones.parameters())


def test_channels_last_inputs_give_the_same_values() -> None:
    slot = SlotInterface(
        layout=3, in_width=4, out_width=4, hidden_width=2, in_size=(6, 6), out_size=(6, 6), activation="relu"
    )
    for _, ir, symbols in candidates(slot, widths=(4,)):
        kernel = build(ir, slot, symbols, seed=1)
        nn.init.normal_(leaving(kernel, kernel.analysis.silenced)[0])
        x = example_input(slot, batch=2, seed=1)
        y = kernel(x.to(memory_format=torch.channels_last))
        assert torch.equal(y, kernel(x))
        assert torch.count_nonzero(y)


def test_attention_looks_only_back_in_the_catalogue() -> None:
    slot = SlotInterface(layout=2, in_width=6, out_width=6, hidden_width=3)
    kernel = build(catalogue()["attention_block"], slot, {"width": 16}, seed=1)
    nn.init.normal_(kernel.state_dict(keep_vars=True)["mix.out.weight"])
    x = example_input(slot, batch=2, seed=1, tokens=7)
    later = x.clone()
    later[:, 4:] *= -1.0
    y, changed = kernel(x), kernel(later)
    assert torch.allclose(y[:, :4], changed[:, :4], atol=1e-6)
    assert not torch.allclose(y[:, 4:], changed[:, 4:], atol=1e-2)


def test_node_names_cannot_shadow_the_module(features: SlotInterface) -> None:
    names = ["forward", "train", "parameters", "ir", "T_destination"]
    chain = [
        Node(name=name, op="linear", inputs=(before,), attributes={"out": "out_width"})
        for before, name in itertools.pairwise(["input", *names])
    ]
    ir = BlueprintIR(name="x", nodes=tuple(chain), output=names[-1], layouts=(Layout.FEATURES,))
    kernel = build(ir, features).eval()
    assert kernel(example_input(features, 2, 0)).shape == (2, 10)
    assert {name.split(".")[0] for name, _ in kernel.named_parameters()} == set(names)


def test_what_does_not_fit_is_not_built(features: SlotInterface) -> None:
    with pytest.raises(InvalidInput):
        build(catalogue()["conv_bypass_1x1"], features)


def test_every_op_and_activation_can_be_made() -> None:
    assert set(MAKERS) == set(REGISTRY)
    assert set(ACTIVATIONS) == set(activations.NAMES)


@pytest.mark.parametrize("kind", activations.NAMES)
def test_the_facts_about_activations_are_true(kind: str) -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    s = ACTIVATIONS[kind]
    odd = s(x) - s(-x)
    if kind in activations.MIRROR:
        assert torch.allclose(odd, activations.MIRROR[kind] * x, atol=1e-12)
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(s(zero).sum(), zero)
    assert (kind in activations.OPEN_AT_ZERO) == (s(zero).item() == 0.0 and slope.item() >= 0.5)
