"""The grower as its user sees it: what it tells, when it looks, and how it ends."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from esper_core.control.packet import ReasonCode
from esper_core.control.settings import GrowthSettings
from esper_core.errors import InvalidInput
from esper_core.lifecycle import State
from esper_core.nn.host import wrap
from tests.unit.control.growing import (
    LEARNING,
    QUICK,
    Run,
    blended,
    germinate,
    grower,
    order,
    settings,
)
from tests.unit.nn.hosts import CLASSES, batches, equal, make, wrapped

SLOT = "2:4"


def test_finishing_drops_what_is_not_blended() -> None:
    run = Run(seed=1, settings=LEARNING)
    before = copy.deepcopy(dict(run.host.state_dict()))
    germinate(run.grower, SLOT)
    for number in range(3):
        run.grower.step(number, 1.0)
    assert run.seed(SLOT).state is State.TRAINING
    plain, report = run.grower.finish()
    assert report.dropped == (SLOT,)
    assert report.added_parameters == 0
    assert report.folded_max_abs_diff is None
    assert equal(dict(plain.state_dict()), before)


def test_finishing_keeps_what_has_proven_itself_and_folds_it() -> None:
    run, _ = blended(State.FINE_TUNING)
    inputs, _ = batches("mlp", 1, seed=30)[0]
    with torch.no_grad():
        before = run.host.eval()(inputs)
    plain, report = run.grower.finish()
    assert report.unfinished == (SLOT,)
    assert report.added_parameters == 4 * (8 + 1 + 8)
    assert report.folded_max_abs_diff is not None
    assert report.folded_max_abs_diff < 1e-6
    with torch.no_grad():
        assert (plain(inputs) - before).abs().max() <= 1e-4 * before.abs().max()
    assert all(not module._forward_hooks for module in plain.modules())


def test_a_kernel_beside_the_host_stays_with_the_module() -> None:
    run = Run("tanh", seed=0)
    run.epochs(0, 4)
    germinate(run.grower, SLOT, "low_rank")  # linear, and a tanh host has no units for that
    run.until(State.FOSSILIZED, SLOT, 4)
    assert run.seed(SLOT).state is State.FOSSILIZED
    inputs, _ = batches("tanh", 1, seed=30)[0]
    with torch.no_grad():
        before = run.host.eval()(inputs)
    plain, report = run.grower.finish()
    assert report.beside == (SLOT,)
    assert report.fossilized == 1
    assert any(name.startswith("4.graft.") for name in plain.state_dict())
    with torch.no_grad():
        assert torch.equal(plain.eval()(inputs), before)


@pytest.mark.parametrize("failures", [0, 3])
def test_a_kept_kernel_that_broke_later_goes_in_the_end(failures: int) -> None:
    run = Run("tanh", seed=0)
    run.epochs(0, 4)
    germinate(run.grower, SLOT, "low_rank")
    run.until(State.FOSSILIZED, SLOT, 4)
    graft = run.host.slots[SLOT].graft
    assert graft is not None
    graft.raised = failures
    if not failures:
        with torch.no_grad():
            next(graft.kernel.parameters()).fill_(math.nan)
    inputs, _ = batches("tanh", 1, seed=30)[0]
    with torch.no_grad():
        before = run.host.eval()(inputs)  # it has no say any more
    plain, report = run.grower.finish()
    assert report.dropped == (SLOT,)
    assert report.beside == ()
    with torch.no_grad():
        assert torch.equal(plain.eval()(inputs), before)


def test_every_ended_graft_is_reported() -> None:
    run, number = blended()
    command = run.seed(SLOT).command_id
    run.grower.command(order(SLOT, State.ROLLED_BACK, reason="enough"))
    report = run.epoch(number)
    (told,) = report.reports
    assert told.outcome is State.ROLLED_BACK
    assert told.reason == "enough"
    assert told.command_id == command
    assert told.germinated_epoch == 6
    assert told.finished_epoch == number
    assert told.parameters == 4 * 8 + 4 + 4 * 8 + 8
    assert told.reconstruction is not None
    _, growth = run.grower.finish()
    assert (growth.fossilized, growth.culled, growth.rolled_back) == (0, 0, 1)
    assert growth.reports == (told,)


def test_growing_needs_data() -> None:
    host = wrapped("mlp", make("mlp"))
    rule = torch.optim.Adam(host.parameters())
    with pytest.raises(InvalidInput) as caught:
        grower(host, rule, [], batches("mlp", 1))
    assert caught.value.hint
    with pytest.raises(InvalidInput):
        grower(host, rule, batches("mlp", 1), [])


def test_a_network_without_a_span_is_refused_at_once() -> None:
    host = wrap(nn.Linear(6, CLASSES), torch.zeros(4, 6))
    data = batches("mlp", 2)
    with pytest.raises(InvalidInput, match="Linear has no span") as caught:
        grower(host, torch.optim.Adam(host.parameters()), data, data)
    assert "spans=" in caught.value.hint


def test_the_optimiser_must_train_the_layers_that_may_grow() -> None:
    host = wrapped("mlp", make("mlp"))
    rule = torch.optim.Adam([p for name, p in host.named_parameters() if not name.startswith("model.4.")])
    with pytest.raises(InvalidInput, match="4") as caught:
        grower(host, rule, batches("mlp", 1), batches("mlp", 1))
    assert caught.value.hint


def test_a_loss_that_is_no_scalar_is_said_at_the_first_measurement() -> None:
    host = wrapped("mlp", make("mlp"))
    subject = grower(
        host,
        torch.optim.Adam(host.parameters()),
        batches("mlp", 2),
        batches("mlp", 2),
        loss_fn=lambda outputs, targets: nn.functional.cross_entropy(outputs, targets, reduction="none"),
    )
    with pytest.raises(InvalidInput, match="loss"):
        subject.step(QUICK.warmup_epochs - 1, 1.0)


def test_the_first_measurement_waits_for_the_warm_up_and_then_comes_regularly() -> None:
    seen: list[int] = []

    class Listener:
        def decide(self, packet: Any) -> None:
            seen.append(packet.epoch)

    run = Run(
        seed=1, controller=Listener(), settings=settings(warmup_epochs=3, evaluate_every=2, evaluate_at_most_every=2)
    )
    run.epochs(0, 9)
    assert seen == [2, 4, 6, 8]


def test_the_heuristic_says_why_it_waits() -> None:
    run = Run(seed=1, controller=None, settings=settings(evaluate_every=1, warmup_epochs=0))
    signal = run.epoch(0).signal
    assert signal is not None
    assert signal.actions == ()
    codes = {reason.code for reason in signal.abstentions}
    assert codes <= {ReasonCode.HEALTHY, ReasonCode.NOT_CONFIDENT}
    assert len(signal.abstentions) == len(run.host.slots)


def test_defaults_are_the_documented_ones() -> None:
    defaults = GrowthSettings()
    assert (defaults.embargo_epochs, defaults.share, defaults.gain_of_loss) == (5, 0.5, 0.002)
    assert (defaults.training_objective, defaults.policy.coverage) == ("task", 0.99)
    assert (defaults.policy.health_threshold, defaults.policy.confidence_threshold) == (0.3, 0.7)
    assert (defaults.policy.adaptations_per_epoch, defaults.policy.in_flight) == (2, 1)
    governor = defaults.governor
    assert (governor.window, governor.sigmas, governor.ratio, governor.patience) == (20, 6.0, 3.0, 3)
    assert defaults.cache_bytes == 128 * 1024 * 1024
    assert QUICK.governor == governor
