"""Carving in a run: Tolaria carries out what is planned, at the boundaries at which a checkpoint is written and at no other."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from esper_core.control.carve.carver import Carver
from esper_core.control.carve.papers import CarveOrder, CarveReport
from esper_core.log import get
from services.tolaria.history import Figures

log = get(__name__)


class Sculpting:
    """A run's carver with what it needs of the run.

    Args:
        carver: over the run's host and optimiser.
        orders: gives the orders that came since it was last called.
        every: epochs from one checkpoint to the next.
        epochs: of the whole run; at its end, what is on trial wakes.
    """

    def __init__(self, carver: Carver, orders: Callable[[], Iterable[CarveOrder]], every: int, epochs: int) -> None:
        self.carver = carver
        self._orders = orders
        self._every, self._epochs = every, epochs

    def boundary(self, figures: Figures, busy: bool) -> CarveReport:
        """Do what is due at an epoch's end.

        Between checkpoints nothing is begun and nothing taken out, but units whose absence does harm wake.

        Args:
            busy: whether a graft is in flight.
        """
        last = figures.epoch + 1 == self._epochs
        kept = last or (figures.epoch + 1) % self._every == 0
        for order in self._orders() if kept else ():
            self.carver.order(order)
        report = self.carver.step(
            figures.epoch, figures.validation_loss, figures.validation_accuracy, busy=busy or not kept
        )
        if last:
            report = report.model_copy(update={"events": (*report.events, *self.carver.finish(figures.epoch).events)})
        for event in report.events:
            log.info("carved", plan_id=event.plan_id, state=event.state.name, reason=event.reason)
        return report
