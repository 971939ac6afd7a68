"""Carving: what it frees and what it costs, against the same run uncarved and against a network that was as small from the start."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import nn

from esper_core.config import load
from esper_core.control.carve.papers import CarveEvent, PlanState
from esper_core.nn.carve.anatomy import dissect
from esper_core.nn.carve.importance import weigh
from esper_core.nn.carve.sedation import Sedation
from esper_core.nn.host import Host, wrap
from esper_core.nn.probe import mean_loss
from esper_core.nn.widen import conform
from services.tolaria import experiment
from services.tolaria.config import TolariaConfig
from services.tolaria.datasets import Data
from services.tolaria.history import Figures
from services.tolaria.learner import Learner, Plain
from services.tolaria.optimization import optimizer_for
from services.tolaria.order import batches
from services.tolaria.plane import Offline
from services.tolaria.trainer import score, train_rows
from tests.bench.bench import Pace, Table
from tests.bench.figures import Row, interleaved, mean_row, ratio_row

SEEDS, GLANCE = 5, 1
ROUNDS, FEW = 40, 6
NEVER = 1_000_000
BATCH = 64
CARVE = {"enabled": True, "measure_every": 3, "observe_epochs": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "mlp, digits": {"model": {"widths": [64, 64]}, "optimization": {"epochs": 40, "learning_rate": 0.002}},
    "cnn, digits images": {
        "model": {"host": "cnn", "channels": [32, 64]},
        "optimization": {"epochs": 24, "learning_rate": 0.004},
    },
    "resnet, digits images": {
        "model": {"host": "resnet", "channels": [8, 16], "blocks": 1},
        "optimization": {"epochs": 24, "learning_rate": 0.002},
    },
    "transformer, tokens": {
        "model": {"host": "transformer", "width": 32, "layers": 1, "heads": 4, "ffn": [64], "activation": "gelu"},
        "dataset": {"name": "tokens", "modulus": 23, "validation_fraction": 0.1, "test_fraction": 0.1},
        "optimization": {
            "epochs": 120, "batch_size": 64, "optimizer": "adamw", "learning_rate": 0.002, "weight_decay": 0.1,
        },
    },
}  # fmt: skip
NARROW = {"model": {"widths": [64, 2, 64]}, "optimization": {"epochs": 60}}


@dataclass
class Trained:
    """A network after its epochs.

    Attributes:
        model, data: it, and what it learnt.
        accuracy: on the test part.
        parameters, flops: of it.
        events: what carving did.
    """

    model: nn.Module
    data: Data
    accuracy: float
    parameters: int
    flops: int
    events: list[CarveEvent] = field(default_factory=list)


def run(pace: Pace) -> list[Table]:
    seeds = range(pace.rounds(SEEDS, GLANCE))
    sizes: list[Row] = []
    costs: list[Row] = []
    speeds: list[Row] = []
    ranks: list[Row] = []
    for name, sections in FAMILIES.items():
        trios = []
        for seed in seeds:
            pace.say(f"{name}, seed {seed}")
            whole = _trained(_config(sections, seed, carve=False))
            carved = _trained(_config(sections, seed, carve=True))
            trios.append((whole, carved, _as_small(_config(sections, seed, carve=False), carved.model)))
        sizes.append(_size(name, trios))
        costs += _compared(name, trios, "uncarved")
        speeds.append(_speed(name, trios[0], pace.rounds(ROUNDS, FEW)))
        ranks.append(_ranking(name, trios[0][0]))
    grown = []
    for seed in seeds:
        pace.say(f"grown, then carved, seed {seed}")
        grown_only = _trained(_config(NARROW, seed, carve=False, grow=True))
        both = _trained(_config(NARROW, seed, carve=True, grow=True))
        grown.append((grown_only, both, _as_small(_config(NARROW, seed, carve=False), both.model)))
    sizes.append(_size("mlp 64-2-64 grown, digits", grown))
    costs += _compared("mlp 64-2-64 grown, digits", grown, "grown, uncarved")
    settings = ", ".join(f"{key} {value}" for key, value in CARVE.items() if key != "enabled")
    return [
        Table(
            "What carving takes out while a network trains",
            sizes,
            (
                f"Means over seeds; {settings}, warm-up a quarter of the epochs (half for the grown one), everything else as by "
                "default: half of the parameters may go at most. FLOPs: linear and convolutional layers, one sample forward. "
                "Difference: largest change of an output by a removal, over the largest output of the uncarved network.",
            ),
        ),
        Table(
            "Test accuracy in points: carved less another network, paired by seed",
            costs,
            (
                "As small from the start: a fresh network of the carved one's shape, same seed of initial weights and order, same "
                "epochs. What the uncarved network learnt in full width counts as much as it costs.",
            ),
        ),
        Table(
            "A forward pass of 64 rows in evaluation mode, carved over uncarved",
            speeds,
            ("Processor seconds, block by block in turn; the first seed's networks.",),
        ),
        Table(
            "How well one unit's worth is foreseen",
            ranks,
            (
                "Rank correlation, over all units that can go, of what the probe's loss really becomes without the unit: with the size "
                "of the first-order term, and with half the mean square slope per sample, by which units are ranked. Foreseen / true: "
                "mean of both terms over the mean true change. The first seed's uncarved network.",
            ),
        ),
    ]


def _config(sections: dict[str, Any], seed: int, *, carve: bool, grow: bool = False) -> TolariaConfig:
    epochs = sections["optimization"]["epochs"]
    morphogenetic: dict[str, Any] = {} if grow else {"growth": {"warmup_epochs": NEVER}}
    if carve:
        morphogenetic["carve"] = CARVE | {"warmup_epochs": epochs // (2 if grow else 4)}
    given = {"name": "bench", "seed": seed, "morphogenetic": morphogenetic, "services": {"offline": True}}
    return load(TolariaConfig, given | sections)


def _trained(config: TolariaConfig) -> Trained:
    data = experiment.load_data(config)
    host = experiment.build_host(config, data)
    return _lived(config, data, experiment.growing(config, data, host, Offline(), "bench"))


def _as_small(config: TolariaConfig, like: nn.Module) -> Trained:
    """A network that has another's shape from the start, trained as long."""
    data = experiment.load_data(config)
    model = experiment.build_model(config, data)
    conform(model, like.state_dict())
    torch.manual_seed(config.seed)
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    return _lived(config, data, Plain(model, optimizer_for(config.optimization, model.parameters())))


def _lived(config: TolariaConfig, data: Data, learner: Learner) -> Trained:
    events: list[CarveEvent] = []
    for epoch in range(config.optimization.epochs):
        order = batches(len(data.train), config.optimization.batch_size, config.seed, epoch)
        loss = train_rows(learner.model, learner.optimizer, data, order)
        held = score(learner.model, data, data.validation)
        figures = Figures(
            epoch=epoch,
            step=0,
            train_loss=loss,
            validation_loss=held.loss,
            validation_accuracy=held.accuracy,
            learning_rate=0.0,
            train_seconds=0.0,
            boundary_seconds=0.0,
            parameters=0,
        )
        events += learner.boundary(figures).carved
    model = learner.finish().model
    anatomy = dissect(model, (data.test.take(torch.arange(2))[0],))
    accuracy = score(model, data, data.test).accuracy
    assert accuracy is not None
    return Trained(model, data, accuracy, anatomy.parameters, anatomy.flops, events)


Trio = tuple[Trained, Trained, Trained]
"""Uncarved, carved, as small from the start."""


def _size(name: str, trios: Sequence[Trio]) -> Row:
    told = [event for _, carved, _ in trios for event in carved.events]
    ended = {state: sum(event.state is state for event in told) for state in PlanState}
    differences = [
        event.difference / _scale(whole)
        for whole, carved, _ in trios
        for event in carved.events
        if event.difference is not None
    ]
    return {
        "what": name,
        "n": len(trios),
        "accuracy uncarved": statistics.fmean(whole.accuracy for whole, _, _ in trios),
        "carved": statistics.fmean(carved.accuracy for _, carved, _ in trios),
        "as small from the start": statistics.fmean(small.accuracy for _, _, small in trios),
        "parameters": statistics.fmean(whole.parameters for whole, _, _ in trios),
        "freed %": 100 * statistics.fmean(1 - carved.parameters / whole.parameters for whole, carved, _ in trios),
        "FLOPs freed %": 100 * statistics.fmean(1 - carved.flops / whole.flops for whole, carved, _ in trios),
        "removed": ended[PlanState.REMOVED],
        "woken": ended[PlanState.WOKEN],
        "refused": ended[PlanState.REFUSED],
        "difference": max(differences, default=None),
    }


def _scale(trained: Trained) -> float:
    with torch.no_grad():
        return float(trained.model.eval()(trained.data.validation.inputs[:256]).abs().max())


def _compared(name: str, trios: Sequence[Trio], against: str) -> list[Row]:
    return [
        mean_row(f"{name}: less {against}", [100 * (carved.accuracy - whole.accuracy) for whole, carved, _ in trios]),
        mean_row(
            f"{name}: less as small from the start",
            [100 * (carved.accuracy - small.accuracy) for _, carved, small in trios],
        ),
    ]


def _speed(name: str, trio: Trio, rounds: int) -> Row:
    whole, carved, _ = trio
    rows = whole.data.test.inputs[:BATCH]
    models = {"uncarved": whole.model.eval(), "carved": carved.model.eval()}
    with torch.no_grad():
        found = interleaved({name: lambda model=model: model(rows) for name, model in models.items()}, rounds=rounds)
    return ratio_row(name, found["carved"], found["uncarved"])


def _ranking(name: str, trained: Trained) -> Row:
    probe = trained.data.train.in_batches(experiment.PROBE_BATCH, 1024)
    host: Host = wrap(trained.model, probe[0][0][:2])
    anatomy = dissect(host.model, (probe[0][0][:2],))
    worths = weigh(host, anatomy, probe, trained.data.loss)
    bare = mean_loss(host, probe, trained.data.loss)
    true, first, second, foreseen = [], [], [], []
    for cluster, worth in worths.items():
        for unit in range(anatomy.clusters[cluster].units):
            sedation = Sedation(host.model, anatomy.clusters[cluster], [unit])
            sedation.attach()
            true.append(mean_loss(host, probe, trained.data.loss) - bare)
            sedation.detach()
            first.append(abs(worth.change[unit] - worth.importance[unit]))
            second.append(worth.importance[unit])
            foreseen.append(worth.change[unit])
    return {
        "what": name,
        "units": len(true),
        "first-order": float(spearmanr(first, true).statistic),
        "squared per sample": float(spearmanr(second, true).statistic),
        "foreseen / true": statistics.fmean(foreseen) / statistics.fmean(true),
    }
