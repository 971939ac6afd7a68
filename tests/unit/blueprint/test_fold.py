"""Folding: host(x) + alpha·kernel(x) equals the widened host, to rounding, wherever the algebra says so."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from esper_core.blueprint.build import ACTIVATIONS, KernelModule, build, example_input
from esper_core.blueprint.catalogue import candidates, catalogue
from esper_core.blueprint.fold import Fold, fold_terms, foldable, units
from esper_core.blueprint.interface import BatchNorm, ConvGeometry, Layout, SlotInterface
from esper_core.blueprint.ir import BlueprintIR, Node


class Pair(nn.Module):
    """source → norm → activation → sink, in float64."""

    def __init__(self, interface: SlotInterface) -> None:
        super().__init__()
        i, self.activation = interface, interface.activation
        self.source = _layer(i.in_width, i.hidden_width, i.source, bias=not i.source_bias_free)
        self.norm = _norm(i)
        self.sink = _layer(i.hidden_width, i.out_width, i.sink, bias=not i.sink_bias_free)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.sink(ACTIVATIONS[self.activation](self.norm(self.source(x))))

    def widened(self, fold: Fold) -> "Pair":
        wide = copy.deepcopy(self)
        for layer, name, extra, dim in (
            (wide.source, "weight", fold.source_weight, 0),
            (wide.source, "bias", fold.source_bias, 0),
            (wide.sink, "weight", fold.sink_weight, 1),
        ):
            if getattr(layer, name) is None:
                assert not extra.any()  # it would be lost
            else:
                setattr(layer, name, nn.Parameter(torch.cat([getattr(layer, name).detach(), extra], dim)))
        if self.sink.bias is None:
            assert not fold.sink_bias.any()
        else:
            wide.sink.bias = nn.Parameter(self.sink.bias.detach() + fold.sink_bias)
        assert set(fold.norm) == {name for name, value in self.norm.state_dict().items() if value.ndim}
        for name, extra in fold.norm.items():
            longer = torch.cat([getattr(self.norm, name).detach(), extra])
            setattr(wide.norm, name, nn.Parameter(longer) if name in ("weight", "bias") else longer)
        return wide


def _layer(width: int, out: int, geometry: ConvGeometry | None, *, bias: bool) -> nn.Linear | nn.Conv2d:
    if geometry is None:
        return nn.Linear(width, out, bias=bias)
    g = geometry
    return nn.Conv2d(width, out, g.kernel, stride=g.stride, padding=g.padding, dilation=g.dilation, bias=bias)


def _norm(interface: SlotInterface) -> nn.Module:
    if interface.norm is None:
        return nn.Identity()
    make = nn.BatchNorm2d if interface.layout is Layout.IMAGE else nn.BatchNorm1d
    return lived(make(interface.hidden_width, **interface.norm.model_dump()))


def lived(norm: nn.Module) -> nn.Module:
    """Running statistics and affine parameters as after some training."""
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, value in norm.state_dict().items():
            if value.ndim:
                value.uniform_(0.5 if name in ("weight", "running_var") else -0.5, 1.5, generator=generator)
    return norm


def trained(kernel: KernelModule) -> KernelModule:
    """Stand-in for training: every weight is some number, the biases and the running statistics too."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in kernel.parameters():
            parameter.normal_(generator=generator)
        for name, buffer in kernel.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2, generator=generator)
    return kernel.double()


def assert_exact(interface: SlotInterface, ir: BlueprintIR, symbols: dict[str, int], alpha: float) -> None:
    host, kernel = Pair(interface), trained(build(ir, interface, symbols))
    fold = fold_terms(kernel, interface, alpha)
    assert fold is not None
    assert fold.units == units(ir, interface, symbols) == len(fold.source_weight) == fold.sink_weight.shape[1]
    x = example_input(interface, batch=5, seed=4).double()
    wide = host.widened(fold)
    for training in (False, True):  # in this order: running statistics move in training
        for module in (host, kernel, wide):
            module.train(training)
        with torch.no_grad():
            wanted = (bare := host(x)) + alpha * kernel(x)
            error = (wide(x) - wanted).abs().max()
            moved = (wanted - bare).abs().max()
        assert error <= 1e-10 * max(1.0, wanted.abs().max().item())
        assert moved > 1e-3  # otherwise nothing was proven
    for name in ("running_mean", "running_var"):
        if name in fold.norm:  # what the wide norm has learnt is what the two have
            norm = next(child for child in kernel.children() if isinstance(child, nn.modules.batchnorm._BatchNorm))
            learnt = getattr(norm, name) - (0 if name == "running_var" else absorbed(kernel, interface))
            torch.testing.assert_close(getattr(wide.norm, name), torch.cat([getattr(host.norm, name), learnt]))


def absorbed(kernel: KernelModule, interface: SlotInterface) -> Tensor | int:
    """The kernel's first bias where the host's source has none."""
    return dict(kernel.named_parameters()).get("A.bias", torch.zeros(1)).detach() if interface.source_bias_free else 0


NORMS = st.builds(
    BatchNorm,
    eps=st.sampled_from((1e-5, 1e-3, 0.1)),
    momentum=st.sampled_from((0.0, 0.1, 1.0)),
    affine=st.booleans(),
    track_running_stats=st.booleans(),
)
ROWS = ("bottleneck_mlp", "low_rank", "linear_bypass")


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(ROWS),
    layout=st.sampled_from((Layout.FEATURES, Layout.TOKENS)),
    activation=st.sampled_from(("relu", "gelu", "gelu_tanh", "silu", "leaky_relu", "identity", "tanh", "sigmoid")),
    sizes=st.tuples(*[st.integers(1, 9)] * 4),
    alpha=st.floats(0.1, 2.0),
    norm=st.none() | NORMS,
    bias_free=st.tuples(st.booleans(), st.booleans()),
)
def test_linear_spans(
    name: str,
    layout: Layout,
    activation: str,
    sizes: tuple[int, ...],
    alpha: float,
    norm: BatchNorm | None,
    bias_free: tuple[bool, bool],
) -> None:
    enters, leaves, hidden, width = sizes
    slot = SlotInterface(
        layout=layout, in_width=enters, out_width=leaves, hidden_width=hidden, activation=activation, foldable=True,
        norm=norm if layout is Layout.FEATURES else None, source_bias_free=bias_free[0], sink_bias_free=bias_free[1],
    )  # fmt: skip
    ir = catalogue()[name]
    symbols = {"width": width} if "width" in ir.symbols else {}
    if name != "bottleneck_mlp" and (activation in ("tanh", "sigmoid") or slot.norm):
        assert not foldable(ir, slot, symbols)  # s(x) - s(-x) is no multiple of x; no norm leaves a map linear
        return
    assert_exact(slot, ir, symbols, alpha)


def geometries(strides: st.SearchStrategy[int]) -> st.SearchStrategy[ConvGeometry]:
    axis = st.tuples(st.integers(1, 4), strides, st.integers(0, 2), st.integers(1, 2))
    return st.builds(
        lambda a, b: ConvGeometry(
            kernel_h=a[0], kernel_w=b[0], stride_h=a[1], stride_w=b[1], padding_h=a[2], padding_w=b[2],
            dilation_h=a[3], dilation_w=b[3],
        ),
        axis,
        axis,
    )  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(
    source=geometries(st.integers(1, 3)),
    sink=geometries(st.integers(1, 2)),
    activation=st.sampled_from(("relu", "gelu", "silu", "tanh", "identity")),
    alpha=st.floats(0.1, 2.0),
    norm=st.none() | NORMS,
    bias_free=st.tuples(st.booleans(), st.booleans()),
)
def test_convolutional_spans(
    source: ConvGeometry,
    sink: ConvGeometry,
    activation: str,
    alpha: float,
    norm: BatchNorm | None,
    bias_free: tuple[bool, bool],
) -> None:
    middle = source.leaving((13, 12))
    size = sink.leaving(middle)
    if min(*middle, *size) < 1:
        return
    slot = SlotInterface(
        layout=Layout.IMAGE, in_width=3, out_width=2, hidden_width=4, in_size=(13, 12), out_size=size,
        activation=activation, source=source, sink=sink, foldable=True, norm=norm,
        source_bias_free=bias_free[0], sink_bias_free=bias_free[1],
    )  # fmt: skip
    assert_exact(slot, catalogue()["conv_bypass_3x3"], {"width": 3}, alpha)
    centred = all(
        geometry.kernel[axis] % 2 and geometry.padding[axis] == geometry.dilation[axis] * (geometry.kernel[axis] // 2)
        for geometry in (source, sink)
        for axis in (0, 1)
    )
    pointwise = catalogue()["conv_bypass_1x1"]
    assert foldable(pointwise, slot) == centred
    if centred:
        assert_exact(slot, pointwise, {"width": 3}, alpha)


def _centred(kernel: int, stride: int = 1, dilation: int = 1) -> ConvGeometry:
    pad = dilation * (kernel // 2)
    return ConvGeometry(
        kernel_h=kernel, kernel_w=kernel, stride_h=stride, stride_w=stride, padding_h=pad, padding_w=pad,
        dilation_h=dilation, dilation_w=dilation,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("source", "sink"),
    [
        (_centred(3), _centred(3)),
        (_centred(3, stride=2), _centred(5)),
        (_centred(5, dilation=2), _centred(1, stride=2)),
        (_centred(1), _centred(3, dilation=3)),
    ],
)
@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_pointwise_kernels_sit_in_the_middle_of_the_hosts_windows(
    source: ConvGeometry, sink: ConvGeometry, activation: str
) -> None:
    slot = SlotInterface(
        layout=Layout.IMAGE, in_width=3, out_width=2, hidden_width=4, in_size=(13, 12),
        out_size=sink.leaving(source.leaving((13, 12))), activation=activation, source=source, sink=sink, foldable=True,
    )  # fmt: skip
    assert_exact(slot, catalogue()["conv_bypass_1x1"], {"width": 3}, 0.7)


def test_single_precision_is_within_the_promise(interface: SlotInterface) -> None:
    for _, ir, symbols in candidates(interface, widths=(8,)):
        host, kernel = Pair(interface).float() if interface.foldable else None, build(ir, interface, symbols)
        with torch.no_grad():
            for parameter in kernel.parameters():
                parameter.uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(6))
        fold = fold_terms(kernel, interface)
        assert (fold is not None) == foldable(ir, interface, symbols)
        if fold is None or host is None:
            continue
        x = example_input(interface, batch=4, seed=4)
        with torch.no_grad():
            assert (host.widened(fold)(x) - host(x) - kernel(x)).abs().max() <= 1e-5


def test_what_is_no_widening_is_left_alone(features: SlotInterface) -> None:
    other = features.model_copy(update={"activation": "gelu"})
    tanh = BlueprintIR(
        name="x",
        nodes=(
            Node(name="A", op="linear", inputs=("input",), attributes={"out": "4"}),
            Node(name="s", op="activation", inputs=("A",), attributes={"kind": "tanh"}),
            Node(name="B", op="linear", inputs=("s",), attributes={"out": "out_width"}),
        ),
        output="B",
        layouts=(Layout.FEATURES,),
    )
    assert not foldable(tanh, features)
    assert not foldable(catalogue()["bottleneck_mlp"], features.model_copy(update={"foldable": False}))
    assert not foldable(catalogue()["conv_bypass_1x1"], features)
    # Built for relu: in a host that has since become another, the algebra no longer holds.
    assert fold_terms(build(catalogue()["bottleneck_mlp"], features), other) is None


@pytest.mark.parametrize(
    ("source", "sink", "strides"),
    [
        (_centred(3, stride=2), _centred(3), ("1", "2")),  # the right size, but other pixels
        (_centred(3).model_copy(update={"padding_h": 0}), _centred(3).model_copy(update={"padding_h": 2}), ("1", "1")),
        (_centred(3).model_copy(update={"padding_w": 2}), _centred(3).model_copy(update={"padding_w": 0}), ("1", "1")),
    ],
)
def test_windows_that_do_not_line_up_are_no_widening(
    source: ConvGeometry, sink: ConvGeometry, strides: tuple[str, str]
) -> None:
    slot = SlotInterface(
        layout=Layout.IMAGE, in_width=3, out_width=2, hidden_width=4, in_size=(12, 12),
        out_size=sink.leaving(source.leaving((12, 12))), activation="relu", source=source, sink=sink, foldable=True,
    )  # fmt: skip
    ir = BlueprintIR(
        name="x",
        nodes=(
            Node(name="A", op="conv", inputs=("input",), attributes={"out": "4", "stride": strides[0]}),
            Node(name="s", op="activation", inputs=("A",), attributes={"kind": "relu"}),
            Node(name="B", op="conv", inputs=("s",), attributes={"out": "out_width", "stride": strides[1]}),
        ),
        output="B",
        layouts=(Layout.IMAGE,),
    )
    assert build(ir, slot)(example_input(slot, 2, 0)).shape == (2, *slot.out_shape)
    assert not foldable(ir, slot)


def test_another_dilation_is_no_widening() -> None:
    source = _centred(3, stride=3, dilation=2)
    slot = SlotInterface(
        layout=Layout.IMAGE, in_width=3, out_width=2, hidden_width=4, in_size=(13, 13),
        out_size=source.leaving((13, 13)), activation="relu", source=source, sink=_centred(1), foldable=True,
    )  # fmt: skip
    window = {"kernel": "3", "padding": "2", "stride": "3"}

    def pair(dilation: str) -> BlueprintIR:
        a = Node(name="A", op="conv", inputs=("input",), attributes={"out": "4", "dilation": dilation, **window})
        s = Node(name="s", op="activation", inputs=("A",), attributes={"kind": "relu"})
        b = Node(name="B", op="conv", inputs=("s",), attributes={"out": "out_width"})
        return BlueprintIR(name="x", nodes=(a, s, b), output="B", layouts=(Layout.IMAGE,))

    assert foldable(pair("2"), slot)
    assert units(pair("1"), slot) == 0
    assert build(pair("1"), slot)(example_input(slot, 2, 0)).shape == (2, *slot.out_shape)


def test_a_grouped_host_cannot_take_new_units() -> None:
    window = _centred(3).model_copy(update={"groups": 2})
    slot = SlotInterface(
        layout=Layout.IMAGE, in_width=4, out_width=4, hidden_width=4, in_size=(6, 6), out_size=(6, 6),
        activation="relu", source=window, sink=_centred(3), foldable=True,
    )  # fmt: skip
    assert not foldable(catalogue()["conv_bypass_3x3"], slot)


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


def test_folding_copies_and_needs_no_gradient(features: SlotInterface) -> None:
    kernel = trained(build(catalogue()["bottleneck_mlp"], features))
    fold = fold_terms(kernel, features)
    assert fold is not None
    before = fold.source_weight.clone()
    with torch.no_grad():
        for parameter in kernel.parameters():
            parameter.zero_()
    assert torch.equal(fold.source_weight, before)
    assert not fold.sink_weight.requires_grad
