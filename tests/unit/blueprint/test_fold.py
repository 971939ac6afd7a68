"""Folding: host(x) + alpha·kernel(x) equals the widened host, to rounding, wherever the algebra says so."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_core.blueprint.activation import MIRROR, NAMES
from esper_core.blueprint.build import build, example_input
from esper_core.blueprint.catalogue import candidates, catalogue
from esper_core.blueprint.fold import fold_terms, foldable, units
from esper_core.blueprint.interface import BatchNorm, ConvGeometry, Layout, SlotInterface
from esper_core.blueprint.ir import BlueprintIR, Node
from tests.unit.blueprint.pairs import NORMS, Pair, assert_exact, centred, trained

ROWS = ("bottleneck_mlp", "low_rank", "linear_bypass")


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(ROWS),
    layout=st.sampled_from((Layout.FEATURES, Layout.TOKENS)),
    activation=st.sampled_from(NAMES),
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
    if name != "bottleneck_mlp" and (activation not in {*MIRROR, "identity"} or slot.norm):
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


@pytest.mark.parametrize(
    ("source", "sink"),
    [
        (centred(3), centred(3)),
        (centred(3, stride=2), centred(5)),
        (centred(5, dilation=2), centred(1, stride=2)),
        (centred(1), centred(3, dilation=3)),
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
        (centred(3, stride=2), centred(3), ("1", "2")),  # the right size, but other pixels
        (centred(3).model_copy(update={"padding_h": 0}), centred(3).model_copy(update={"padding_h": 2}), ("1", "1")),
        (centred(3).model_copy(update={"padding_w": 2}), centred(3).model_copy(update={"padding_w": 0}), ("1", "1")),
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
    source = centred(3, stride=3, dilation=2)
    slot = SlotInterface(
        layout=Layout.IMAGE, in_width=3, out_width=2, hidden_width=4, in_size=(13, 13),
        out_size=source.leaving((13, 13)), activation="relu", source=source, sink=centred(1), foldable=True,
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
    window = centred(3).model_copy(update={"groups": 2})
    slot = SlotInterface(
        layout=Layout.IMAGE, in_width=4, out_width=4, hidden_width=4, in_size=(6, 6), out_size=(6, 6),
        activation="relu", source=window, sink=centred(3), foldable=True,
    )  # fmt: skip
    assert not foldable(catalogue()["conv_bypass_3x3"], slot)


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
