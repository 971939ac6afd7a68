"""Carving what growing added: folded units are known as such, kernels beside the host go whole, and what they need stays."""

from __future__ import annotations

import torch
from torch import nn

import esper_core
from esper_core.blueprint.build import build
from esper_core.blueprint.catalogue import catalogue
from esper_core.control.carve.papers import Act, CarveOrder, Cut, PlanState
from esper_core.nn.carve.importance import KERNEL
from esper_core.nn.host import Host, Slot
from esper_core.nn.widen import adopt, fold
from tests.unit.carve.carved import HELD_ROWS, LOSS, QUICK, carver, outputs, task, train, wide
from tests.unit.control.growing import settings as growth_settings
from tests.unit.nn.hosts import perceptron

GROWTH = growth_settings(frozen="none")


def grafted(host: Host, optimizer: torch.optim.Optimizer, scale: float = 0.2) -> Slot:
    """A kernel blended at the first slot, with weights of its own."""
    slot = host.slots["0:2"]
    graft = slot.bind(build(catalogue()["bottleneck_mlp"], slot.interface, {"width": 3}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in graft.kernel.parameters():
            parameter.normal_(std=scale, generator=generator)
    graft.alpha.fill_(1)
    graft.attach()
    adopt(optimizer, slot.leader, list(graft.kernel.parameters()))
    return slot


def order(cluster: str, units: tuple[int, ...]) -> CarveOrder:
    return CarveOrder(
        order_id="o", run_id="local", plan_id="p", act=Act.SEDATE, cuts=(Cut(cluster=cluster, units=units),)
    )


def test_folded_units_are_known_and_carved_like_any_other() -> None:
    host, optimizer = wide(8)
    carve = carver(host, optimizer, autonomous=False)
    slot = grafted(host, optimizer)
    assert fold(host, slot, optimizer)
    assert host.model[0].out_features == 11
    report = carve.step(2)
    assert report.survey is not None
    grown = {standing.cluster: standing.grown for standing in report.survey.clusters}
    assert grown == {"0": 3, "2": 0, "4": 0}
    with torch.no_grad():
        host.model[2].weight[:, [2, 9]] = 0
    carve.order(order("0", (2, 9)))
    (sedated,) = carve.step(3).events
    assert sedated.reason == "ordered; 1 of them had been grown"
    assert [event.state for epoch in (4, 5) for event in carve.step(epoch).events] == [PlanState.REMOVED]
    survey = carve.step(6).survey
    assert survey is not None
    assert [(s.units, s.grown) for s in survey.clusters[:1]] == [(9, 2)]


def test_a_kernel_beside_the_host_goes_whole_and_its_neighbours_wait() -> None:
    host, optimizer = wide(8)
    carve = carver(host, optimizer, autonomous=False)
    bare = outputs(host, task()[0][0])
    slot = grafted(host, optimizer, scale=1e-5)  # it hardly does anything
    assert slot.graft is not None
    kernel = sum(parameter.numel() for parameter in slot.graft.kernel.parameters())
    survey = carve.step(2).survey
    assert survey is not None
    standings = {standing.cluster: standing for standing in survey.clusters}
    assert standings["0"].obstacle == "the kernel at 0:2 relies on its width"
    beside = standings[f"{KERNEL}0:2"]
    assert (beside.units, beside.least, beside.grown, beside.unit_parameters) == (1, 0, 1, kernel)
    carve.order(order(f"{KERNEL}0:2", (0,)))
    (sedated,) = carve.step(3).events
    assert sedated.state is PlanState.SEDATED
    assert torch.equal(outputs(host, task()[0][0]), bare)
    (removed,) = [event for epoch in (4, 5) for event in carve.step(epoch).events]
    assert (removed.state, removed.parameters) == (PlanState.REMOVED, kernel)
    assert slot.graft is None
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in host.parameters()}
    survey = carve.step(6).survey
    assert survey is not None
    assert not survey.clusters[0].obstacle


def test_a_fold_next_door_while_units_are_silenced_is_survived() -> None:
    host, optimizer = wide(8)
    carve = carver(host, optimizer, autonomous=False)
    with torch.no_grad():
        host.model[2].weight[:, 5] = 0
    carve.order(order("0", (5,)))
    assert carve.step(0).events[0].state is PlanState.SEDATED
    slot = grafted(host, optimizer, scale=1e-3)
    assert fold(host, slot, optimizer)
    before = outputs(host, HELD_ROWS)
    (removed,) = [event for epoch in (1, 2) for event in carve.step(epoch).events]
    assert removed.state is PlanState.REMOVED
    assert host.model[0].out_features == 10
    assert torch.allclose(outputs(host, HELD_ROWS), before, atol=1e-5)
    survey = carve.step(4).survey
    assert survey is not None
    assert survey.clusters[0].grown == 3
    assert isinstance(host.model[0], nn.Linear)


def test_growing_and_carving_share_a_loop_and_keep_out_of_each_others_way() -> None:
    torch.manual_seed(0)
    host = esper_core.wrap(perceptron(4, 16, 1, 16, 3), torch.randn(4, 4))
    optimizer = torch.optim.Adam(host.parameters(), lr=1e-2)
    data = {"probe": task(256, 1), "validation": task(256, 2)}
    grower = esper_core.Grower(host, optimizer, LOSS, settings=GROWTH, **data)
    carve = esper_core.Carver(host, optimizer, LOSS, settings=QUICK, **data)
    flown, carved = set(), []
    for epoch in range(40):
        train(host, optimizer, task())
        grower.step(epoch)
        busy = grower.busy
        events = carve.step(epoch, busy=busy).events
        carved += [event for event in events if event.state is PlanState.REMOVED]
        if busy:
            flown.add(epoch)
            assert all(event.state is PlanState.WOKEN for event in events)
    assert flown
    assert carved
    carve.finish(40)
    before = outputs(host, HELD_ROWS)
    plain, _ = grower.finish()
    assert torch.allclose(outputs(plain, HELD_ROWS), before, atol=1e-5)
    assert carve.freed == sum(event.parameters for event in carved)
