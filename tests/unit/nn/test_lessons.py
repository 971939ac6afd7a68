"""Standard exercises: they rank kernels by what these can learn, say the same every time, and survive any kernel."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor, nn

from esper_core.blueprint.build import KernelModule, build
from esper_core.blueprint.catalogue import candidates, catalogue
from esper_core.blueprint.interface import ConvGeometry, Layout, SlotInterface
from esper_core.nn.lessons import FLOOR, LEVELS, SIDE, Mark, exercises, learn, study

ROWS = SlotInterface(layout=Layout.FEATURES, in_width=16, out_width=16, hidden_width=2, activation="relu")
TOKENS = SlotInterface(layout=Layout.TOKENS, in_width=16, out_width=12, hidden_width=4, activation="gelu")
WINDOW = ConvGeometry(kernel_h=3, kernel_w=3, padding_h=1, padding_w=1)
IMAGE = SlotInterface(
    layout=Layout.IMAGE,
    in_width=6,
    out_width=8,
    hidden_width=4,
    in_size=(16, 16),
    out_size=(16, 16),
    activation="relu",
    source=WINDOW,
    sink=WINDOW,
    foldable=True,
)


def marks(name: str, interface: SlotInterface, level: int, **symbols: int) -> dict[str, float]:
    found = study(lambda: build(catalogue()[name], interface, symbols), (level,))
    return {mark.name: mark.explained for mark in found}


def mean(found: dict[str, float]) -> float:
    return statistics.fmean(found.values())


def test_more_units_explain_more() -> None:
    scores = [mean(marks("bottleneck_mlp", ROWS, 3, width=width)) for width in (2, 8, 32)]
    assert scores[0] + 0.1 < scores[1] < scores[2]


def test_a_harder_level_is_harder() -> None:
    scores = [mean(marks("bottleneck_mlp", ROWS, level, width=4)) for level in LEVELS]
    assert scores == sorted(scores, reverse=True)


def test_what_is_not_linear_asks_for_a_kernel_that_is_not() -> None:
    straight, bent = marks("linear_bypass", ROWS, 1), marks("bottleneck_mlp", ROWS, 1, width=16)
    assert straight["linear"] > 0.95
    assert bent["rectified"] > straight["rectified"] + 0.1
    assert bent["product"] > straight["product"] + 0.5


def test_only_what_hears_earlier_tokens_learns_from_them() -> None:
    deaf, hearing = marks("bottleneck_mlp", TOKENS, 2, width=16), marks("attention_block", TOKENS, 2, width=8)
    assert hearing["earlier"] > deaf["earlier"] + 0.3
    assert deaf["product"] > hearing["product"] + 0.3


def test_each_image_exercise_has_the_design_it_is_made_for() -> None:
    pointwise, filters, gates = (
        marks(name, IMAGE, 1, width=8) for name in ("conv_bypass_1x1", "conv_bypass_3x3", "squeeze_excite")
    )
    assert filters["filter"] > pointwise["filter"] + 0.3
    assert filters["product-filter"] > max(pointwise["product-filter"], gates["product-filter"]) + 0.2
    assert gates["gated"] > max(pointwise["gated"], filters["gated"]) + 0.03


@pytest.mark.parametrize("interface", [ROWS, TOKENS, IMAGE], ids=["rows", "tokens", "image"])
def test_a_mark_can_be_repeated_to_the_last_bit_and_leaves_no_trace(interface: SlotInterface) -> None:
    name, ir, symbols = candidates(interface)[0]
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    first = study(lambda: build(ir, interface, symbols), (1,))
    torch.manual_seed(5)
    assert study(lambda: build(ir, interface, symbols), (1,)) == first, name
    torch.set_rng_state(before)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("interface", [ROWS, TOKENS, IMAGE], ids=["rows", "tokens", "image"])
def test_targets_are_centred_of_unit_variance_and_depend_on_the_inputs_alone(interface: SlotInterface) -> None:
    for level in LEVELS:
        for exercise, again in zip(exercises(interface, level), exercises(interface, level), strict=True):
            assert torch.equal(exercise.inputs, again.inputs)
            assert torch.equal(exercise.targets, again.targets)
            assert exercise.inputs.shape[1:][-1 if interface.layout is not Layout.IMAGE else 0] == interface.in_width
            assert float(exercise.targets.mean()) == pytest.approx(0, abs=1e-4)
            assert float(exercise.targets.square().mean()) == pytest.approx(1, abs=1e-3)


class Diverging(nn.Module):
    """Grows without bound as soon as it learns."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16, 16))
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + (self.weight * self.value).sinh().sum()


@pytest.mark.parametrize("value", [1e6, float("nan")])
def test_a_kernel_that_diverges_gets_the_floor(value: float) -> None:
    exercise = exercises(ROWS, 1)[0]
    assert learn(Diverging(value), exercise, 32) == Mark("linear", 1, FLOOR, 100)


def test_a_kernel_without_parameters_explains_nothing() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x)

    assert learn(Nothing(), exercises(ROWS, 1)[0], 32).explained == 0.0


def test_a_large_image_is_taught_on_a_smaller_one_with_the_kernel_s_own_weights() -> None:
    large = IMAGE.model_copy(update={"in_size": (64, 64), "out_size": (64, 64)})
    small = IMAGE.model_copy(update={"in_size": (SIDE, SIDE), "out_size": (SIDE, SIDE)})
    ir = catalogue()["conv_bypass_3x3"]
    assert study(lambda: build(ir, large), (1,)) == study(lambda: build(ir, small), (1,))


def test_a_kernel_too_dear_to_be_taught_gets_no_marks() -> None:
    wide = ROWS.model_copy(update={"in_width": 4096, "out_width": 4096})

    def dear() -> KernelModule:
        return build(catalogue()["bottleneck_mlp"], wide, {"width": 2048})

    assert study(dear, (1,)) == []
