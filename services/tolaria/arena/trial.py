"""One arm, one task, one seed: trains a network, in the real lifecycle where it grows, and gives a row of figures."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from esper_core.control.grower import Grower
from esper_core.control.packet import Budget
from esper_core.control.roles import Controller
from esper_core.control.settings import GrowthSettings
from esper_core.lifecycle import State
from esper_core.nn.host import Host, wrap
from esper_core.nn.probe import Batch, first
from esper_core.nn.signals import measure
from esper_core.nn.widen import morphology, reshape
from services.tolaria.arena.effort import counted, step_flops
from services.tolaria.arena.task import Setup, Task
from services.tolaria.experiment import PROBE_BATCH, VALIDATION_BATCH
from services.tolaria.order import batches
from services.tolaria.trainer import score, train_rows


class Row(BaseModel):
    """What came of one trial.

    Attributes:
        accuracy, loss: of the plain network on the test part, before growth's parts are dropped from memory.
        planted: where the network was made too small on purpose; None when nobody knows.
        before, added: parameters at the start, and what growth added to them.
        slots: where grafts germinated, in order; ``kept`` those that fossilised.
        evidence: the strongest need, sure in two evaluations, that any slot showed; 1 = the thresholds just met.
        flops: of all training steps; ``scoring_flops`` of all measurements of the slots.
        at_full: test accuracy of each graft's run right after its alpha reached 1, in order.
        shapes: weight shapes of the layers that could grow, at the end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    arm: str
    seed: int
    planted: tuple[str, ...] | None = None
    accuracy: float | None
    loss: float
    before: int
    added: int = 0
    slots: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    culled: int = 0
    rolled_back: int = 0
    evidence: float | None = None
    steps: int
    flops: int
    scoring_flops: int = 0
    train_seconds: float
    growing_seconds: float = 0.0
    insertion_change: float | None = None
    fold_change: float | None = None
    at_full: tuple[float, ...] = ()
    shapes: dict[str, tuple[int, ...]] = {}


@dataclass
class Counter:
    """Steps and operations of training; the operations of a step are counted once per shape of the network."""

    steps: int = 0
    flops: int = 0
    seconds: float = 0.0


def train_epoch(
    task: Task, setup: Setup, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, epoch: int, count: Counter
) -> float:
    """One pass over the training part; the mean loss."""
    began = time.process_time()
    order = batches(len(setup.data.train), task.batch_size, seed, epoch)
    if task.rate is not None:
        for group in optimizer.param_groups:
            group["lr"] = task.rate(epoch)
    loss = train_rows(model, optimizer, setup.data, order)
    count.seconds += time.process_time() - began
    count.steps += len(order)
    return loss


def train(
    task: Task,
    setup: Setup,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    seed: int,
    epochs: Iterable[int],
    count: Counter,
) -> None:
    """Those epochs, at the shape that the model has now."""
    steps = count.steps
    for epoch in epochs:
        train_epoch(task, setup, model, optimizer, seed, epoch, count)
    count.flops += (count.steps - steps) * training_flops(task, setup, model)


def plain(task: Task, setup: Setup, arm: str, seed: int, *, epochs: int | None = None, model: nn.Module) -> Row:
    """A network that is only trained."""
    torch.manual_seed(seed)
    optimizer = task.optimizer(list(model.parameters()))
    before = sum(parameter.numel() for parameter in model.parameters())
    count = Counter()
    train(task, setup, model, optimizer, seed, range(epochs or task.epochs), count)
    return to_row(task, setup, arm, seed, model, before, count)


def growing(
    task: Task,
    setup: Setup,
    arm: str,
    seed: int,
    controller: Controller | None,
    *,
    host: Host,
    settings: GrowthSettings | None = None,
) -> Row:
    """A network that may grow; the controller decides, the heuristic policy when None."""
    torch.manual_seed(seed)
    optimizer = task.optimizer(list(host.parameters()))
    data = setup.data
    grower = Grower(
        host,
        optimizer,
        data.loss,
        probe=probe(task, setup),
        validation=data.validation.in_batches(VALIDATION_BATCH),
        budget=Budget(parameters=task.budget),
        settings=settings or task.settings,
        controller=controller,
        seed=seed,
    )
    count, story = Counter(), _Story()
    before, flops_of = host.parameter_count, {}
    for epoch in range(task.epochs):
        steps = count.steps
        loss = train_epoch(task, setup, host, optimizer, seed, epoch, count)
        shape = grower.plot.parameters
        if shape not in flops_of:
            flops_of[shape] = training_flops(task, setup, host)
        count.flops += (count.steps - steps) * flops_of[shape]
        story.boundary(grower, epoch, loss, setup)
    scoring = sum(story.probed.count(samples) * _scoring_flops(grower, samples) for samples in set(story.probed))
    network, report = grower.finish()
    return to_row(
        task,
        setup,
        arm,
        seed,
        network,
        before,
        count,
        added=report.added_parameters,
        slots=tuple(story.germinated),
        kept=(*story.kept, *report.unfinished),
        culled=report.culled + len(report.dropped),
        rolled_back=report.rolled_back,
        evidence=story.evidence,
        scoring_flops=scoring,
        growing_seconds=story.seconds,
        insertion_change=story.insertion_change,
        fold_change=report.folded_max_abs_diff,
        at_full=tuple(story.at_full),
        shapes={path: tuple(shape) for path, shape in morphology(host).items()},
    )


def probe(task: Task, setup: Setup) -> list[Batch]:
    """What growth signals are measured on."""
    return setup.data.train.in_batches(PROBE_BATCH, task.probe_rows)


def to_row(
    task: Task, setup: Setup, arm: str, seed: int, network: nn.Module, before: int, count: Counter, **growth: Any
) -> Row:
    """The row of a network that is done with training; ``growth`` are the row's fields that tell of growing."""
    found = score(network, setup.data, setup.data.test)
    return Row(
        task=task.name,
        arm=arm,
        seed=seed,
        planted=setup.planted,
        accuracy=found.accuracy,
        loss=found.loss,
        before=before,
        steps=count.steps,
        flops=count.flops,
        train_seconds=count.seconds,
        **growth,
    )


class _Story:
    """What happened at the boundaries of one run."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.probed: list[int] = []
        self.germinated: list[str] = []
        self.kept: list[str] = []
        self.evidence: float | None = None
        self.insertion_change: float | None = None
        self.at_full: list[float] = []

    def boundary(self, grower: Grower, epoch: int, loss: float, setup: Setup) -> None:
        began = time.process_time()
        report = grower.step(epoch, train_loss=loss)
        self.seconds += time.process_time() - began
        if grower.survey.fresh(epoch):
            self.probed.append(grower.survey.probed)
        for event in report.events:
            if event.target is State.GERMINATED:
                self.germinated.append(event.slot)
            elif event.target is State.FOSSILIZED:
                self.kept.append(event.slot)
            elif event.target is State.GRAFTING:
                self._at_insertion(grower, event.slot)
            elif event.target is State.STABILIZATION:
                self.at_full.append(score(grower.plot.host, setup.data, setup.data.test).accuracy or 0.0)
        for past in grower.survey.evidence.values():
            if len(past) > 1:
                need = grower.survey.thresholds.need
                sure = (need(signal.share, signal.gain_of_loss) * signal.confidence for signal in list(past)[-2:])
                self.evidence = max(self.evidence or 0.0, min(sure))

    def _at_insertion(self, grower: Grower, slot: str) -> None:
        """Change of the probe loss when a graft is blended in at alpha 0."""
        graft = grower.plot.host.slots[slot].graft
        assert graft is not None  # noqa: S101
        alpha = graft.alpha.clone()
        graft.alpha.zero_()
        inside = grower.survey.loss()
        graft.muted = True
        change = abs(inside - grower.survey.loss())
        graft.muted = False
        graft.alpha.copy_(alpha)
        self.insertion_change = max(self.insertion_change or 0.0, change)


def wrapped(setup: Setup) -> Host:
    """The setup's network with its slots."""
    example, _ = setup.data.train.take(torch.arange(2))
    return wrap(setup.made(), example, setup.spans)


def reshaped(setup: Setup, shapes: Mapping[str, Sequence[int]], seed: int) -> nn.Module:
    """The setup's network with wider layers, freshly initialised at those widths."""
    host = wrapped(setup)
    reshape(host.model, None, {path: list(shape) for path, shape in shapes.items()})
    torch.manual_seed(seed)
    for module in host.model.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    setup.flaw(host.model)
    return host.model


def _scoring_flops(grower: Grower, samples: int) -> int:
    """Operations of one more measurement of all slots on so many samples, at the shape that the host has now."""
    plot = grower.plot
    probe = first(plot.probe, samples)
    with counted() as effort:
        measure(plot.host, plot.host.slots.values(), probe, plot.loss_fn, grower.survey.thresholds)
    return effort.flops


def training_flops(task: Task, setup: Setup, model: nn.Module) -> int:
    """Operations of one training step."""
    part = setup.data.train
    inputs, targets = part.take(torch.arange(min(task.batch_size, len(part))))
    return step_flops(model, inputs, targets, setup.data.loss)
