"""What measuring all slots and deciding costs at an epoch boundary, in training steps of the same host."""

from __future__ import annotations

import statistics
import time
from functools import partial

from torch import nn

from esper_core.control.grower import Grower
from esper_core.control.heuristic import HeuristicPolicy
from esper_core.control.packet import AdaptationSignal, SystemStatePacket
from esper_core.control.settings import GrowthSettings
from tests.bench.bench import Pace, Table
from tests.bench.dormant import wrapped
from tests.bench.figures import Row, Sample, block
from tests.bench.nets import SIZES, Family, adam, step_of

PROBE_ROWS, PROBE_BATCH = 1024, 256
SECONDS, LEAST = 8.0, 3
"""Per host, unless that gives fewer rounds than ``LEAST``."""
DIGITS_STEPS, CIFAR_STEPS = 34, 352
"""Steps per epoch: digits at batch 32 with 60 % to train on, CIFAR-10 at batch 128 with 90 %."""


class Deciding:
    """Decides as in earnest and then lets nothing happen, so that every boundary finds the same host."""

    def __init__(self) -> None:
        self._policy = HeuristicPolicy()

    def decide(self, packet: SystemStatePacket) -> AdaptationSignal | None:
        self._policy.decide(packet)
        return None


def run(pace: Pace) -> list[Table]:
    settings = GrowthSettings()
    rows = []
    for family in [family.on(pace.device) for family in (SIZES[:1] if pace.quick else SIZES)]:
        pace.say(family.name)
        rows.append(_measured(family, settings, pace.rounds(15, 5)))
    note = (
        f"Probe of {PROBE_ROWS} rows; a boundary measures every {settings.evaluate_every} epochs while some slot is in need, and "
        f"ever more rarely, down to every {settings.evaluate_at_most_every}, while all is well. The share is of the time spent in "
        "training steps; 'steps for 1 %' is how many steps an epoch must have for it to be one per cent while in need."
    )
    return [Table("A measuring epoch boundary, in training steps", rows, (note,))]


def _measured(family: Family, settings: GrowthSettings, rounds: int) -> Row:
    host = wrapped(family)
    optimizer = adam(host)
    inputs, targets = family.rows(PROBE_ROWS)
    probe = list(zip(inputs.split(PROBE_BATCH), targets.split(PROBE_BATCH), strict=True))
    always = settings.model_copy(update={"warmup_epochs": 0, "evaluate_every": 1, "evaluate_at_most_every": 1})
    grower = Grower(
        host,
        optimizer,
        nn.functional.cross_entropy,
        probe=probe,
        validation=probe[:1],
        settings=always,
        controller=Deciding(),
    )
    step = step_of(host, optimizer, family.rows(family.batch))
    grower.step(0, train_loss=1.0)  # builds the catalogue's offers, once per interface
    times, steps, boundaries = block(step, family.clock), [], []
    ends = time.monotonic() + SECONDS
    for epoch in range(1, rounds + 1):
        steps.append(family.clock(step, times))
        boundaries.append(family.clock(partial(grower.step, epoch, 1.0), 1))
        if not grower.survey.fresh(epoch):
            raise RuntimeError("a boundary that was to be timed measured nothing")
        if time.monotonic() > ends and epoch >= LEAST:
            break
    ratio = Sample(tuple(a / b for a, b in zip(boundaries, steps, strict=True)))
    return {
        "what": f"{family.name}, {len(host.slots)} slots, batch {family.batch}",
        "n": len(steps),
        "steps": ratio.median,
        "q1": ratio.quantile(0.25),
        "q3": ratio.quantile(0.75),
        "ms": statistics.median(boundaries) * 1e3,
        "step ms": statistics.median(steps) * 1e3,
        f"share at {DIGITS_STEPS}/epoch": ratio.median / (settings.evaluate_every * DIGITS_STEPS),
        f"share at {CIFAR_STEPS}/epoch": ratio.median / (settings.evaluate_every * CIFAR_STEPS),
        f"all well, at {DIGITS_STEPS}": ratio.median / (settings.evaluate_at_most_every * DIGITS_STEPS),
        f"all well, at {CIFAR_STEPS}": ratio.median / (settings.evaluate_at_most_every * CIFAR_STEPS),
        "steps for 1 %": ratio.median / (settings.evaluate_every * 0.01),
    }
