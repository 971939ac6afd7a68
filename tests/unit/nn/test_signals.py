"""The growth signal against the formulas written out by hand, row by row, and what must leave it unmoved."""

from __future__ import annotations

import itertools
import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from esper_core.control.survey import health_of, score
from esper_core.errors import InvalidInput
from esper_core.nn.host import Host, wrap
from esper_core.nn.signals import (
    DOUBT,
    MAX_ROWS,
    Evidence,
    Fit,
    Reading,
    Sums,
    Tally,
    Thresholds,
    conclude,
    damped_root,
    measure,
    null_gain,
)
from tests.unit.nn.formulas import Figures, formulas, oracle, sights
from tests.unit.nn.hosts import CLASSES, LOSS, batches, copied, make, perceptron, train, wrapped, wrapped_perceptron

LIMITS = Thresholds()


class Pooled(nn.Module):
    """A sequence whose token outputs are averaged."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean(1)


def check(found: Evidence, wanted: Figures, confidence: float) -> None:
    for name in ("gain", "share", "score", "gain_relative", "gain_of_loss"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-6), name
    assert found.spectrum == pytest.approx(wanted.spectrum, rel=1e-6, abs=1e-12)
    assert found.confidence == pytest.approx(confidence, abs=1e-6)


def double(data: list[Any]) -> list[tuple[Tensor, Tensor]]:
    return [(inputs.double(), targets) for inputs, targets in data]


def test_features_match_the_formulas() -> None:
    model = cast(nn.Sequential, make("mlp").double())
    host = wrapped("mlp", model)
    data = double(batches("mlp", 3, size=70))
    found = measure(host, host.slots.values(), data, LOSS, LIMITS)
    for name, reading in found.items():
        source, sink = (int(path) for path in name.split(":"))
        seen = sights(model, source, sink, data)
        check(reading.evidence, *oracle(seen))
        assert reading.evidence.samples == sum(len(sight.descent) for sight in seen)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)),
        (nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Conv2d(3, 2, 3, padding=1)),
        (nn.Conv2d(2, 3, (3, 2), padding=(1, 0)), nn.Conv2d(3, 2, 3, stride=2)),
        (nn.Conv2d(2, 3, 3, padding=2, dilation=2), nn.Conv2d(3, 2, 1, stride=(2, 1))),
    ],
)
def test_images_match_the_formulas(first: nn.Conv2d, second: nn.Conv2d) -> None:
    torch.manual_seed(3)
    first.reset_parameters()  # drawn when this file was read, after whatever else had drawn
    second.reset_parameters()
    layers = nn.Sequential(copied(first), nn.ReLU(), copied(second), nn.ReLU(), nn.Flatten(), nn.LazyLinear(CLASSES))
    layers(torch.zeros(1, 2, 6, 6))
    model = layers.double()
    data = double(batches("cnn", 2, size=20))
    host = wrap(model, data[0][0])
    (reading,) = measure(host, host.slots.values(), data, LOSS, LIMITS).values()
    seen = sights(model, 0, 2, data)
    check(reading.evidence, *oracle(seen))
    assert reading.evidence.samples == sum(len(sight.descent) for sight in seen) > 40


def test_tokens_match_the_formulas() -> None:
    torch.manual_seed(3)
    layers = perceptron(6, 7, 3, CLASSES).double()
    model = Pooled(layers)
    data = double(batches("transformer", 2, size=30))
    host = wrap(model, data[0][0])
    found = measure(host, host.slots.values(), data, LOSS, LIMITS)
    for name, reading in found.items():
        source, sink = (int(path.split(".")[1]) for path in name.split(":"))
        check(reading.evidence, *oracle(sights(layers, source, sink, data)))


def test_many_positions_are_thinned_and_still_tell_the_same() -> None:
    """Where a batch has more rows than are kept, every k-th is, from other places of every sample: the same figure, roughly."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1), nn.Flatten())
    model.append(nn.Linear(2 * 11 * 13, 3))
    scenes = torch.randn(3, 1, 11, 13)
    classes = [torch.randint(3, (16,)) for _ in range(4)]
    data = [(scenes[targets] + 0.1 * torch.randn(16, 1, 11, 13), targets) for targets in classes]
    host = wrap(model, data[0][0])
    (reading,) = measure(host, host.slots.values(), data, LOSS, LIMITS).values()
    assert 2 * MAX_ROWS < reading.evidence.samples <= 4 * MAX_ROWS < 4 * 16 * 143
    seen = sights(model, 0, 2, data)
    whole = formulas(*(np.vstack([getattr(s, k) for s in seen]) for k in ("entering", "inner", "descent")), 1.0, 143)  # type: ignore[call-arg]
    assert reading.evidence.gain == pytest.approx(whole.gain, rel=0.5)


def test_the_null_is_the_mean_over_all_permutations() -> None:
    generator = torch.Generator().manual_seed(6)
    h, i, g = (torch.randn(6, width, generator=generator, dtype=torch.float64) for width in (2, 2, 3))
    inner = torch.cat([i, torch.ones(6, 1, dtype=torch.float64)], dim=1)
    wanted = g - inner @ torch.cholesky_solve(inner.T @ g, damped_root(inner.T @ inner))
    root = damped_root(h.T @ h / 6)
    gains = [
        float(torch.linalg.solve_triangular(root, h.T @ wanted[list(order)] / 6, upper=False).square().sum())
        for order in itertools.permutations(range(6))
    ]
    assert null_gain(Fit.of(Sums.of(h, inner, g))) == pytest.approx(sum(gains) / len(gains), rel=1e-9)
    assert max(gains) > 2 * min(gains)


def test_the_null_of_what_never_varies_is_nothing() -> None:
    generator = torch.Generator().manual_seed(6)
    inner = torch.cat([torch.randn(64, 2, generator=generator), torch.ones(64, 1)], dim=1)
    for scale in (1e-3, 1.0, 1e3):
        sums = Sums.of(torch.full((64, 1), 3.0), inner, scale * torch.randn(64, 2, generator=generator))
        assert 0 <= null_gain(Fit.of(sums)) <= 1e-5 * scale**2


def test_what_is_wanted_stands_out_of_the_null_and_shuffled_does_not() -> None:
    generator = torch.Generator().manual_seed(6)
    h = torch.randn(512, 4, generator=generator)
    inner = torch.cat([torch.randn(512, 3, generator=generator), torch.ones(512, 1)], dim=1)
    g = h @ torch.randn(4, 2, generator=generator) + 0.5 * torch.randn(512, 2, generator=generator)

    def seen(descent: Tensor) -> Evidence:
        tally = Tally(samples=512, rows=512)
        tally.add_batch(0, (h, inner, descent), 1.0)
        return conclude(tally, 1, LIMITS)

    real = seen(g)
    assert real.gain > 50 * real.null_gain
    shuffled = [seen(g[torch.randperm(512, generator=generator)]) for _ in range(50)]
    gains, nulls = (sum(getattr(found, name) for found in shuffled) for name in ("gain", "null_gain"))
    # Eight degrees of freedom each: the mean of fifty spreads by a fourteenth.
    assert gains == pytest.approx(nulls, rel=0.25)


class Last(Pooled):
    """The same, of which only the last token's output is read."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)[:, -1]


def test_tokens_that_nobody_reads_do_not_thin_out_the_one_that_counts() -> None:
    """Without attention the other tokens are nothing but ballast: the same evidence as of a network that gets the last one alone."""
    torch.manual_seed(3)
    layers = perceptron(6, 7, 3, CLASSES).double()
    data = double(batches("transformer", 2, size=30))
    alone = [(inputs[:, -1], targets) for inputs, targets in data]
    many, one = (wrap(model, part[0][0]) for model, part in ((Last(layers), data), (layers, alone)))
    found, wanted = (read(host, part) for host, part in ((many, data), (one, alone)))
    for theirs, mine in zip(wanted.values(), found.values(), strict=True):
        assert mine.evidence.gain == pytest.approx(theirs.evidence.gain, rel=1e-9)
        assert mine.evidence.share == pytest.approx(theirs.evidence.share, rel=1e-9)
        assert mine.evidence.confidence == pytest.approx(theirs.evidence.confidence, abs=1e-9)
        assert mine.evidence.samples == theirs.evidence.samples


@pytest.fixture
def trained() -> tuple[nn.Sequential, Host, list[Any]]:
    """A small MLP after a little training, in double precision."""
    model = cast(nn.Sequential, make("mlp", 4).double())
    host = wrapped("mlp", model)
    data = double(batches("mlp", 6, size=60))
    rule = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(5):
        train(model, rule, data)
    return model, host, data


def read(host: Host, data: list[Any]) -> dict[str, Reading]:
    return measure(host, host.slots.values(), data, LOSS, LIMITS)


HEALTHY, NEEDY = Thresholds(gain_of_loss=1e6), Thresholds(share=0.01, gain_of_loss=1e-9)
"""What no slot passes, and what any slot passes that is not mute."""


def glanced(host: Host, data: list[Any], thresholds: Thresholds) -> dict[str, Reading]:
    """Measured with leave to end after the second of six batches of 60."""
    return measure(host, host.slots.values(), data, LOSS, thresholds, glance=100)


def test_a_part_of_the_probe_is_enough_where_all_is_surely_healthy(
    trained: tuple[nn.Sequential, Host, list[Any]],
) -> None:
    _, host, data = trained
    found = glanced(host, data, HEALTHY)
    assert found == measure(host, host.slots.values(), data[:2], LOSS, HEALTHY)
    assert {reading.probed for reading in found.values()} == {120}


def test_one_slot_that_may_be_in_need_is_looked_at_in_full_and_all_others_with_it(
    trained: tuple[nn.Sequential, Host, list[Any]],
) -> None:
    _, host, data = trained
    assert glanced(host, data, NEEDY) == measure(host, host.slots.values(), data, LOSS, NEEDY)
    gains = sorted(reading.evidence.gain_of_loss for reading in read(host, data).values())
    between = Thresholds(share=0.01, gain_of_loss=math.sqrt(gains[-2] * gains[-1]))
    found = glanced(host, data, between)
    assert found == measure(host, host.slots.values(), data, LOSS, between)
    assert any(reading.evidence.confidence < DOUBT for reading in found.values())


def test_a_mute_slot_is_not_called_healthy_before_all_was_seen(
    trained: tuple[nn.Sequential, Host, list[Any]],
) -> None:
    model, host, data = trained
    with torch.no_grad():
        cast(nn.Linear, model[2]).bias.fill_(-50)
    found = glanced(host, data, HEALTHY)
    assert any(reading.vitals.dead_unit_ratio == 1 for reading in found.values())
    assert {reading.probed for reading in found.values()} == {360}


def test_the_order_of_units_does_not_matter(trained: tuple[nn.Sequential, Host, list[Any]]) -> None:
    model, host, data = trained
    before = read(host, data)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    first, second = cast(nn.Linear, model[0]), cast(nn.Linear, model[2])
    with torch.no_grad():
        first.weight.copy_(first.weight[order])
        first.bias.copy_(first.bias[order])
        second.weight.copy_(second.weight[:, order])
    after = read(host, data)
    for name, reading in before.items():
        same = (reading.evidence.gain, reading.evidence.share, reading.evidence.score, reading.evidence.confidence)
        other = after[name].evidence
        assert (other.gain, other.share, other.score, other.confidence) == pytest.approx(same, rel=1e-6)


@pytest.mark.parametrize("factor", [0.25, 0.5, 2.0, 4.0])
def test_the_scale_of_a_layer_does_not_matter(factor: float, trained: tuple[nn.Sequential, Host, list[Any]]) -> None:
    """ReLU lets a factor pass from the source into the sink: the same function, and so the same need."""
    model, host, data = trained
    before = read(host, data)["0:2"].evidence
    first, second = cast(nn.Linear, model[0]), cast(nn.Linear, model[2])
    with torch.no_grad():
        first.weight *= factor
        first.bias *= factor
        second.weight /= factor
    after = read(host, data)["0:2"].evidence
    assert (after.gain, after.share, after.score) == pytest.approx((before.gain, before.share, before.score), rel=1e-3)


def test_the_size_of_batches_does_not_matter(trained: tuple[nn.Sequential, Host, list[Any]]) -> None:
    _, host, data = trained
    inputs, targets = (torch.cat([batch[k] for batch in data]) for k in (0, 1))
    before = read(host, data)
    for size in (30, 120, 360):
        after = read(host, list(zip(inputs.split(size), targets.split(size), strict=True)))
        for name, reading in before.items():
            assert after[name].evidence.gain == pytest.approx(reading.evidence.gain, rel=1e-9)
            assert after[name].evidence.share == pytest.approx(reading.evidence.share, rel=1e-9)


def test_activations_in_place_are_seen_before_they_act() -> None:
    torch.manual_seed(1)
    plain = perceptron(6, 8, 3, 8, CLASSES)
    model = copied(plain)
    data = batches("mlp", 3, size=70)
    wanted = read(wrapped_perceptron(plain, 6, 8, 3, 8, CLASSES), data)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    found = read(wrap(model, data[0][0]), data)
    assert {name: reading.evidence for name, reading in found.items()} == {
        name: reading.evidence for name, reading in wanted.items()
    }


def test_two_dead_layers_in_a_row_mute_every_signal() -> None:
    model = cast(nn.Sequential, make("mlp"))
    host = wrapped("mlp", model)
    with torch.no_grad():
        for index in (2, 4):
            cast(nn.Linear, model[index]).bias.fill_(-1e4)
    found = read(host, batches("mlp", 3))
    for name in ("2:4", "4:6"):
        assert found[name].evidence.gain == 0
        assert found[name].evidence.confidence == 0
        assert health_of(found[name].evidence, LIMITS) == 1
        assert found[name].vitals.dead_unit_ratio == 1
    assert found["0:2"].vitals.dead_unit_ratio < 1
    assert found["0:2"].evidence.gain == 0  # nothing comes back through the dead


def test_health_is_a_third_where_both_thresholds_are_just_passed() -> None:
    blank = dict.fromkeys(("gain", "gain_relative", "score", "confidence"), 0.0)

    def evidence(share: float, of_loss: float) -> Evidence:
        return Evidence(**blank, share=share, gain_of_loss=of_loss, spectrum=(), samples=1, unit_parameters=1)

    assert health_of(evidence(0.5, 1.0), LIMITS) == pytest.approx(0.3)
    assert health_of(evidence(1.0, LIMITS.gain_of_loss), LIMITS) == pytest.approx(0.3)
    assert health_of(evidence(0.49, 1.0), LIMITS) > 0.3
    assert health_of(evidence(0.6, 0.006), LIMITS) < 0.3
    assert health_of(evidence(0.0, 1.0), LIMITS) == 1


@pytest.mark.parametrize("seed", range(4))
def test_a_planted_narrow_layer_is_found(seed: int) -> None:
    depth = 3
    place = torch.randint(depth, (1,), generator=torch.Generator().manual_seed(seed)).item()
    widths = (6, *(2 if layer == place else 24 for layer in range(depth)), CLASSES)
    torch.manual_seed(seed)
    model = perceptron(*widths)
    host = wrapped_perceptron(model, *widths)
    data = batches("mlp", 8, size=64, seed=seed)
    rule = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(12):
        train(model, rule, data)
    best, *rest = score(host, data, LOSS)
    assert best.span == (str(2 * place), str(2 * place + 2))
    assert best.health < 0.3
    assert all(other.gain < best.gain for other in rest)


@pytest.mark.parametrize("seed", range(3))
def test_a_wide_network_on_a_noisy_task_is_healthy_everywhere(seed: int) -> None:
    widths = (6, 24, 24, 24, CLASSES)
    torch.manual_seed(seed)
    model = perceptron(*widths)
    host = wrapped_perceptron(model, *widths)
    noise = torch.Generator().manual_seed(seed)
    data = [(x + 1.1 * torch.randn(x.shape, generator=noise), y) for x, y in batches("mlp", 16, size=64, seed=seed)]
    rule = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(8):
        train(model, rule, data)
    assert all(slot.health >= 0.3 for slot in score(host, data, LOSS))


def test_scores_come_with_the_most_worthwhile_first() -> None:
    host = wrapped("mlp", make("mlp"))
    found = score(host, batches("mlp", 4), LOSS)
    assert {":".join(slot.span) for slot in found} == set(host.slots)
    readings = read(host, batches("mlp", 4))
    worth = [readings[":".join(slot.span)].evidence.gain_relative * slot.share / slot.unit_parameters for slot in found]
    assert worth == sorted(worth, reverse=True)


def test_no_batches_and_losses_that_are_none_are_said() -> None:
    host = wrapped("mlp", make("mlp"))
    with pytest.raises(InvalidInput, match="no batches") as caught:
        read(host, [])
    assert caught.value.hint
    with pytest.raises(InvalidInput, match="loss"):
        measure(host, host.slots.values(), batches("mlp", 1), lambda y, t: LOSS(y, t) * math.nan, LIMITS)
    with pytest.raises(InvalidInput, match="loss"):
        measure(host, host.slots.values(), batches("mlp", 1), lambda y, t: y.sum(1), LIMITS)


def test_a_frozen_beginning_is_measured_all_the_same() -> None:
    model = make("mlp")
    host = wrapped("mlp", model)
    data = batches("mlp", 3)
    before = {name: reading.evidence for name, reading in read(host, data).items()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert {name: reading.evidence for name, reading in read(host, data).items()} == before
