"""Where a network can grow: spans and flow on many kinds of networks, and clear words where it cannot be told."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper_core.blueprint.interface import BatchNorm, Layout
from esper_core.errors import InvalidInput, Unsupported
from esper_core.nn.host import Host, wrap
from tests.unit.nn.hosts import ResNet, Transformer, convolutional, equal, perceptron


def spans(host: Host) -> list[str]:
    return list(host.slots)


def test_a_perceptron() -> None:
    host = wrap(perceptron(6, 8, 3, 5), torch.zeros(4, 6))
    assert spans(host) == ["0:2", "2:4"]
    assert host.graph.modules == ("0", "2", "4")
    assert host.graph.edges == ((0, 1), (1, 2))
    interface = host.slots["0:2"].interface
    assert (interface.layout, interface.in_width, interface.hidden_width, interface.out_width) == (
        Layout.FEATURES,
        6,
        8,
        3,
    )
    assert interface.activation == "relu"
    assert interface.foldable


def test_a_convolutional_network() -> None:
    host = wrap(convolutional(), torch.zeros(4, 2, 6, 6))
    assert spans(host) == ["0:2", "2:4"]
    interface = host.slots["0:2"].interface
    assert (interface.layout, interface.in_size, interface.out_size) == (Layout.IMAGE, (6, 6), (3, 3))
    assert interface.source is not None
    assert interface.sink is not None
    assert (interface.source.stride, interface.sink.stride, interface.sink.padding) == ((1, 1), (2, 2), (1, 1))
    assert host.graph.edges == ((0, 1), (1, 2), (2, 3))


def test_a_residual_network_is_spanned_inside_its_blocks_only() -> None:
    host = wrap(ResNet(), torch.zeros(4, 2, 6, 6))
    assert spans(host) == ["layer.0.conv1:layer.0.conv2", "layer.1.conv1:layer.1.conv2"]
    for slot in host.slots.values():
        assert slot.norm is host.model.get_submodule(slot.norm_path)
        interface = slot.interface
        assert (interface.norm, interface.activation, interface.foldable) == (BatchNorm(), "relu", True)
        assert (interface.source_bias_free, interface.sink_bias_free) == (True, False)
    names = host.graph.modules
    flows = {(names[a], names[b]) for a, b in host.graph.edges}
    assert ("stem", "layer.1.conv1") in flows  # past the block
    assert ("layer.1.conv2", "head") in flows


def test_a_transformer_is_spanned_in_its_feed_forward_part() -> None:
    host = wrap(Transformer(), torch.zeros(4, 5, 6))
    assert spans(host) == ["layer.linear1:layer.linear2"]
    interface = host.slots["layer.linear1:layer.linear2"].interface
    assert interface.layout is Layout.TOKENS
    assert interface.foldable


class Calls(nn.Module):
    """Three layers put together by a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, x: m.c(torch.relu(m.b(torch.relu(m.a(x))))), ["a:b", "b:c"]),
        (lambda m, x: m.c(m.b(m.a(x)).tanh()), ["a:b", "b:c"]),
        (lambda m, x: m.c(m.b(m.b(m.a(x)))), ["a:c"]),  # b is called twice and so no place itself
        (lambda m, x: m.c(m.b(h) + h) if (h := m.a(x)) is not None else x, []),  # h is listened to twice
        (lambda m, x: m.c(m.b(x) + m.a(x)), []),  # two streams meet
        (lambda m, x: m.c(m.b(x + 0)) + m.a(x), ["b:c"]),  # what leaves may meet others
        (lambda m, x: torch.relu(m.a(x)) + m.c(x), []),
        (lambda m, x: m.c(torch.cat([m.b(m.a(x))[:, :2], x[:, :2]], 1)), ["a:b"]),
    ],
)
def test_spans_follow_the_flow_however_it_is_written(function: Any, expected: list[str]) -> None:
    assert spans(wrap(Calls(function), torch.zeros(3, 4))) == expected


def test_shared_weights_have_no_single_place() -> None:
    model = Calls(lambda m, x: m.c(torch.relu(m.b(torch.relu(m.a(x))))))
    model.b.weight = model.a.weight
    assert spans(wrap(model, torch.zeros(3, 4))) == []


def test_a_module_under_two_names_has_no_single_place() -> None:
    layer = nn.Linear(4, 4)
    assert spans(wrap(nn.Sequential(layer, nn.ReLU(), layer), torch.zeros(3, 4))) == []


@pytest.mark.parametrize(
    ("activation", "name", "foldable"),
    [
        (nn.ReLU(), "relu", True),
        (nn.ReLU(inplace=True), "relu", True),
        (nn.GELU(), "gelu", True),
        (nn.GELU(approximate="tanh"), "gelu_tanh", True),
        (nn.SiLU(), "silu", True),
        (nn.Tanh(), "tanh", True),
        (nn.Sigmoid(), "sigmoid", True),
        (nn.LeakyReLU(), "leaky_relu", True),
        (nn.LeakyReLU(0.3), "", False),
        (nn.Identity(), "identity", True),
        (nn.Dropout(0.0), "identity", True),
        (nn.Dropout(0.5), "identity", True),
        (nn.Sequential(nn.ReLU(), nn.Dropout(0.5)), "relu", True),
        (nn.Sequential(nn.Dropout(0.5, inplace=True), nn.ReLU()), "relu", True),
        (nn.Sequential(nn.BatchNorm1d(5), nn.SiLU(), nn.Dropout(0.5)), "silu", True),
        (nn.Sequential(nn.SELU(), nn.AlphaDropout(0.5)), "", False),
        (nn.LayerNorm(5), "", False),
        (nn.ELU(), "elu", True),
        (nn.ELU(inplace=True), "elu", True),
        (nn.ELU(0.5), "", False),
        (nn.SELU(), "selu", True),
        (nn.Softplus(), "softplus", True),
        (nn.Softplus(2.0), "", False),
        (nn.ReLU6(), "relu6", True),
        (nn.Hardtanh(), "", False),
        (nn.Hardswish(), "hardswish", True),
        (nn.Mish(inplace=True), "mish", True),
        (nn.Hardshrink(), "", False),
        (nn.Sequential(nn.ReLU(), nn.Tanh()), "", False),
        (nn.Sequential(nn.BatchNorm1d(5), nn.SiLU()), "silu", True),
        (nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.5), nn.SiLU()), "silu", True),
        (nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(5), nn.SiLU()), "", False),
    ],
)
def test_what_stands_between_decides_whether_it_can_be_folded(activation: nn.Module, name: str, foldable: bool) -> None:
    host = wrap(nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, 3)), torch.zeros(3, 4))
    slot = host.slots["0:2"]
    assert (slot.interface.activation, slot.interface.foldable) == (name, foldable)
    assert bool(slot.obstacle) != foldable


class Twice(nn.Module):
    """Two spans that share a norm."""

    def __init__(self, second: nn.Module | None) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.norm = nn.BatchNorm1d(4)
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.norm(self.a(x)))
        return self.d((self.second or self.norm)(self.c(torch.relu(x))))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("norm", "why"),
    [
        (nn.LayerNorm(4), "mixes units"),
        (nn.GroupNorm(2, 4), "mixes units"),
        (nn.BatchNorm1d(4, momentum=None), "since its start"),
        (nn.BatchNorm1d(4, eps=2.0), "out of range"),
        (nn.BatchNorm1d(4, bias=False), "no offset"),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4)), "behind the activation"),
        (nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4)), "more than one"),
        (nn.Sequential(nn.Dropout(0.1), nn.BatchNorm1d(4)), "dropout stands before the norm"),
        (nn.Softmax(-1), "mixes units"),
        (nn.Hardshrink(), "hardshrink"),
    ],
)
def test_norms_that_cannot_be_widened_say_why(norm: nn.Module, why: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 3))
    model.train(getattr(norm, "momentum", 0.1) is not None)  # its average over all batches is not traced in training
    slot = wrap(model, torch.zeros(3, 4)).slots["0:2"]
    assert why in slot.obstacle
    assert (slot.norm, slot.interface.norm, slot.interface.foldable) == (None, None, False)


def test_a_shared_norm_has_no_single_place() -> None:
    for model in (Twice(None), Twice(tied := nn.BatchNorm1d(4))):
        if model.second is not None:
            tied.weight = model.norm.weight
        slots = wrap(model, torch.zeros(3, 4)).slots
        assert "more than one place" in slots["a:b"].obstacle
        assert "more than one place" in slots["c:d"].obstacle
    slots = wrap(Twice(nn.BatchNorm1d(4)), torch.zeros(3, 4)).slots
    assert not slots["a:b"].obstacle
    assert not slots["c:d"].obstacle


def test_a_norm_over_tokens_is_not_per_unit() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    slot = wrap(model, torch.zeros(3, 5, 4)).slots["0:2"]
    assert "not per unit" in slot.obstacle
    assert slot.interface.norm is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"eps": 0.1, "momentum": 0.3}])
def test_a_norm_is_described(training: bool, options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, **options), nn.Conv2d(3, 2, 1)).train(training)
    slot = wrap(model, torch.zeros(3, 2, 4, 4)).slots["0:2"]
    assert slot.interface.norm == BatchNorm(**options)
    assert slot.interface.activation == "identity"


@pytest.mark.parametrize("source", [True, False])
@pytest.mark.parametrize("sink", [True, False])
def test_whether_the_layers_have_biases(source: bool, sink: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 5, bias=source), nn.ReLU(), nn.Linear(5, 3, bias=sink))
    slot = wrap(model, torch.zeros(3, 4)).slots["0:2"]
    assert slot.interface.foldable
    assert (slot.interface.source_bias_free, slot.interface.sink_bias_free) == (not source, not sink)
    assert slot.unit_parameters == 4 + source + 3


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, ""),
        ({"padding": "same"}, ""),
        ({"padding": "valid"}, ""),
        ({"padding": "same", "kernel_size": 4}, "unequally"),
        ({"padding_mode": "reflect"}, "pads by reflect"),
        ({"groups": 2}, "2 groups"),
        ({"stride": 2, "dilation": 2}, ""),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_convolutions_that_can_be_widened(changes: dict[str, Any], why: str) -> None:
    options = {"kernel_size": 3, "padding": 1} | changes
    for layers in ([nn.Conv2d(4, 4, **options), nn.Conv2d(4, 2, 1)], [nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, **options)]):
        slot = wrap(nn.Sequential(layers[0], nn.ReLU(), layers[1]), torch.zeros(2, 4, 8, 8)).slots["0:2"]
        assert slot.interface.foldable == (not why)
        assert why in slot.obstacle
        assert slot.interface.in_size == (8, 8)


def test_tracing_changes_neither_model_nor_random_state() -> None:
    for model, inputs in ((ResNet(), torch.randn(4, 2, 6, 6)), (Transformer(), torch.randn(4, 5, 6))):
        list(model.children())[1].eval()
        torch.manual_seed(3)
        before = (copy.deepcopy(dict(model.state_dict())), torch.get_rng_state(), [m.training for m in model.modules()])
        host = wrap(model, inputs)
        after = (dict(model.state_dict()), torch.get_rng_state(), [m.training for m in model.modules()])
        assert equal(before, after)
        assert host.model is model
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
        assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "inputs", [torch.zeros(3, 5), torch.zeros(3, 4, dtype=torch.int64), (), (torch.zeros(3, 4),) * 2]
)
def test_an_example_that_does_not_fit_is_said_with_a_hint(inputs: Any) -> None:
    with pytest.raises(InvalidInput, match="example inputs do not fit Sequential") as caught:
        wrap(perceptron(4, 5, 3), inputs)
    assert "esper.wrap" in caught.value.hint


def test_a_forward_that_depends_on_data_is_unsupported() -> None:
    model = Calls(lambda m, x: m.a(x) if x.sum() > 0 else m.b(x))
    with pytest.raises(Unsupported, match="Calls cannot be traced") as caught:
        wrap(model, torch.ones(3, 4))
    assert caught.value.hint


def test_several_arguments() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)) * mask)

    host = wrap(Two(), (torch.zeros(3, 4), torch.ones(3, 4)))
    assert spans(host) == ["a:b"]
    assert not host.slots["a:b"].interface.foldable


def test_spans_can_be_chosen_by_name() -> None:
    model = perceptron(6, 8, 3, 5)
    host = wrap(model, torch.zeros(4, 6), spans=[("2", "4")])
    assert spans(host) == ["2:4"]
    with pytest.raises(InvalidInput) as caught:
        wrap(model, torch.zeros(4, 6), spans=[("2", "9")])
    assert caught.value.hint
    with pytest.raises(InvalidInput) as caught:
        wrap(model, torch.zeros(4, 6), spans=[("4", "0")])
    assert "0:2" in caught.value.hint


def test_whole_blocks_can_be_spanned() -> None:
    host = wrap(ResNet(), torch.zeros(4, 2, 6, 6), spans=[("layer.0", "layer.1")])
    slot = host.slots["layer.0:layer.1"]
    assert (slot.interface.in_shape, slot.interface.out_shape) == ((4, 6, 6), (4, 6, 6))
    assert not slot.interface.foldable
    assert slot.layers is None
    assert "between blocks" in slot.obstacle


def test_the_wrapped_network_behaves_as_itself() -> None:
    model = ResNet()
    host = wrap(model, torch.zeros(4, 2, 6, 6))
    assert list(host.state_dict()) == list(model.state_dict())
    other = ResNet()
    host.load_state_dict(other.state_dict())
    assert equal(dict(model.state_dict()), dict(other.state_dict()))
    host.eval()
    x = torch.randn(2, 2, 6, 6)
    assert torch.equal(host(x), model(x))
    host.train()
    with host.evaluating():
        assert not model.training
    assert model.training
    with pytest.raises(InvalidInput) as caught:
        host.slot("nowhere")
    assert "layer.0.conv1:layer.0.conv2" in caught.value.hint
