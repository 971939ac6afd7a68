"""Networks that are called by name and answer with an object, or that cannot be traced as a whole, still have places to grow."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper_core.control.survey import score
from esper_core.errors import Corrupt, InvalidInput, Unsupported
from esper_core.nn.widen import conform
from esper_core.trainers.calling import host_of, plainly
from esper_core.trainers.growth import Growth, optimizer_of
from tests.unit.nn.hosts import LOSS, perceptron


@dataclass
class Answer:
    logits: Tensor


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = perceptron(4, 6, 3, 5)

    def forward(self, x: Tensor, *, scale: float, shift: Tensor | None = None) -> Tensor:
        return self.layers(x) * scale


class Loud(nn.Module):
    """Decides on data, so that it cannot be exported."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head, self.unused = Trunk(), nn.Linear(5, 3), nn.Linear(2, 2)

    def forward(self, *, data: Tensor, mask: Tensor) -> Answer:
        if data.sum() > 0:
            data = data * mask
        return Answer(self.head(self.trunk(data, scale=2.0)))


def by_name(model: nn.Module, data: Tensor, mask: Tensor) -> Tensor:
    return model(data=data, mask=mask).logits


DATA = (torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.ones(8, 4))


def test_a_part_is_traced_where_the_whole_cannot_be() -> None:
    model = Loud()
    with pytest.raises(Unsupported):
        host_of(model, DATA, by_name)
    host = host_of(model, DATA, by_name, within="trunk")
    assert list(host.slots) == ["trunk.layers.0:trunk.layers.2", "trunk.layers.2:trunk.layers.4"]
    assert host.slots["trunk.layers.0:trunk.layers.2"].source is model.trunk.layers[0]
    assert set(host.graph.modules) == {"trunk.layers.0", "trunk.layers.2", "trunk.layers.4"}
    assert list(host.state_dict()) == list(model.state_dict())
    assert torch.equal(host(*DATA), by_name(model, *DATA))


def test_such_a_host_is_measured_and_copied() -> None:
    torch.manual_seed(0)  # a layer without a living unit wants nothing
    host = host_of(Loud(), DATA, by_name, within="trunk")
    found = score(host, [(DATA, torch.arange(8) % 3)], LOSS)
    assert {score.span for score in found} == {
        ("trunk.layers.0", "trunk.layers.2"),
        ("trunk.layers.2", "trunk.layers.4"),
    }
    assert all(score.gain > 0 for score in found)
    assert torch.equal(copy.deepcopy(host)(*DATA), host(*DATA))


def test_spans_are_named_from_the_network() -> None:
    pairs = [("trunk.layers.2", "trunk.layers.4")]
    assert list(host_of(Loud(), DATA, by_name, "trunk", pairs).slots) == ["trunk.layers.2:trunk.layers.4"]
    with pytest.raises(InvalidInput, match="not inside 'trunk'"):
        host_of(Loud(), DATA, by_name, "trunk", [("trunk.layers.4", "head")])
    plain = host_of(perceptron(4, 6, 3), DATA[0], plainly, spans=[("0", "2")])
    assert list(plain.slots) == ["0:2"]


@pytest.mark.parametrize(("within", "words"), [("trank", "no module 'trank'"), ("unused", "'unused' does not run")])
def test_the_part_must_exist_and_run(within: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        host_of(Loud(), DATA, by_name, within)


def test_places_across_a_norm_are_widened_with_it() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    whole = nn.Sequential(OrderedDict(body=model))
    for within in ("", "body"):
        host = host_of(whole, DATA[0], plainly, within)
        slot = host.slots["body.0:body.3"]
        assert (slot.norm_path, slot.norm, slot.obstacle) == ("body.1", model[1], "")
    blocked = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3))
    assert "LayerNorm" in host_of(blocked, DATA[0], plainly).slots["0:3"].obstacle


def test_an_optimizer_must_train_the_places() -> None:
    host = host_of(perceptron(4, 6, 3), DATA[0], plainly)
    right, wrong = torch.optim.SGD(host.parameters(), 0.1), torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)
    assert optimizer_of(host, [wrong, right]) is right
    for several in ([], [wrong], [right, torch.optim.SGD(host.parameters(), 0.1)]):
        with pytest.raises(InvalidInput, match="optimisers train the layers"):
            optimizer_of(host, several)


def test_a_network_takes_grown_widths_and_nothing_else() -> None:
    narrow, wide = perceptron(4, 6, 3), perceptron(4, 9, 3)
    optimizer = torch.optim.SGD(narrow.parameters(), 0.1)
    assert conform(narrow, wide.state_dict(), "", optimizer) == {"0": [6, 4], "2": [3, 6]}
    narrow.load_state_dict(wide.state_dict())
    assert torch.equal(narrow(DATA[0]), wide(DATA[0]))
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in narrow.parameters()}
    with pytest.raises(Corrupt, match="the checkpoint"):
        conform(nn.Sequential(nn.Conv2d(1, 2, 3)), nn.Sequential(nn.Conv2d(1, 2, 5)).state_dict())


@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_takes_grown_widths_too(affine: bool) -> None:
    def network(units: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, units), nn.BatchNorm1d(units, affine=affine), nn.ReLU(), nn.Linear(units, 3))

    narrow, wide = network(6), network(9)
    assert conform(narrow, wide.state_dict()) == {"0": [6, 4], "1": [6], "3": [3, 6]}
    narrow.load_state_dict(wide.state_dict())
    assert torch.equal(narrow.eval()(DATA[0]), wide.eval()(DATA[0]))


def test_an_unknown_option_is_refused() -> None:
    wrong: Any = {"budgets": None}
    with pytest.raises(InvalidInput, match="no option budgets") as caught:
        Growth(LOSS, wrong)
    assert "budget," in caught.value.hint


def test_neither_trainer_is_loaded_unless_asked_for() -> None:
    code = "import sys, esper_core.trainers.growth; print(*({'lightning', 'pytorch_lightning', 'transformers'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.strip() == ""
