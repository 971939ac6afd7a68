"""Cost analysis: figures from the formulas, fit, silence, and bombs that cost nothing to refuse."""

import time
import tracemalloc
from typing import Any

import pytest

from esper_core.blueprint.analyse import Limits, analyse
from esper_core.blueprint.catalogue import candidates, catalogue
from esper_core.blueprint.interface import BatchNorm, Layout, SlotInterface
from esper_core.blueprint.ir import BlueprintIR, Node
from esper_core.errors import InvalidInput

TOKENS = SlotInterface(layout=Layout.TOKENS, in_width=6, out_width=4, hidden_width=2, in_size=(5,), out_size=(5,))
IMAGE = SlotInterface(
    layout=Layout.IMAGE, in_width=4, out_width=6, hidden_width=3, in_size=(8, 8), out_size=(4, 4), activation="relu"
)


def blueprint(*nodes: Node, **fields: Any) -> BlueprintIR:
    return BlueprintIR(name="x", nodes=nodes, output=nodes[-1].name, layouts=tuple(Layout), **fields)


def node(name: str, op: str, *inputs: str, **attributes: str) -> Node:
    return Node(name=name, op=op, inputs=inputs, attributes=attributes)


def test_figures_of_a_bottleneck(features: SlotInterface) -> None:
    found = analyse(catalogue()["bottleneck_mlp"], features, {"width": 5})
    assert found.parameters == 12 * 5 + 5 + 5 * 10 + 10
    assert found.flops == 2 * 12 * 5 + 5 + 2 * 5 * 10
    assert found.activation_elements == 5 + 5 + 10
    assert found.shapes == {"input": (12,), "A": (5,), "norm": (5,), "s": (5,), "B": (10,)}
    assert found.silenced == {"B"}


def test_figures_over_a_norm_and_a_sink_without_bias(features: SlotInterface) -> None:
    slot = features.model_copy(update={"norm": BatchNorm(), "source_bias_free": True, "sink_bias_free": True})
    found = analyse(catalogue()["bottleneck_mlp"], slot, {"width": 5})
    assert found.parameters == 12 * 5 + 2 * 5 + 5 * 10  # a row, the norm's factor and offset, a column
    assert found.flops == 2 * 12 * 5 + 4 * 5 + 5 + 2 * 5 * 10
    assert found.activation_elements == 5 + 5 + 5 + 10
    bare = slot.model_copy(update={"norm": BatchNorm(affine=False)})
    assert analyse(catalogue()["bottleneck_mlp"], bare, {"width": 5}).parameters == found.parameters - 2 * 5


@pytest.mark.parametrize("norm", [None, BatchNorm()])
@pytest.mark.parametrize("free", [False, True])
def test_a_kernel_over_a_span_that_cannot_be_folded_keeps_its_way_outs_bias(
    features: SlotInterface, norm: BatchNorm | None, *, free: bool
) -> None:
    changes = {"norm": norm, "source_bias_free": free, "sink_bias_free": free, "foldable": False}
    found = analyse(catalogue()["bottleneck_mlp"], features.model_copy(update=changes), {"width": 5})
    biases = {step.node.name: step.call.bias for step in found.steps if step.node.op == "linear"}
    assert biases == {"A": norm is None, "B": True}


def test_figures_of_a_strided_grouped_convolution() -> None:
    conv = node("C", "conv", "input", out="out_width", kernel="3", stride="2", padding="1", groups="2")
    found = analyse(blueprint(conv), IMAGE)
    weights = 6 * (4 // 2) * 9
    assert (found.parameters, found.flops, found.shapes["C"]) == (weights + 6, 2 * weights * 16, (6, 4, 4))


def test_figures_of_attention() -> None:
    found = analyse(blueprint(node("M", "attention", "input", width="8", heads="2", out="4")), TOKENS)
    assert found.parameters == (6 * 24 + 24) + (8 * 4 + 4)
    assert found.flops == 2 * 5 * (6 * 24 + 8 * 4) + 2 * 2 * 5 * 5 * 8
    assert found.activation_elements == 5 * 4 + 2 * 5 * 5 + 3 * 5 * 8


@pytest.mark.parametrize(
    ("ir", "what"),
    [
        (blueprint(node("A", "linear", "input", out="9")), "the slot needs"),
        (blueprint(node("A", "conv", "input", out="out_width")), "cannot take shape"),
        (blueprint(node("A", "linear", "input", out="width - 8"), symbols={"width": 8}), "is 0"),
        (blueprint(node("A", "linear", "input", out="out_width"), node("r", "activation", "A", kind="relu")), "no-op"),
        (
            blueprint(node("A", "linear", "input", out="out_width"), node("r", "activation", "A", kind="sigmoid")),
            "no-op",
        ),
        (
            blueprint(node("A", "linear", "input", out="out_width"), node("q", "multiply", "A", "A")),
            "no-op",  # a square has no slope at zero
        ),
        (
            blueprint(
                node("A", "linear", "input", out="out_width"),
                node("B", "linear", "A", out="3"),
                node("q", "add", "A", "B"),
            ),
            "do not combine",
        ),
        (blueprint(node("A", "linear", "input", out="out_width"), node("m", "match_output_size", "A")), "cannot take"),
        (catalogue()["conv_bypass_3x3"], "does not serve FEATURES"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_hint(ir: BlueprintIR, what: str, features: SlotInterface) -> None:
    with pytest.raises(InvalidInput, match=what) as caught:
        analyse(ir, features)
    assert caught.value.hint


def test_a_host_activation_must_be_known_or_replaced() -> None:
    unknown = SlotInterface(layout=Layout.FEATURES, in_width=4, out_width=4, hidden_width=2)
    a, b = node("A", "linear", "input", out="4"), node("B", "linear", "s", out="4")
    with pytest.raises(InvalidInput, match="activation is unknown"):
        analyse(blueprint(a, node("s", "activation", "A"), b), unknown)
    found = analyse(blueprint(a, node("s", "activation", "A", otherwise="tanh"), b), unknown)
    assert found.steps[1].call.words["kind"] == "tanh"


def test_silence_of_sums_and_products(features: SlotInterface) -> None:
    a, b = (node(name, "linear", "input", out="out_width") for name in "AB")
    gate = node("g", "activation", "B", kind="sigmoid")
    assert analyse(blueprint(a, b, node("q", "add", "A", "B")), features).silenced == {"A", "B"}
    assert analyse(blueprint(a, b, node("q", "multiply", "A", "B")), features).silenced == {"A"}
    assert analyse(blueprint(a, b, gate, node("q", "multiply", "g", "A")), features).silenced == {"A"}


HUGE = SlotInterface(layout=Layout.FEATURES, in_width=1 << 20, out_width=1 << 20, hidden_width=1)
BOMBS = [
    (blueprint(node("A", "linear", "input", out="out_width")), HUGE),
    (blueprint(node("A", "linear", "input", out="1000000000"), node("B", "linear", "A", out="out_width")), HUGE),
    (
        blueprint(
            *(node(f"n{i}", "linear", f"n{i - 1}" if i else "input", out="1000000") for i in range(200)),
            node("B", "linear", "n199", out="out_width"),
        ),
        HUGE,
    ),
    (
        blueprint(node("A", "attention", "input", width="8", out="4")),
        TOKENS.model_copy(update={"in_size": (65536,), "out_size": (65536,)}),
    ),
    (
        blueprint(
            node("A", "conv", "input", out="64", padding="1000"), node("B", "conv", "A", out="out_width", kernel="1001")
        ),
        IMAGE.model_copy(update={"in_size": (60000, 60000), "out_size": (61000, 61000)}),
    ),
    (blueprint(node("A", "conv", "input", out="out_width", kernel="1048576")), IMAGE),
]


@pytest.mark.parametrize(("ir", "interface"), BOMBS)
def test_bombs_are_refused_without_time_or_memory(ir: BlueprintIR, interface: SlotInterface) -> None:
    tracemalloc.start()
    start = time.monotonic()
    with pytest.raises(InvalidInput) as caught:
        analyse(ir, interface)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert caught.value.hint
    assert time.monotonic() - start < 0.5
    assert peak < 1 << 20


def test_limits_are_configuration(features: SlotInterface) -> None:
    with pytest.raises(InvalidInput, match="exceeds 100 parameters"):
        analyse(catalogue()["bottleneck_mlp"], features, {"width": 32}, Limits(parameters=100))


def test_every_slot_has_candidates_and_each_fits(interface: SlotInterface) -> None:
    found = candidates(interface)
    assert {name for name, _, _ in found} >= (
        {"conv_bypass_1x1", "depthwise_separable", "squeeze_excite"}
        if interface.layout is Layout.IMAGE
        else {"bottleneck_mlp", "low_rank", "linear_bypass"}
    )
    for name, ir, symbols in found:
        assert ir is catalogue()[name]
        assert analyse(ir, interface, symbols).shapes[ir.output] == interface.out_shape
    assert ("attention_block" in {name for name, _, _ in found}) == (interface.layout is Layout.TOKENS)
