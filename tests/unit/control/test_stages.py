"""What each state does at a boundary, and what lets a seed go on, stay or end."""

from __future__ import annotations

import itertools
import math
from typing import Any, cast

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given
from torch import nn

from esper_core.blueprint.interface import Layout
from esper_core.blueprint.ir import BlueprintIR, Node
from esper_core.control.packet import Budget, RampStyle
from esper_core.control.roles import LoadedKernel
from esper_core.control.stages import ramp
from esper_core.errors import Untrusted
from esper_core.lifecycle import State
from esper_core.nn.probe import mean_loss
from tests.unit.control.growing import (
    LEARNING,
    QUICK,
    Given,
    Late,
    Run,
    blended,
    catalogue_source,
    germinate,
    held,
    moves,
    offer,
    order,
    owned,
    settings,
)
from tests.unit.nn.hosts import equal

SLOT = "2:4"
LIFE = [
    State.DORMANT,
    State.GERMINATED,
    State.LOADING,
    State.TRAINING,
    State.GRAFTING,
    State.STABILIZATION,
    State.EVALUATING,
    State.FINE_TUNING,
    State.FOSSILIZED,
]
GRAFTED = {State.GRAFTING, State.STABILIZATION, State.EVALUATING, State.FINE_TUNING}
styles = st.sampled_from([RampStyle.LINEAR, RampStyle.COSINE, RampStyle.SIGMOID, RampStyle.UNSPECIFIED])


@given(styles)
def test_a_ramp_begins_at_zero_and_ends_at_one_exactly(style: RampStyle) -> None:
    assert ramp(0.0, style) == 0.0
    assert ramp(1.0, style) == 1.0
    assert ramp(-1.0, style) == 0.0
    assert ramp(2.0, style) == 1.0
    assert ramp(0.5, style) == pytest.approx(0.5)


@given(styles, st.floats(0, 1), st.floats(0, 1))
@example(RampStyle.SIGMOID, 0.0, 1e-300)
@example(RampStyle.SIGMOID, 1 - 2**-53, 1.0)
@example(RampStyle.COSINE, 1 - 2**-53, 1.0)
def test_a_ramp_never_falls(style: RampStyle, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert 0.0 <= ramp(low, style) <= ramp(high, style) <= 1.0


def given_kernel(kernel: LoadedKernel | Exception | None, **options: Any) -> Run:
    """A run whose slot waits for this kernel."""
    run = Run(seed=1, source=Given(kernel), **options)
    run.grower.command(order(SLOT, State.GERMINATED, kernel_id="kernel-x"))
    return run


def real_kernel(run: Run, slot: str = SLOT) -> LoadedKernel:
    source = catalogue_source()
    interface = run.host.slots[slot].interface
    return source.poll(offer(source, interface).kernel_id)


@pytest.mark.parametrize(("spare", "state"), [(0, State.TRAINING), (-1, State.CULLED)])
def test_a_kernel_of_unknown_cost_is_held_to_the_budget_when_it_comes(spare: int, state: State) -> None:
    """The platform's are ordered by name; what they cost is known when they are here."""
    bare = Run(seed=1)
    kernel = real_kernel(bare)
    budget = Budget(parameters=4 * bare.host.slots[SLOT].unit_parameters + spare)
    run = given_kernel(kernel, budget=budget, settings=settings(training_epochs=9))
    run.epoch(0)
    assert run.events[-1].target is state
    assert (state is State.CULLED) == ("budget" in run.events[-1].reason)


def test_a_kernel_that_never_comes_is_given_up() -> None:
    run = given_kernel(None)
    run.epochs(0, 8)
    epochs = {event.target: event.epoch for event in run.events}
    assert epochs[State.CULLED] - epochs[State.LOADING] == run.grower.settings.loading_epochs
    assert "did not arrive" in next(event.reason for event in run.events if event.target is State.CULLED)


def test_a_kernel_that_can_never_be_had_ends_the_seed() -> None:
    run = given_kernel(Untrusted("the signature is by an unlisted key"))
    run.epochs(0, 2)
    assert run.path(SLOT) == [State.DORMANT, State.GERMINATED, State.LOADING, State.CULLED]
    assert "unlisted key" in run.events[-1].reason
    assert run.host.slots[SLOT].graft is None


def test_a_kernel_for_another_slot_ends_the_seed() -> None:
    run = Run(seed=1)
    run = given_kernel(real_kernel(run, "0:2"))
    run.epochs(0, 2)
    assert run.path(SLOT)[-1] is State.CULLED
    assert run.host.slots[SLOT].graft is None


def test_weights_that_do_not_fit_their_blueprint_end_the_seed() -> None:
    kernel = real_kernel(Run(seed=1))
    short = {name: value for name, value in kernel.weights.items() if name != "A.bias"}
    run = given_kernel(LoadedKernel(kernel.kernel_id, kernel.blueprint, kernel.interface, kernel.symbols, short))
    run.epochs(0, 2)
    assert run.path(SLOT)[-1] is State.CULLED


def test_a_kernel_with_weights_that_are_not_finite_never_reaches_the_host() -> None:
    kernel = real_kernel(Run(seed=1))
    broken = {name: torch.full_like(value, math.nan) for name, value in kernel.weights.items()}
    run = given_kernel(LoadedKernel(kernel.kernel_id, kernel.blueprint, kernel.interface, kernel.symbols, broken))
    run.epochs(0, 8)
    assert run.path(SLOT)[:5] == [State.DORMANT, State.GERMINATED, State.LOADING, State.TRAINING, State.CULLED]
    assert all(bool(p.isfinite().all()) for p in run.host.parameters())


def test_a_whole_life_in_order_each_change_with_its_measurements() -> None:
    run = Run(seed=1)
    run.epochs(0, 6)
    germinate(run.grower, SLOT)
    run.until(State.FOSSILIZED, SLOT, 6)
    assert run.path(SLOT) == LIFE
    measured = {event.target: set(event.measurements) for event in run.events}
    assert {"reconstruction", "lessons", "probe_gain"} <= measured[State.GRAFTING]
    assert {"train_loss", "band"} <= measured[State.EVALUATING]
    assert {"contribution", "contribution_lower", "rent", "shrunk"} <= measured[State.FINE_TUNING]
    assert {"contribution", "contribution_lower", "rent", "folded_max_abs_diff"} <= measured[State.FOSSILIZED]
    assert all(event.reason for event in run.events)


def hardened(**changes: Any) -> tuple[Run, int]:
    """A run at the boundary where its graft is first judged, its host's weights made far too large."""
    run, number = blended(State.EVALUATING, settings=settings(**changes))
    with torch.no_grad():
        for parameter in run.host.parameters():
            parameter.mul_(3.0)
    return run, number


def judged(run: Run, number: int) -> tuple[dict[str, torch.Tensor], float, float]:
    """Weights before the boundary that lets a seed fine-tune, no epoch between; the held-back loss before and after it."""
    plot = run.grower.plot
    before = {name: parameter.detach().clone() for name, parameter in run.host.named_parameters()}
    first = mean_loss(run.host, plot.validation, plot.loss_fn)
    run.events += run.grower.step(number, first).events
    return before, first, mean_loss(run.host, plot.validation, plot.loss_fn)


def test_a_network_that_is_too_sure_is_softened_when_it_begins_to_learn_with_its_kernel() -> None:
    run, number = hardened()
    before, first, then = judged(run, number)
    event = run.events[-1]
    assert event.target is State.FINE_TUNING
    factor = event.measurements["shrunk"]
    assert factor < 1
    assert f"{factor:.0%}" in event.reason
    assert then < first
    for name, parameter in run.host.named_parameters():
        assert torch.equal(parameter, before[name] * factor if parameter.dim() > 1 else before[name])


def test_it_is_left_alone_where_settings_or_the_user_say_so() -> None:
    run, number = hardened(smallest_shrink=1.0)
    before, *_ = judged(run, number)
    assert run.events[-1].measurements["shrunk"] == 1
    assert all(torch.equal(parameter, before[name]) for name, parameter in run.host.named_parameters())
    run, number = hardened()
    own = run.host.model.get_submodule("0").weight
    own.requires_grad_(False)  # type: ignore[operator]
    before, *_ = judged(run, number)
    assert run.events[-1].measurements["shrunk"] < 1
    assert [name for name, p in run.host.named_parameters() if p.dim() > 1 and torch.equal(p, before[name])] == [
        "model.0.weight"
    ]


def test_alpha_follows_the_ordered_style_and_rests_at_one() -> None:
    run = Run(seed=1, settings=settings(ramp_epochs=4, settle_epochs=2))
    run.epochs(0, 6)
    germinate(run.grower, SLOT, style=RampStyle.LINEAR)
    start = run.until(State.GRAFTING, SLOT, 6)
    alphas = [run.grower.alpha(SLOT)]
    for number in range(start, start + 4):
        run.epoch(number)
        alphas.append(run.grower.alpha(SLOT))
    assert alphas == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("frozen", ["span", "host", "none"])
def test_what_holds_still_does_not_move_from_grafting_to_evaluating(frozen: str) -> None:
    run = Run(seed=1, settings=settings(frozen=frozen))
    run.epochs(0, 6)
    germinate(run.grower, SLOT)
    start = run.until(State.GRAFTING, SLOT, 6)
    names = [name for name, _ in run.host.model.named_parameters()]
    still = {"span": [n for n in names if n[0] in "24"], "host": names, "none": []}[frozen]
    before = {name: parameter.detach().clone() for name, parameter in run.host.model.named_parameters()}
    run.until(State.EVALUATING, SLOT, start)
    after = dict(run.host.model.named_parameters())
    assert [name for name in names if torch.equal(before[name], after[name])] == still
    assert [name for name, parameter in after.items() if not parameter.requires_grad] == still
    run.until(State.FINE_TUNING, SLOT, run.events[-1].epoch + 1)
    assert all(parameter.requires_grad for parameter in run.host.parameters())


@pytest.mark.parametrize("frozen", ["span", "host"])
def test_what_the_user_froze_stays_frozen(frozen: str) -> None:
    run = Run(seed=1, settings=settings(frozen=frozen))
    bias = cast(nn.Linear, run.host.model.get_submodule("2")).bias
    bias.requires_grad_(False)
    germinate(run.grower, SLOT)
    start = run.until(State.GRAFTING, SLOT)
    run.grower.command(order(SLOT, State.ROLLED_BACK))
    run.epoch(start)
    assert [name for name, p in run.host.model.named_parameters() if not p.requires_grad] == ["2.bias"]


def test_a_loss_that_does_not_settle_is_a_rollback() -> None:
    run = Run(seed=1)
    run.epochs(0, 6)
    germinate(run.grower, SLOT)
    start = run.until(State.STABILIZATION, SLOT, 6)
    calm = list(run.grower.governor.calm)
    high = 2.5 * sum(calm) / len(calm)  # outside the band of before, but no explosion
    for number in range(start, start + 3):
        run.epoch(number, loss=high)
    assert run.path(SLOT)[-2:] == [State.STABILIZATION, State.ROLLED_BACK]
    assert "settle" in run.events[-1].reason


def test_a_kernel_that_explains_too_little_is_never_grafted() -> None:
    run = Run(seed=1, settings=settings(min_reconstruction=0.99))
    germinate(run.grower, SLOT)
    run.until(State.CULLED, SLOT)
    assert run.path(SLOT) == [State.DORMANT, State.GERMINATED, State.LOADING, State.TRAINING, State.CULLED]
    lessons = run.grower.settings.training_patience
    assert f"after {lessons} lessons" in run.events[-1].reason


def test_what_does_not_pay_its_rent_goes_in_the_end() -> None:
    run = Run(seed=1, settings=settings(min_contribution=100.0))
    run.epochs(0, 6)
    germinate(run.grower, SLOT)
    run.until(State.CULLED, SLOT, 6)
    assert run.path(SLOT) == [*LIFE[:-1], State.CULLED]
    assert "rent" in run.events[-1].reason
    assert run.host.slots[SLOT].graft is None
    assert held(run.optimizer) == owned(run.host)
    assert all(parameter.requires_grad for parameter in run.host.parameters())


def test_rent_is_for_parameters_or_operations_whichever_grow_more() -> None:
    run = Run(seed=1, settings=settings(rent=0.5))
    run.epochs(0, 6)
    germinate(run.grower, SLOT)
    run.until(State.FINE_TUNING, SLOT, 6)
    measured = run.events[-1].measurements
    graft = run.host.slots[SLOT].graft
    assert graft is not None
    weights = [layer.weight for layer in run.host.model.modules() if isinstance(layer, nn.Linear)]
    larger = sum(p.numel() for p in graft.kernel.parameters()) / sum(p.numel() for p in run.host.model.parameters())
    slower = graft.kernel.analysis.flops / sum(2 * weight.numel() for weight in weights)
    assert slower > larger
    assert measured["rent"] == pytest.approx(0.5 * slower * measured["loss"])


PASS_THROUGH = BlueprintIR(
    name="pass_through",
    nodes=(Node(name="s", op="activation", inputs=("input",), attributes={"kind": "tanh"}),),
    output="s",
    layouts=(Layout.FEATURES,),
)


def test_a_kernel_that_cannot_begin_silent_is_not_bound() -> None:
    run = given_kernel(LoadedKernel("kernel-x", PASS_THROUGH, Run(seed=1).host.slots[SLOT].interface, {}, {}))
    run.epochs(0, 2)
    assert run.path(SLOT)[-1] is State.CULLED
    assert "no-op" in run.events[-1].reason


def test_each_lesson_is_drawn_anew_but_the_same_in_a_repeated_run() -> None:
    runs = [Run(seed=1, settings=LEARNING), Run(seed=1, settings=LEARNING)]
    for run in runs:
        germinate(run.grower, SLOT)
        run.epochs(0, 3)
        assert run.seed(SLOT).lessons == 3
    kernels = [cast(nn.Module, run.host.slots[SLOT].graft).state_dict() for run in runs]
    assert equal(dict(kernels[0]), dict(kernels[1]))
    drawn = [learnt_at(number) for number in (0, 0, 1)]  # by the same host, from the same kernel
    assert equal(drawn[0], drawn[1])
    assert not equal(drawn[0], drawn[2])


def learnt_at(number: int) -> dict[str, Any]:
    """A kernel after its first lesson, at that epoch."""
    run = Run(seed=1, settings=LEARNING)
    germinate(run.grower, SLOT)
    run.grower.step(number, 1.0)
    return dict(cast(nn.Module, run.host.slots[SLOT].graft).state_dict())


@pytest.mark.parametrize("lessons", [1, 2])
def test_no_state_is_left_twice_at_one_boundary_and_a_graft_takes_one_step(lessons: int) -> None:
    run = Run(seed=1, settings=settings(training_epochs=lessons))
    run.epochs(0, 6)
    germinate(run.grower, SLOT)
    for number in range(6, 16):
        report = run.epoch(number)
        left = [source for _, source, _ in moves(report)]
        assert len(left) == len(set(left))
        assert len(left) == 1 or not set(left) & GRAFTED
        assert [event.epoch for event in report.events] == [number] * len(left)
    assert {event.source for event in run.events} >= GRAFTED, "it never was a graft"


def test_what_the_host_knows_nothing_of_waits_for_nothing() -> None:
    """With one lesson, from an order to the graft's first step in one boundary, each change once and in order."""
    run = Run(seed=1, settings=settings(training_epochs=1))
    germinate(run.grower, SLOT)
    report = run.epoch(0)
    assert moves(report) == [(SLOT, source, target) for source, target in itertools.pairwise(LIFE[:5])]
    assert LIFE[4] is State.GRAFTING
    assert run.grower.alpha(SLOT) == pytest.approx(ramp(1 / QUICK.ramp_epochs, QUICK.ramp))


@pytest.mark.parametrize("lessons", [1, 2, 4])
def test_training_lasts_as_many_boundaries_as_lessons(lessons: int) -> None:
    run = Run(seed=1, settings=settings(training_epochs=lessons, training_patience=lessons))
    germinate(run.grower, SLOT)
    for number in range(lessons):
        run.epoch(number)
        assert run.seed(SLOT).lessons == number + 1
        assert (run.seed(SLOT).state is State.GRAFTING) == (number + 1 == lessons)


def test_a_kernel_on_its_way_is_waited_for_and_then_nothing_is() -> None:
    source = Late()
    run = Run(seed=1, settings=settings(training_epochs=1), source=source)
    germinate(run.grower, SLOT)
    assert moves(run.epoch(0)) == [(SLOT, source, target) for source, target in itertools.pairwise(LIFE[:3])]
    assert moves(run.epoch(1)) == []
    source.open = True
    assert moves(run.epoch(2)) == [(SLOT, source, target) for source, target in itertools.pairwise(LIFE[2:5])]
    assert source.asked == [run.seed(SLOT).kernel_id]


def test_a_seed_that_the_controller_orders_goes_on_at_that_boundary() -> None:
    run = Run(seed=1, controller=None, settings=settings(training_epochs=1, warmup_epochs=4))
    for number in range(30):
        report = run.epoch(number)
        if report.events:
            break
    (slot,) = {event.slot for event in report.events}
    assert moves(report) == [(slot, source, target) for source, target in itertools.pairwise(LIFE[:5])]


@pytest.mark.parametrize("objective", ["task", "straight-through", "reconstruction"])
def test_a_kernel_whose_output_is_not_finite_never_reaches_the_host(objective: str) -> None:
    """Each of its weights is finite, and what it gives is not."""
    kernel = real_kernel(Run(seed=1))
    huge = {name: torch.full_like(value, 1e30) for name, value in kernel.weights.items()}
    chosen = settings(training_objective=objective, settle_epochs=20, settle_patience=30)
    told = LoadedKernel(kernel.kernel_id, kernel.blueprint, kernel.interface, kernel.symbols, huge)
    run = given_kernel(told, settings=chosen)
    run.epochs(0, chosen.training_patience)
    assert run.path(SLOT) == [State.DORMANT, State.GERMINATED, State.LOADING, State.TRAINING, State.CULLED]
    assert run.rolled_back == []
