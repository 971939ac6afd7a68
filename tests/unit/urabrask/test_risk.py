"""Risk is learnt from reports whose truth is known here, is calibrated, and says that it knows nothing when it does not."""

from __future__ import annotations

import math
import random

import pytest

from esper_core.errors import InvalidInput
from services.urabrask.risk import CONSTANT, EACH, ENOUGH, KERNELS, NAMES, UNKNOWN, Model, Row, assess, enough, fit

Reports = tuple[list[Row], list[str], list[bool]]


def row(draw: random.Random) -> Row:
    return tuple(draw.gauss(5.0, 2.0) for _ in NAMES)


def truth(features: Row) -> float:
    """What happens in this world: two features matter, one for and one against."""
    first, second = features[0], features[11]
    assert first is not None
    assert second is not None
    return 1 / (1 + math.exp(-(1.2 * (first - 5) - 0.8 * (second - 5))))


def world(kernels: int, each: int, seed: int) -> Reports:
    """``each`` reports about every one of ``kernels``."""
    draw = random.Random(seed)
    rows, names, failed = [], [], []
    for number in range(kernels):
        features = row(draw)
        for _ in range(each):
            rows.append(features)
            names.append(f"kernel-{number}")
            failed.append(draw.random() < truth(features))
    return rows, names, failed


def test_a_known_relation_is_recovered_and_calibrated() -> None:
    model = fit(*world(400, 5, seed=1))
    draw = random.Random(2)
    unseen = [row(draw) for _ in range(4000)]
    told = [model.risk(features) for features in unseen]
    happened = [draw.random() < truth(features) for features in unseen]
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        inside = [(p, bad) for p, bad in zip(told, happened, strict=True) if low <= p < low + 0.2]
        n = len(inside)
        expected, share = sum(p for p, _ in inside) / n, sum(bad for _, bad in inside) / n
        noise = math.sqrt(expected * (1 - expected) / n)
        assert abs(share - expected) < 3 * noise + 0.04, (low, expected, share)
    slopes = [model.slope * weight / scale for weight, scale in zip(model.weights, model.scales, strict=True)]
    assert slopes[0] == pytest.approx(1.2, rel=0.2)
    assert slopes[11] == pytest.approx(-0.8, rel=0.2)
    assert max(abs(slope) for index, slope in enumerate(slopes) if index not in (0, 11)) < 0.15


def test_what_no_kernel_shows_teaches_nothing() -> None:
    """Outcomes that no feature explains: everybody is told the base rate, for the calibration saw unseen kernels."""
    draw = random.Random(3)
    rows, kernels, _ = world(200, 2, seed=3)
    model = fit(rows, kernels, [draw.random() < 0.3 for _ in rows])
    told = [model.risk(features) for features in rows]
    assert sum(told) / len(told) == pytest.approx(0.3, abs=0.08)
    assert max(told) - min(told) < 0.25


def test_an_unmeasured_feature_counts_as_ordinary() -> None:
    model = fit(*world(100, 2, seed=4))
    some = row(random.Random(5))
    without = (*some[:11], None, *some[12:])
    assert model.risk(without) == pytest.approx(model.risk((*some[:11], model.means[11], *some[12:])))


def test_a_model_survives_storage_and_is_named_by_its_numbers() -> None:
    reports = world(100, 2, seed=6)
    model = fit(*reports)
    read = Model.model_validate_json(model.model_dump_json())
    assert read == model == fit(*reports)
    assert read.version == model.version
    assert read.version.startswith(f"reports-{len(reports[0])}-")
    assert fit(*world(100, 2, seed=7)).version != model.version
    some = reports[0][0]
    assert assess(read, some) == (model.risk(some), model.version)
    assert 0 <= model.risk(tuple(1e9 for _ in NAMES)) <= 1


def test_too_few_reports_teach_nothing() -> None:
    rows, kernels, failed = world(KERNELS * 3, 4, seed=8)
    assert enough(kernels, failed)
    assert not enough(kernels[: ENOUGH - 1], failed[: ENOUGH - 1])
    assert not enough([f"kernel-{index % 3}" for index in range(len(kernels))], failed)
    assert not enough(kernels, [index < EACH - 1 for index in range(len(kernels))])
    assert not enough(kernels, [index >= EACH - 1 for index in range(len(kernels))])
    with pytest.raises(InvalidInput, match="too few"):
        fit(rows[: ENOUGH - 1], kernels[: ENOUGH - 1], failed[: ENOUGH - 1])
    assert assess(None, rows[0]) == (UNKNOWN, CONSTANT)
