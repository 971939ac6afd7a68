"""The arm that grows by the package gromo: it begins as the same network, grows where that is narrow, and says when it cannot."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections import OrderedDict

import pytest
import torch
from torch import nn

from esper_core.errors import Unsupported
from services.tolaria.arena.arms import ARMS, chosen
from services.tolaria.arena.gromo import chained
from services.tolaria.arena.links import links
from services.tolaria.arena.rivals import WIDTH
from services.tolaria.arena.task import Setup
from services.tolaria.arena.trial import Row, probe
from services.tolaria.hosts import cnn
from services.tolaria.trainer import score
from tests.unit.arena.contests import contest

TASK = contest()
SETUP = TASK.make(3)
UNIT = 16 + 1 + 16
"""Parameters of one unit more in the narrow layer."""


def other(model: nn.Module, **changes: object) -> Setup:
    """The setup with another network."""
    return dataclasses.replace(SETUP, model=lambda: copy.deepcopy(model), **changes)


@pytest.fixture(scope="module")
def row() -> Row:
    found = ARMS["gromo"].run(TASK, SETUP, "gromo", 3, {})
    assert found is not None
    return found


@pytest.mark.parametrize(
    "network",
    [
        SETUP.made(),
        nn.Sequential(OrderedDict(a=nn.Flatten(), b=nn.Linear(8, 3, bias=False), c=nn.Tanh(), d=nn.Linear(3, 4))),
        nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 4), nn.GELU("tanh")),
    ],
    ids=["contest", "flattened, without bias", "two in a row"],
)
def test_it_begins_with_the_very_same_outputs(network: nn.Module) -> None:
    setup = other(network)
    chain = chained(setup)
    assert chain is not None
    inputs = SETUP.data.test.inputs
    assert torch.equal(chain(inputs), setup.made()(inputs))


def test_a_function_that_stands_twice_is_there_twice() -> None:
    relu = nn.ReLU()
    network = nn.Sequential(nn.Linear(8, 3), relu, nn.Linear(3, 5), relu, nn.Linear(5, 4))
    chain = chained(other(network))
    assert chain is not None
    inputs = SETUP.data.test.inputs
    assert torch.equal(chain(inputs), network(inputs))


def test_it_grows_where_the_network_is_narrow_and_pays(row: Row) -> None:
    none = ARMS["none"].run(TASK, SETUP, "none", 3, {})
    assert none is not None
    assert row.slots == row.kept == SETUP.planted
    assert (row.accuracy or 0) > (none.accuracy or 0)
    assert row.before == none.before
    assert row.steps == none.steps


def test_the_row_says_what_was_added_and_what_it_cost(row: Row) -> None:
    added = row.shapes["2"][0] - 1
    assert 1 <= added <= WIDTH
    assert row.added == added * UNIT
    assert row.shapes == {"0": (16, 8), "2": (1 + added, 16), "4": (16, 1 + added), "6": (4, 16)}
    assert len(row.at_full) == 1
    assert row.culled == 0
    assert row.scoring_flops > 0
    none = ARMS["none"].run(TASK, SETUP, "none", 3, {})
    assert none is not None
    static = none.flops // none.steps
    wider = row.flops - 2 * static * (row.steps // TASK.epochs)  # what the epochs after the two of the warm-up cost
    assert wider > static * (row.steps - 2 * (row.steps // TASK.epochs))


def test_rows_depend_on_the_seed_alone(row: Row) -> None:
    again = ARMS["gromo"].run(TASK, SETUP, "gromo", 3, {})
    assert again is not None
    clocks = {"train_seconds", "growing_seconds"}
    assert again.model_dump(exclude=clocks) == row.model_dump(exclude=clocks)


def test_what_is_inserted_is_what_was_tried() -> None:
    chain = chained(SETUP)
    assert chain is not None
    rows, loss = probe(TASK, SETUP), SETUP.data.loss
    before = score(chain, SETUP.data, SETUP.data.train).loss
    chain.choose(rows, loss, WIDTH)
    tried: list[float] = []
    loss_at = chain._loss_at

    def heard(*asked: object) -> float:
        tried.append(loss_at(*asked))
        return tried[-1]

    chain._loss_at = heard  # type: ignore[method-assign]
    assert chain.insert(rows, loss)
    assert tried[0] == pytest.approx(before, rel=1e-5)
    assert score(chain, SETUP.data, SETUP.data.train).loss == pytest.approx(min(tried), rel=1e-5)
    assert min(tried) < before


def test_functions_that_work_in_place_change_nothing() -> None:
    outputs: list[torch.Tensor] = []
    for inplace in (False, True):
        network = SETUP.made()
        for module in network.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = inplace
        chain = chained(other(network))
        assert chain is not None
        chain.choose(probe(TASK, SETUP), SETUP.data.loss, WIDTH)
        assert chain.insert(probe(TASK, SETUP), SETUP.data.loss)
        outputs.append(chain(SETUP.data.test.inputs))
    assert torch.equal(*outputs)


def test_it_keeps_to_the_budget() -> None:
    task = dataclasses.replace(TASK, epochs=3)
    few, none = (
        ARMS["gromo"].run(dataclasses.replace(task, budget=budget), SETUP, "gromo", 3, {})
        for budget in (3 * UNIT + 1, 4)
    )
    assert few is not None
    assert few.slots == SETUP.planted
    assert few.added == 3 * UNIT
    assert none is not None
    assert (none.added, none.slots, none.culled) == (0, (), 0)


def test_dead_units_are_no_reason_to_warn() -> None:
    def deaden(network: nn.Module) -> None:
        with torch.no_grad():
            network.get_submodule("0").bias[2:] = -50.0

    row = ARMS["gromo"].run(
        dataclasses.replace(TASK, epochs=3), dataclasses.replace(SETUP, flaw=deaden), "gromo", 3, {}
    )
    assert row is not None
    assert row.kept


def test_units_that_lower_no_loss_are_not_added(monkeypatch: pytest.MonkeyPatch) -> None:
    from services.tolaria.arena.chain import Chain

    monkeypatch.setattr(Chain, "_loss_at", lambda self, factor, *_: factor)
    row = ARMS["gromo"].run(dataclasses.replace(TASK, epochs=3), SETUP, "gromo", 3, {})
    assert row is not None
    assert (row.slots, row.kept, row.culled, row.added, row.at_full) == (SETUP.planted, (), 1, 0, ())


def test_it_does_not_grow_in_the_warm_up() -> None:
    short = dataclasses.replace(TASK, epochs=TASK.settings.warmup_epochs - 1)
    row = ARMS["gromo"].run(short, SETUP, "gromo", 3, {})
    assert row is not None
    assert (row.slots, row.added, row.scoring_flops) == ((), 0, 0)


def test_it_grows_only_where_there_are_slots() -> None:
    chain = chained(dataclasses.replace(SETUP, spans=(("4", "6"),)))
    assert chain is not None
    assert chain.choose(probe(TASK, SETUP), SETUP.data.loss, WIDTH) == "4:6"


def test_the_optimiser_remembers_the_layers_that_stayed() -> None:
    made: list[torch.optim.Optimizer] = []

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        made.append(TASK.optimizer(parameters))
        return made[-1]

    ARMS["gromo"].run(dataclasses.replace(TASK, optimizer=optimizer, epochs=3), SETUP, "gromo", 3, {})
    old, new = made
    taken = [int(new.state[parameter]["step"]) for group in new.param_groups for parameter in group["params"]]
    epoch = taken[2]
    assert taken == [3 * epoch] * 2 + [epoch] * 4 + [3 * epoch] * 2
    assert all(int(state["step"]) >= 2 * epoch for state in old.state.values())


@pytest.mark.parametrize(
    "network",
    [
        cnn((1, 8, 8), (4, 8), 4, "relu"),
        nn.Sequential(nn.Linear(8, 3), nn.Softmax(1), nn.Linear(3, 4)),
        nn.Sequential(nn.Linear(8, 3), nn.ReLU(), nn.Tanh(), nn.Linear(3, 4)),
        nn.Sequential(nn.Linear(8, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 4)),
        nn.Linear(8, 4),
    ],
    ids=["convolutions", "not elementwise", "two functions", "norm", "no sequence"],
)
def test_other_networks_are_no_chain(network: nn.Module) -> None:
    assert links(network) == []
    assert ARMS["gromo"].run(TASK, other(network), "gromo", 3, {}) is None


def test_it_does_not_apply_where_nothing_can_grow() -> None:
    assert ARMS["gromo"].run(TASK, other(nn.Sequential(nn.Linear(8, 4))), "gromo", 3, {}) is None


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gromo", None)  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="gromo") as caught:
        ARMS["gromo"].run(TASK, SETUP, "gromo", 3, {})
    assert "pip install gromo" in caught.value.hint


def test_it_runs_by_name_alone() -> None:
    assert "gromo" not in chosen(None)
    assert chosen("gromo") == ["gromo"]
