"""Resuming a carver: at every boundary, with units silenced or gone, the continuation is the same bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from esper_core.control.carve.carver import Carver
from esper_core.control.carve.papers import Act, CarveOrder, Cut, PlanState
from esper_core.errors import Corrupt
from esper_core.nn.widen import morphology, reshape
from tests.unit.carve.carved import QUICK, carver, task, train, wide

EPOCHS = 9


def begin() -> Carver:
    host, optimizer = wide(16)
    return carver(host, optimizer, settings=QUICK.model_copy(update={"loss_share": 1.0}))


def saved(carve: Carver) -> dict[str, Any]:
    """Morphology, weights, optimiser and carving, as a checkpoint has them."""
    whole = {"host": carve.host.state_dict(), "optimizer": carve.optimizer.state_dict(), "carver": carve.state_dict()}
    return copy.deepcopy(whole | {"shapes": morphology(carve.host)})


def loaded(state: dict[str, Any]) -> Carver:
    carve = begin()
    reshape(carve.host.model, carve.optimizer, state["shapes"])
    carve.host.load_state_dict(state["host"])
    carve.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
    carve.load_state_dict(state["carver"])
    return carve


def live(carve: Carver, first: int) -> list[Any]:
    said = []
    for epoch in range(first, EPOCHS):
        if epoch == 4:
            carve.order(CarveOrder(order_id="o", run_id="local", plan_id="x", act=Act.WAKE))
        train(carve.host, carve.optimizer, task())
        said.append(carve.step(epoch))
    return said


def test_resumed_at_any_boundary_the_rest_is_the_same() -> None:
    whole = begin()
    states, said = [saved(whole)], []
    for epoch in range(EPOCHS):
        if epoch == 4:
            whole.order(CarveOrder(order_id="o", run_id="local", plan_id="x", act=Act.WAKE))
        train(whole.host, whole.optimizer, task())
        said.append(whole.step(epoch))
        states.append(saved(whole))
    happened = {event.state for report in said for event in report.events}
    assert {PlanState.SEDATED, PlanState.REMOVED, PlanState.REFUSED} <= happened
    assert any(state["carver"]["trial"] for state in states)
    for at in range(1, EPOCHS):
        again = loaded(states[at])
        assert live(again, at) == said[at:], f"resumed at {at}"
        final = whole.host.state_dict()
        assert all(torch.equal(final[name], value) for name, value in again.host.state_dict().items())
        assert again.state_dict().keys() == whole.state_dict().keys()
        assert again.freed == whole.freed


def test_a_waiting_order_is_not_forgotten() -> None:
    carve = begin()
    carve.order(
        CarveOrder(order_id="o", run_id="local", plan_id="p", act=Act.SEDATE, cuts=(Cut(cluster="0", units=(99,)),))
    )
    (event,) = loaded(saved(carve)).step(0).events
    assert (event.order_id, event.state) == ("o", PlanState.REFUSED)


def test_another_network_or_version_is_refused() -> None:
    carve = begin()
    train(carve.host, carve.optimizer, task(), 3)
    assert carve.step(2).events[0].state is PlanState.SEDATED
    state = carve.state_dict()
    with pytest.raises(Corrupt, match="version 7"):
        begin().load_state_dict({**state, "version": 7})
    host, optimizer = wide(2)
    with pytest.raises(Corrupt, match="units on trial are not this host's"):
        carver(host, optimizer).load_state_dict(state)
