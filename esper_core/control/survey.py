"""Measures a run's slots at epoch boundaries, remembers the evidence, and puts what a controller needs into a packet."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from esper_core.blueprint.build import example_input
from esper_core.control.packet import (
    Budget,
    GrowthSignal,
    HealthSignal,
    HostEdge,
    SlotState,
    SystemStatePacket,
)
from esper_core.control.plot import Plot
from esper_core.control.roles import KernelSource
from esper_core.control.seed import Seed
from esper_core.lifecycle import IN_FLIGHT, State
from esper_core.nn.host import Host, Slot
from esper_core.nn.probe import Batch, LossFunction, mean_loss
from esper_core.nn.signals import Evidence, Reading, Thresholds, measure

REMEMBERED = 8
"""Evaluations kept per slot, and twice as many epoch losses."""


def health_of(evidence: Evidence | GrowthSignal, thresholds: Thresholds) -> float:
    """Evidence as a health score in (0, 1]: 1 = wants nothing, 0.3 = both thresholds just passed, falling on beyond."""
    return 1 / (1 + (7 / 3) * thresholds.need(evidence.share, evidence.gain_of_loss))


@dataclass(frozen=True)
class SlotScore:
    """How much growing at a span would pay.

    Attributes:
        gain: loss per unit step, to first order.
        share: of the wanted update that the present span cannot make.
        health: in (0, 1]; below 0.3 asks for growth.
        unit_parameters: what one more unit would cost.
    """

    span: tuple[str, str]
    gain: float
    share: float
    health: float
    unit_parameters: int


def score(
    host: Host, batches: list[Batch], loss_fn: LossFunction, thresholds: Thresholds | None = None
) -> list[SlotScore]:
    """Every slot with its score, the most worthwhile per added parameter first.

    Raises:
        InvalidInput: when there are no batches or the loss is not a finite scalar.
    """
    limits = thresholds or Thresholds()
    readings = measure(host, host.slots.values(), batches, loss_fn, limits)

    def worth(slot: Slot) -> float:
        found = readings[slot.name].evidence
        return found.gain_relative * found.share / found.unit_parameters

    ranked = sorted(host.slots.values(), key=worth, reverse=True)
    return [_score(slot, readings[slot.name].evidence, limits) for slot in ranked]


def _score(slot: Slot, found: Evidence, limits: Thresholds) -> SlotScore:
    span = (slot.source_path, slot.sink_path)
    return SlotScore(span, found.gain, found.share, health_of(found, limits), found.unit_parameters)


class Survey:
    """What is known of a plot's slots."""

    def __init__(self, plot: Plot) -> None:
        self.plot = plot
        self.thresholds = Thresholds(plot.settings.share, plot.settings.gain_of_loss)
        self.evidence: dict[str, deque[GrowthSignal]] = {name: deque(maxlen=REMEMBERED) for name in plot.host.slots}
        self.losses: deque[float] = deque(maxlen=2 * REMEMBERED)
        self.first_loss: float | None = None
        self._interval = self._due = 0
        self._readings: dict[str, Reading] = {}
        self._epoch = -1

    def loss(self) -> float:
        """Mean loss on the probe."""
        return mean_loss(self.plot.host, self.plot.probe, self.plot.loss_fn)

    def measure(self, epoch: int) -> None:
        """Take evidence and vital signs of every slot from one pass over the probe, and settle when to measure next.

        Unless growth is being thought of, a part of the probe is enough where all of that is surely healthy.
        """
        plot = self.plot
        slots = plot.host.slots.values()
        glance = math.inf if self._in_need() else plot.settings.glance * sum(len(targets) for _, targets in plot.probe)
        self._readings = measure(
            plot.host, slots, plot.probe, plot.loss_fn, self.thresholds, self.first_loss, glance=glance
        )
        self._epoch = epoch
        for name, reading in self._readings.items():
            self.evidence[name].append(GrowthSignal(**asdict(reading.evidence)))
        self._plan(epoch)

    def _in_need(self) -> bool:
        """Whether the last evaluation found a slot that asks for growth."""
        last = (signals[-1] for signals in self.evidence.values() if signals)
        limit = self.plot.settings.policy.health_threshold
        return any(health_of(signal, self.thresholds) < limit for signal in last)

    def hear(self, loss: float) -> None:
        """Note an epoch's loss. The run's first is the measure of gains; one that is not finite says nothing."""
        if not math.isfinite(loss):
            return
        self.losses.append(loss)
        if self.first_loss is None:
            self.first_loss = abs(loss)

    def due(self, epoch: int) -> bool:
        """Whether slots are to be measured at this boundary: after the warm-up, and the less often the longer all are healthy."""
        return epoch + 1 >= self.plot.settings.warmup_epochs and epoch >= self._due

    def _plan(self, epoch: int) -> None:
        """Settle, from what was just measured, when to measure next."""
        settings = self.plot.settings
        longer = min(2 * self._interval, settings.evaluate_at_most_every)
        self._interval = settings.evaluate_every if self._in_need() else max(longer, settings.evaluate_every)
        self._due = epoch + self._interval

    @property
    def probed(self) -> int:
        """Samples that the last evaluation took."""
        return next(reading.probed for reading in self._readings.values())

    def fresh(self, epoch: int) -> bool:
        """Whether slots were measured at this epoch."""
        return self._epoch == epoch

    def forget(self) -> None:
        """The host has changed: evidence from before speaks of another network."""
        for signals in self.evidence.values():
            signals.clear()
        self._interval = 0

    def packet(
        self,
        seeds: Mapping[str, Seed],
        run_id: str,
        epoch: int,
        train_loss: float,
        validation_loss: float | None,
        validation_accuracy: float | None,
        budget: Budget,
        source: KernelSource,
    ) -> SystemStatePacket:
        """Everything a controller sees of this epoch.

        A loss that is not finite cannot travel: for training it is measured anew, on the host as it is after any rollback.
        """
        train_loss = train_loss if math.isfinite(train_loss) else self.loss()
        host = self.plot.host
        signals = {signal.slot: signal for signal in self.health(seeds, epoch)}
        slots = tuple(
            SlotState(
                slot=name,
                interface=slot.interface,
                state=seeds[name].state,
                generation=seeds[name].generation,
                embargo_until_epoch=seeds[name].embargo_until,
                barred_blueprint_ids=tuple(sorted(seeds[name].barred)),
                health=signals[name],
                evidence=tuple(self.evidence[name]),
                candidates=source.candidates(slot.interface),
            )
            for name, slot in host.slots.items()
        )
        return SystemStatePacket(
            run_id=run_id,
            epoch=epoch,
            train_loss=train_loss,
            validation_loss=_finite(validation_loss),
            validation_accuracy=_finite(validation_accuracy),
            loss_window=tuple(self.losses),
            slots=slots,
            budget=budget,
            host_modules=host.graph.modules,
            host_edges=tuple(HostEdge(source=a, target=b) for a, b in host.graph.edges),
            host_parameters=self.plot.parameters,
            first_loss=self.first_loss,
        )

    def health(self, seeds: Mapping[str, Seed], epoch: int) -> tuple[HealthSignal, ...]:
        """Vital signs per slot; what was not measured at this epoch is absent."""
        return tuple(self._health(slot, seeds[name], epoch) for name, slot in self.plot.host.slots.items())

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs."""
        return {
            "evidence": {name: [s.model_dump(mode="json") for s in signals] for name, signals in self.evidence.items()},
            "losses": list(self.losses),
            "first_loss": self.first_loss,
            "interval": self._interval,
            "due": self._due,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``."""
        for name, signals in state["evidence"].items():
            self.evidence[name].clear()
            self.evidence[name].extend(GrowthSignal.model_validate(signal) for signal in signals)
        self.losses.clear()
        self.losses.extend(state["losses"])
        self.first_loss, self._interval, self._due = state["first_loss"], state["interval"], state["due"]

    def _health(self, slot: Slot, seed: Seed, epoch: int) -> HealthSignal:
        reading = self._readings.get(slot.name) if self.fresh(epoch) else None
        signal = HealthSignal(
            slot=slot.name,
            epoch=epoch,
            error_count=slot.graft.errors if slot.graft else 0,
            age=max(0, epoch - seed.since),
            ready=seed.state in IN_FLIGHT or (seed.state is State.DORMANT and epoch >= seed.embargo_until),
        )
        if reading is None:
            return signal
        measured = asdict(reading.vitals) | {
            "health": health_of(reading.evidence, self.thresholds),
            "weight_norm": math.hypot(*(float(p.detach().norm()) for p in slot.source.parameters())),
            "latency_seconds": _latency(slot) if slot.graft else None,
            "signal": GrowthSignal(**asdict(reading.evidence)),
        }
        return signal.model_copy(update=measured)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


@torch.no_grad()
def _latency(slot: Slot, batch: int = 64, repetitions: int = 3) -> float:
    """Median wall seconds of the kernel's forward pass on a batch of the slot's shape."""
    assert slot.graft is not None  # noqa: S101
    inputs = example_input(slot.interface, batch, seed=0).to(slot.leader)
    seconds = []
    for _ in range(repetitions):
        began = time.perf_counter()
        slot.graft.kernel(inputs)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
