"""Watching and isolated learning change nothing: outputs, gradients, losses, weights, buffers, modes and random state, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from esper_core.control.grower import Grower
from esper_core.control.survey import score
from esper_core.lifecycle import State
from esper_core.nn.host import Host, wrap
from esper_core.nn.isolated import amplify, prepare
from tests.unit.control.growing import LEARNING, germinate, grower
from tests.unit.nn.hosts import LOSS, batches, copied, equal, gradients, make, planted, wrapped

STEPS = 5


def record(model: nn.Module, optimizer: torch.optim.Optimizer, family: str, between: Callable[[int], None]) -> Any:
    """Everything that can be seen of some training steps, ``between`` called after each."""
    torch.manual_seed(7)
    seen: list[Any] = []
    for step, (inputs, targets) in enumerate(batches(family, STEPS, seed=9)):
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = LOSS(outputs, targets)
        loss.backward()
        seen += [outputs.detach().clone(), loss.detach().clone(), gradients(model)]
        optimizer.step()
        between(step)
    seen += [dict(model.state_dict()), torch.get_rng_state(), [module.training for module in model.modules()]]
    return seen


def fresh(family: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model with one layer in evaluation mode, as people do with batch statistics, and its optimiser."""
    model = make(family)
    list(model.modules())[-1].eval()
    return model, torch.optim.Adam(model.parameters(), 1e-2)


def watcher(family: str, host: Host, optimizer: torch.optim.Optimizer, objective: str = "task") -> Grower:
    chosen = LEARNING.model_copy(update={"training_objective": objective, "evaluate_at_most_every": 2})
    return grower(host, optimizer, batches(family, 3, seed=2), batches(family, 2, seed=3), settings=chosen)


@pytest.fixture(params=["mlp", "cnn", "resnet", "transformer"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def bare(family: str) -> Any:
    model, optimizer = fresh(family)
    return record(model, optimizer, family, lambda step: None)


def renamed(seen: list[Any]) -> list[Any]:
    """Gradients and modes of a host as those of the model in it."""
    inner = [
        {name.removeprefix("model."): value for name, value in item.items()} if isinstance(item, dict) else item
        for item in seen
    ]
    return [*inner[:-1], inner[-1][1:]]


def test_wrapping_changes_nothing(family: str, bare: Any) -> None:
    model, _ = fresh(family)
    host = wrapped(family, model)
    assert host.slots
    optimizer = torch.optim.Adam(host.parameters(), 1e-2)
    assert equal(renamed(record(host, optimizer, family, lambda step: None)), bare)


def test_measuring_between_steps_changes_nothing(family: str, bare: Any) -> None:
    model, optimizer = fresh(family)
    host = wrapped(family, model)
    subject = watcher(family, host, optimizer)
    measured: list[Any] = []

    def between(step: int) -> None:
        report = subject.step(step)
        measured.extend(signal for signal in report.health if signal.signal is not None)

    assert equal(renamed(record(host, optimizer, family, between)), bare)
    assert len(measured) >= 2 * len(host.slots)


@pytest.mark.parametrize("objective", ["task", "straight-through", "reconstruction"])
def test_a_seed_in_training_changes_nothing(family: str, bare: Any, objective: str) -> None:
    model, optimizer = fresh(family)
    host = wrapped(family, model)
    subject = watcher(family, host, optimizer, objective)
    name = next(iter(host.slots))
    layout = host.slots[name].interface.layout.name
    germinate(subject, name, "conv_bypass_1x1" if layout == "IMAGE" else "bottleneck_mlp")
    for epoch in range(3):
        subject.step(epoch)
        assert subject.seeds[0].state is State.TRAINING
    assert equal(renamed(record(host, optimizer, family, lambda step: void(subject.step(3 + step)))), bare)
    assert subject.seeds[0].state is State.TRAINING
    assert subject.seeds[0].lessons == 3 + STEPS
    assert subject.seeds[0].reconstruction is not None


def void(_: object) -> None:
    """Throw a value away."""


def test_looking_at_a_network_changes_nothing(family: str) -> None:
    model, _ = fresh(family)
    host = wrapped(family, model)
    data = batches(family, 2, seed=2)
    LOSS(model(data[0][0]), data[0][1]).backward()
    torch.manual_seed(5)
    before = (dict(copied(model).state_dict()), gradients(model), torch.get_rng_state())
    modes = [module.training for module in model.modules()]
    score(host, data, LOSS)
    slot = next(iter(host.slots.values()))
    lesson = prepare(host, slot, data, LOSS)
    kernel = planted(slot, "conv_bypass_1x1" if slot.interface.layout.name == "IMAGE" else "bottleneck_mlp")
    assert slot.graft is not None
    amplify(host, slot.graft, kernel, lesson, data, LOSS)
    assert equal((dict(model.state_dict()), gradients(model), torch.get_rng_state()), before)
    assert [module.training for module in model.modules()] == modes
    assert not slot.graft.attached
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("inplace", [True, False])
def test_a_culled_seed_leaves_no_trace(inplace: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(inplace), nn.Linear(4, 5), nn.ReLU(inplace), nn.Linear(5, 3))
    host = wrap(model, torch.zeros(4, 6))
    inputs, _ = batches("mlp", 1)[0]
    before = model(inputs)
    slot = host.slots["0:2"]
    planted(slot, "bottleneck_mlp", width=4)
    assert slot.graft is not None
    slot.graft.alpha.fill_(1)
    slot.graft.attach()
    assert not torch.equal(model(inputs), before)
    slot.release()
    assert torch.equal(model(inputs), before)
