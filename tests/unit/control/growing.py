"""Growers on small hosts: settings that make a lifecycle last a few epochs, orders, and kernel sources that misbehave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from esper_core.blueprint.interface import SlotInterface
from esper_core.control.boundary import BoundaryReport
from esper_core.control.grower import Grower
from esper_core.control.packet import AdaptationSignal, Command, KernelCandidate, SeedEvent, SystemStatePacket
from esper_core.control.roles import LoadedKernel
from esper_core.control.seed import Seed
from esper_core.control.settings import GovernorSettings, GrowthSettings
from esper_core.control.source import CatalogueSource
from esper_core.ids import new_id
from esper_core.lifecycle import State
from esper_core.nn.cache import KernelCache
from esper_core.nn.host import Host
from tests.unit.nn.hosts import LOSS, batches, make, train, wrapped

QUICK = GrowthSettings(
    warmup_epochs=1,
    evaluate_every=2,
    widths=(4,),
    embargo_epochs=2,
    loading_epochs=3,
    training_epochs=2,
    training_patience=3,
    training_steps=60,
    training_batch=32,
    min_reconstruction=-1e9,
    ramp_epochs=2,
    settle_epochs=1,
    settle_patience=3,
    fine_tune_epochs=2,
    governor=GovernorSettings(),
)
"""A whole life in about ten epochs, two boundaries of it in TRAINING; the reconstruction gate lets anything finite pass."""
LEARNING = QUICK.model_copy(update={"training_epochs": 100, "training_patience": 100, "training_steps": 10})
"""A seed that stays in TRAINING."""


class Silent:
    """A controller that never answers: growth by order only."""

    def decide(self, packet: SystemStatePacket) -> AdaptationSignal | None:
        return None


def settings(**changes: Any) -> GrowthSettings:
    """``QUICK`` with changes."""
    return QUICK.model_copy(update=changes)


def grower(
    host: Host, optimizer: torch.optim.Optimizer, probe: Sequence[Any], validation: Sequence[Any], **options: Any
) -> Grower:
    """A grower that acts by order only and on short settings, unless ``options`` say otherwise."""
    chosen = {"controller": Silent(), "settings": QUICK, "loss_fn": LOSS} | options
    return Grower(host, optimizer, chosen.pop("loss_fn"), probe=probe, validation=validation, **chosen)


def catalogue_source(widths: Sequence[int] = (4,), seed: int = 0) -> CatalogueSource:
    return CatalogueSource(widths, seed, KernelCache())


def offer(source: Any, interface: SlotInterface, blueprint: str = "bottleneck_mlp") -> KernelCandidate:
    """The source's first kernel of that blueprint."""
    return next(c for c in source.candidates(interface) if c.blueprint_name == blueprint)


def germinate(subject: Grower, slot: str, blueprint: str = "bottleneck_mlp", **changes: Any) -> Command:
    """Order the blueprint's kernel into the slot; the order is returned."""
    kernel = offer(subject.source, subject.plot.host.slots[slot].interface, blueprint)
    command = order(slot, State.GERMINATED, kernel_id=kernel.kernel_id, **changes)
    subject.command(command)
    return command


def order(slot: str, target: State, **changes: Any) -> Command:
    """A person's command."""
    values = {"command_id": new_id(), "run_id": "local", "issued_by": "operator"} | changes
    return Command(slot=slot, target=target, **values)


def moves(report: BoundaryReport) -> list[tuple[str, State, State]]:
    """(slot, from, to) of every event."""
    return [(event.slot, event.source, event.target) for event in report.events]


class Late(CatalogueSource):
    """A catalogue whose kernels are on their way, once they have been asked for, as long as it is not ``open``."""

    def __init__(self, is_open: bool = False, widths: Sequence[int] = QUICK.widths) -> None:
        super().__init__(widths, 0, KernelCache())
        self.open = is_open
        self.asked: list[str] = []

    def request(self, kernel_id: str, interface: SlotInterface) -> None:
        super().request(kernel_id, interface)
        self.asked.append(kernel_id)

    def poll(self, kernel_id: str) -> LoadedKernel | None:  # type: ignore[override]
        return super().poll(kernel_id) if self.open and kernel_id in self.asked else None


class Given:
    """A source with one kernel of one's own making, there at once."""

    def __init__(self, kernel: LoadedKernel | Exception | None) -> None:
        self.kernel = kernel
        self.asked: list[str] = []

    def candidates(self, interface: SlotInterface) -> tuple[KernelCandidate, ...]:
        return ()

    def request(self, kernel_id: str, interface: SlotInterface) -> None:
        self.asked.append(kernel_id)

    def poll(self, kernel_id: str) -> LoadedKernel | None:
        if isinstance(self.kernel, Exception):
            raise self.kernel
        return self.kernel


def held(optimizer: torch.optim.Optimizer) -> list[int]:
    """Identities of the parameters that the optimiser trains."""
    return [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]


def owned(module: nn.Module) -> list[int]:
    """Identities of the module's parameters."""
    return [id(parameter) for parameter in module.parameters()]


class Run:
    """A whole training run: data, host, optimiser and grower, deterministic in its seed.

    Args:
        family: of hosts.
        rule: makes the optimiser from parameters.
        options: for ``grower``.
    """

    def __init__(
        self,
        family: str = "mlp",
        rule: Callable[[Any], torch.optim.Optimizer] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.family = family
        self.host = wrapped(family, make(family, seed))
        self.optimizer = (rule or (lambda parameters: torch.optim.Adam(parameters, 1e-2)))(self.host.parameters())
        self.data = batches(family, 8, seed=11)
        self.grower = grower(self.host, self.optimizer, self.data[:4], batches(family, 8, seed=12), **options)
        self.events: list[SeedEvent] = []
        self.refused: list[tuple[Command, str]] = []
        self.rolled_back: list[int] = []

    def epoch(self, number: int, loss: float | None = None) -> BoundaryReport:
        """Train on all data in an order of that epoch's, then the boundary; ``loss`` is told instead of the true one."""
        torch.manual_seed(number)
        order = torch.randperm(len(self.data)).tolist()
        losses = train(self.host.train(), self.optimizer, [self.data[index] for index in order])
        report = self.grower.step(number, sum(losses) / len(losses) if loss is None else loss)
        self.events += report.events
        self.refused += report.refused
        if report.rolled_back:
            self.rolled_back.append(number)
        return report

    def epochs(self, start: int, stop: int) -> None:
        for number in range(start, stop):
            self.epoch(number)

    def until(self, state: State, slot: str, start: int = 0, limit: int = 30) -> int:
        """Run until the slot's seed has come to ``state``; the next epoch's number."""
        for number in range(start, limit):
            if any(event.slot == slot and event.target is state for event in self.epoch(number).events):
                return number + 1
        raise AssertionError(f"{slot} never came to {state.name}: {[state.name for state in self.path(slot)]}")

    def seed(self, slot: str) -> Seed:
        return next(seed for seed in self.grower.seeds if seed.slot == slot)

    def path(self, slot: str) -> list[State]:
        """States that the slot's seeds went through, the first one included."""
        events = [event for event in self.events if event.slot == slot]
        return [events[0].source, *(event.target for event in events)] if events else []


def blended(target: State = State.GRAFTING, slot: str = "2:4", **options: Any) -> tuple[Run, int]:
    """A run whose seed has just come to ``target``, and the next epoch."""
    run = Run(seed=1, **options)
    run.epochs(0, 6)
    germinate(run.grower, slot)
    return run, run.until(target, slot, 6)
