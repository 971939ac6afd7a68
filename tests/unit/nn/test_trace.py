"""Where a network can grow: spans and flow on many kinds of networks, and clear words where it cannot be told."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper_core.blueprint.interface import Layout
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
    assert not any(slot.interface.foldable for slot in host.slots.values())  # batch statistics stand between
    names = host.graph.modules
    flows = {(names[a], names[b]) for a, b in host.graph.edges}
    assert ("stem", "layer.1.conv1") in flows  # past the block
    assert ("layer.1.conv2", "head") in flows


def test_a_transformer_is_spanned_in_its_feed_forward_part() -> None:
    host = wrap(Transformer(), torch.zeros(4, 5, 6))
    assert spans(host) == ["layer.linear1:layer.linear2"]
    interface = host.slots["layer.linear1:layer.linear2"].interface
    assert interface.layout is Layout.TOKENS
    assert not interface.foldable  # dropout between draws for every unit
    quiet = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    assert wrap(quiet, torch.zeros(4, 5, 8)).slots["linear1:linear2"].interface.foldable


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
        (nn.Dropout(0.5), "", False),
        (nn.LayerNorm(5), "", False),
        (nn.Softplus(), "", False),
        (nn.Sequential(nn.ReLU(), nn.Tanh()), "", False),
    ],
)
def test_what_stands_between_decides_whether_it_can_be_folded(activation: nn.Module, name: str, foldable: bool) -> None:
    host = wrap(nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, 3)), torch.zeros(3, 4))
    interface = host.slots["0:2"].interface
    assert (interface.activation, interface.foldable) == (name, foldable)


@pytest.mark.parametrize(
    ("first", "last", "foldable"),
    [
        (nn.Linear(4, 5), nn.Linear(5, 3), True),
        (nn.Linear(4, 5, bias=False), nn.Linear(5, 3), False),
        (nn.Linear(4, 5), nn.Linear(5, 3, bias=False), False),
    ],
)
def test_a_layer_without_bias_has_no_place_for_a_units(first: nn.Module, last: nn.Module, foldable: bool) -> None:
    host = wrap(nn.Sequential(first, nn.ReLU(), last), torch.zeros(3, 4))
    assert host.slots["0:2"].interface.foldable == foldable


@pytest.mark.parametrize(
    ("changes", "foldable"),
    [
        ({}, True),
        ({"padding": "same"}, False),
        ({"padding_mode": "reflect"}, False),
        ({"groups": 2}, False),
        ({"stride": 2, "dilation": 2}, True),
    ],
)
def test_convolutions_that_can_be_widened(changes: dict[str, Any], foldable: bool) -> None:
    options = {"padding": 1} | changes
    model = nn.Sequential(nn.Conv2d(4, 4, 3, **options), nn.ReLU(), nn.Conv2d(4, 2, 1))
    assert wrap(model, torch.zeros(2, 4, 8, 8)).slots["0:2"].interface.foldable == foldable


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
