"""Carving a finished run's network: the same plans, trials and comparisons as while it trained, on a copy."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from esper_core.config import load
from esper_core.control.carve.carver import Carver
from esper_core.control.carve.papers import CarveEvent, PlanState
from esper_core.control.carve.settings import CarveSettings
from esper_core.errors import Conflict, Exhausted
from esper_core.nn.host import wrap
from services.tolaria import keepsake
from services.tolaria.config import TolariaConfig, spelled
from services.tolaria.datasets import Data
from services.tolaria.experiment import PROBE_BATCH, VALIDATION_BATCH, load_data, set_up, write_json
from services.tolaria.optimization import optimizer_for
from services.tolaria.order import batches
from services.tolaria.trainer import score, train_rows

MOST_EPOCHS = 10_000
_FOREIGN = {"grow", "carved_from"}
"""What stands in a run's config.json besides its settings."""


@dataclass(frozen=True)
class Carved:
    """A carved copy.

    Attributes:
        config, data: of the run.
        model: the copy, in evaluation mode.
        carver: what carved it.
        events: what it did.
        before, after: parameters, flops, and loss and accuracy on both held-back parts.
    """

    config: TolariaConfig
    data: Data
    model: nn.Module
    carver: Carver
    events: tuple[CarveEvent, ...]
    before: dict[str, Any]
    after: dict[str, Any]


def carve(directory: Path, share: float, max_drop: float, tune: int) -> Carved:
    """Carve a copy of the network that a finished run kept.

    Args:
        directory: the run's.
        share: of the parameters that may go.
        max_drop: held-back accuracy, absolute, that it may cost.
        tune: epochs to train on after each cut.

    Raises:
        Conflict: the run has not finished, or its data are not what they were.
        Corrupt: what it kept is damaged.
        Unsupported: the network cannot be traced.
    """
    recalled = keepsake.recall(directory)
    config = settings_of(directory)
    set_up(config)
    data = load_data(config)
    rows, _ = data.test.take(torch.arange(len(recalled.inputs), device=data.test.inputs.device))
    if not torch.equal(rows.cpu(), recalled.inputs):
        raise Conflict(
            f"the data of run {directory.name} are not what it was trained on",
            hint="put the old ones back in their place",
        )
    host = wrap(recalled.model.to(config.device), rows[:2])
    optimizer = optimizer_for(config.optimization, host.parameters())
    carver = Carver(
        host,
        optimizer,
        data.loss,
        probe=data.train.in_batches(PROBE_BATCH, config.morphogenetic.probe_samples),
        validation=data.validation.in_batches(VALIDATION_BATCH),
        settings=CarveSettings(
            enabled=True,
            warmup_epochs=0,
            measure_every=1,
            observe_epochs=max(1, tune),
            budget_share=share,
            max_accuracy_drop=max_drop,
        ),
        run_id=directory.name,
    )
    before = _standing(carver, data)
    events: list[CarveEvent] = []
    kept: dict[str, Any] = {}
    for epoch in range(MOST_EPOCHS):
        held = score(host, data, data.validation)
        now = carver.step(epoch, held.loss, held.accuracy).events
        events += now
        states = {event.state for event in now}
        if PlanState.WOKEN in states:  # nor does what was learnt without the units stay
            host.load_state_dict(kept["host"])
            optimizer.load_state_dict(kept["optimizer"])
        if PlanState.SEDATED in states:
            kept = copy.deepcopy({"host": host.state_dict(), "optimizer": optimizer.state_dict()})
        if carver.trial is None and PlanState.WOKEN not in states:
            break
        if tune and carver.trial is not None:
            order = batches(len(data.train), config.optimization.batch_size, config.seed, epoch)
            train_rows(host.model, optimizer, data, order)
    return Carved(config, data, host.model.eval(), carver, tuple(events), before, _standing(carver, data))


def settings_of(directory: Path) -> TolariaConfig:
    """A run's settings, as it was begun with."""
    kept = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    given = {name: value for name, value in kept.items() if name not in _FOREIGN}
    # Written whole, defaults included; some of them mean nothing for its host or data, and saying them would be refused.
    return load(TolariaConfig, spelled(given))


def write(done: Carved, source: Path, target: Path, document: dict[str, Any], name: str) -> None:
    """Make a run's directory of the copy; ``name`` is the file that says how it came about, written last.

    Raises:
        Exhausted: the disk cannot be written.
    """
    kept = json.loads((source / "config.json").read_text(encoding="utf-8"))
    try:
        target.mkdir(parents=True)
        keepsake.keep(target, done.config.model, done.data, done.model)
        write_json(target / "config.json", kept | {"carved_from": source.name})
        write_json(target / name, document)
    except OSError as error:
        raise Exhausted(f"{target} cannot be written: {error.strerror}", hint="make room, then carve again") from None


def _standing(carver: Carver, data: Data) -> dict[str, Any]:
    validation, test = (score(carver.host, data, part) for part in (data.validation, data.test))
    return {
        "parameters": carver.eye.parameters,
        "flops": carver.eye.anatomy(fresh=True).flops,
        "validation_accuracy": validation.accuracy,
        "test_accuracy": test.accuracy,
        "validation_loss": validation.loss,
        "test_loss": test.loss,
    }
