"""How much of the probe an evaluation reads."""

from __future__ import annotations

import pytest
import torch

from esper_core.control.settings import GrowthSettings
from esper_core.control.survey import Survey
from tests.unit.control.growing import grower
from tests.unit.nn.hosts import batches, make, wrapped

HEALTHY = {"gain_of_loss": 1e6}
"""A threshold that no slot passes."""


def surveyed(**changes: object) -> Survey:
    host = wrapped("mlp", make("mlp"))
    rule = torch.optim.Adam(host.parameters(), 1e-2)
    settings = GrowthSettings.model_validate(changes)
    return grower(host, rule, batches("mlp", 8, size=32), batches("mlp", 2, seed=7), settings=settings).survey


@pytest.mark.parametrize(("glance", "probed"), [(0.25, 64), (0.5, 128), (1.0, 256), (1e-9, 32)])
def test_a_healthy_network_is_glanced_at(glance: float, probed: int) -> None:
    survey = surveyed(glance=glance, **HEALTHY)
    survey.measure(0)
    assert survey.probed == probed


def test_a_network_in_need_is_read_in_full_at_once_and_at_the_next_evaluation() -> None:
    needy = surveyed(share=0.01, gain_of_loss=1e-9)
    needy.measure(0)
    assert needy.probed == 256
    survey = surveyed(**HEALTHY)
    (name, past), *_ = survey.evidence.items()
    past.append(needy.evidence[name][-1].model_copy(update={"share": 0.9, "gain_of_loss": 1e7}))
    survey.measure(0)
    assert survey.probed == 256
    survey.measure(2)
    assert survey.probed == 64
