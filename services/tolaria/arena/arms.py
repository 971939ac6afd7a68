"""The arms of a comparison by name: how a network is trained, from not growing at all to every rival."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper_core.control.roles import Controller
from esper_core.control.settings import GrowthSettings
from esper_core.errors import InvalidInput, nearest
from esper_core.nn.host import Host
from services.tolaria.arena import gromo, rivals
from services.tolaria.arena.task import Setup, Task
from services.tolaria.arena.trial import (
    Row,
    growing,
    plain,
    probe,
    reshaped,
    training_flops,
    wrapped,
)

Peers = Mapping[str, Row]
"""Rows of the same task and seed that are there already, by arm."""


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        about: one line for people.
        run: gives the row, or None where the arm does not apply.
        after: an arm whose row it needs.
    """

    about: str
    run: Callable[[Task, Setup, str, int, Peers], Row | None]
    after: str | None = None


def _ungrown(task: Task, setup: Setup, arm: str, seed: int, _: Peers) -> Row:
    return plain(task, setup, arm, seed, model=setup.made())


def _esper(task: Task, setup: Setup, arm: str, seed: int, _: Peers, changes: Mapping[str, object] | None = None) -> Row:
    settings = GrowthSettings.model_validate({**task.settings.model_dump(), **(changes or {})})
    return growing(task, setup, arm, seed, None, host=wrapped(setup), settings=settings)


def _taught(**changes: object) -> Callable[[Task, Setup, str, int, Peers], Row]:
    return functools.partial(_esper, changes=changes)


def _static(task: Task, setup: Setup, arm: str, seed: int, peers: Peers, *, equal_flops: bool) -> Row:
    grown = peers["esper"]
    model = reshaped(setup, grown.shapes, seed)
    epochs = task.epochs
    if equal_flops:
        per_epoch = training_flops(task, setup, model) * math.ceil(len(setup.data.train) / task.batch_size)
        epochs = max(1, round(grown.flops / per_epoch))
    return plain(task, setup, arm, seed, model=model, epochs=epochs)


def _rival(
    about: str, make: Callable[[Host, Task, Setup, int], rivals.Rank | None], times: int = 1, every: int = 1
) -> Arm:
    def run(task: Task, setup: Setup, arm: str, seed: int, _: Peers) -> Row | None:
        host = wrapped(setup)
        rank = make(host, task, setup, seed)
        if rank is None or not host.slots:
            return None
        controller: Controller = rivals.Rival(rank, times, every)
        return growing(task, setup, arm, seed, controller, host=host)

    return Arm(about, run)


def _planted(_host: Host, _task: Task, setup: Setup, _seed: int) -> rivals.Rank | None:
    return rivals.at(setup.planted[0]) if setup.planted else None


def _probing(
    rule: Callable[..., rivals.Rank],
) -> Callable[[Host, Task, Setup, int], rivals.Rank]:
    def make(host: Host, task: Task, setup: Setup, _seed: int) -> rivals.Rank:
        return rule(host, probe(task, setup), setup.data.loss)

    return make


def _adapter(task: Task, setup: Setup, arm: str, seed: int, _peers: Peers) -> Row | None:
    """A residual adapter on the planted layer's own output, from the start: what growing in place would give at best."""
    if not setup.planted:
        return None
    model = setup.made()
    path = setup.planted[0].partition(":")[0]
    layer = model.get_submodule(path)
    if not isinstance(layer, nn.Linear):
        return None
    torch.manual_seed(seed)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Sequential(layer, Adapter(layer.out_features, rivals.WIDTH)))
    return plain(task, setup, arm, seed, model=model)


def _gromo(task: Task, setup: Setup, arm: str, seed: int, _: Peers) -> Row | None:
    return gromo.grown(task, setup, arm, seed)


class Adapter(nn.Module):
    """z + B·relu(A·z), B zero at first; (batch, width) → the same."""

    def __init__(self, width: int, units: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(width, units), nn.Linear(units, width)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = z + self.leave(self.enter(z).relu())
        return out


ARMS: Mapping[str, Arm] = {
    "esper": Arm("the heuristic policy, as shipped", _esper),
    "none": Arm("no growth", _ungrown),
    "static": Arm(
        "the final shape from the start, equal steps", lambda *a: _static(*a, equal_flops=False), after="esper"
    ),
    "static-flops": Arm(
        "the final shape from the start, equal training FLOPs", lambda *a: _static(*a, equal_flops=True), after="esper"
    ),
    "planted": _rival("one graft where the network was made too small", _planted),
    "random": _rival("one graft anywhere", lambda _h, _t, _s, seed: rivals.by_chance(seed)),
    "uniform": _rival("one graft after another, all slots in turn", lambda *_: rivals.in_turns, times=64),
    "schedule": _rival("one graft every 15 epochs, all slots in turn", lambda *_: rivals.in_turns, times=64, every=15),
    "gradmax": _rival("one graft where GradMax says", _probing(rivals.gradmax)),
    "firefly": _rival("one graft where a Firefly-style trial of units says", _probing(rivals.firefly)),
    "tiny": _rival("one graft where the raw TINY gain is highest", lambda *_: rivals.tiny_raw),
    "senn": _rival("one graft where the SENN score is highest", lambda *_: rivals.senn),
    "narrowest": _rival("one graft at the narrowest layer", lambda *_: rivals.narrowest),
    "rank": _rival("one graft at the layer of lowest effective rank", lambda *_: rivals.effective_rank),
    "dead-units": _rival("one graft at the layer with the largest share of dead units", lambda *_: rivals.dead_units),
    "fisher": _rival(
        "one graft where the Fisher information of the layer's weights is largest", _probing(rivals.fisher)
    ),
    "reconstruction": Arm(
        "esper, kernels taught the update the span cannot make", _taught(training_objective="reconstruction")
    ),
    "straight-through": Arm(
        "esper, kernels taught by the loss's own gradient", _taught(training_objective="straight-through")
    ),
    "silent": Arm("esper, kernels taught nothing", _taught(training_steps=1, training_learning_rate=1e-12)),
    "adapter": Arm("a residual adapter on the narrow layer's own output", _adapter),
    "gromo": Arm("one graft where, and with the weights that, TINY in its authors' package gromo says", _gromo),
}


EXTRA = frozenset(
    {"senn", "narrowest", "rank", "dead-units", "fisher", "reconstruction", "straight-through", "silent", "gromo"}
)
"""Arms that run only when they are named: places that others choose too, other lessons for kernels, and another's package."""


def listed(names: str, known: Iterable[str], refusal: str) -> list[str]:
    """Names separated by commas, each of which is known.

    Raises:
        InvalidInput: one is not.
    """
    there = list(known)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in there:
            raise InvalidInput(f"{refusal} {name!r}", hint=nearest(name, there))
    return wanted


def chosen(names: str | None) -> list[str]:
    """Arms by name, those that others need first; the usual ones when None.

    Raises:
        InvalidInput: an arm that does not exist.
    """
    wanted = [name for name in ARMS if name not in EXTRA] if names is None else listed(names, ARMS, "there is no arm")
    needed = {arm.after for name in wanted if (arm := ARMS[name]).after}
    return [name for name in ARMS if name in wanted or name in needed]
