"""The carver: call ``step`` once per epoch and what a network no longer needs is taken out of it.

    measure ──► propose ──► confirm ──► silence ──► observe ──► take out, or wake

Everything happens in ``step``, between epochs, and one plan at a time. Whether units go is decided by what the network does without
them while it trains on, never by the proposal alone. Knows no network: proposals may come from the rules here or, as orders, from
anywhere.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from esper_core.control.carve.fossils import Fossils
from esper_core.control.carve.papers import (
    Act,
    CarveEvent,
    CarveOrder,
    CarveReport,
    CarveSurvey,
    Cut,
    PlanState,
)
from esper_core.control.carve.rules import propose
from esper_core.control.carve.settings import CarveSettings
from esper_core.control.carve.surveying import Eye, held_back
from esper_core.control.carve.trial import Standards, Trial, Ward, halved
from esper_core.errors import Conflict, Corrupt, EsperError, Exhausted, InvalidInput
from esper_core.nn.counterfactual import missed
from esper_core.nn.host import Host
from esper_core.nn.probe import Batch, LossFunction

VERSION = 1
REMEMBERED_ORDERS = 1024
REASON = 500
"""Characters of a reason."""


class Carver:
    """Carves ``host`` while it trains.

    Args:
        host: from ``esper.wrap``.
        optimizer: over ``host.parameters()``; what it remembers of the parameters that stay is carried along.
        loss_fn: (outputs, targets) → mean loss over the batch.
        probe: training batches to measure importance on, as a list.
        validation: held-back batches that judge, as a list.
        settings: every constant; ``enabled`` is the caller's business.
        autonomous: whether to follow the rules here; the settings' own word when None.
        run_id: names the run in events.
    """

    def __init__(
        self,
        host: Host,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFunction,
        *,
        probe: Sequence[Batch],
        validation: Sequence[Batch],
        settings: CarveSettings | None = None,
        autonomous: bool | None = None,
        run_id: str = "local",
    ) -> None:
        self.settings = settings or CarveSettings()
        self.host, self.optimizer, self.loss_fn = host, optimizer, loss_fn
        self.validation, self.run_id = validation, run_id
        self.autonomous = self.settings.autonomous if autonomous is None else autonomous
        self.eye = Eye(host, loss_fn, probe, self.settings, run_id)
        self.fossils = Fossils(host.model)
        self.trial: Trial | None = None
        self.failures = 0
        self.freed = 0
        self.removed: list[str] = []
        self.ended = ""
        self._plans = 0
        self._initial: int | None = None
        self._reference: Standards | None = None
        self._waiting: deque[CarveOrder] = deque()
        self._applied: deque[str] = deque(maxlen=REMEMBERED_ORDERS)

    def order(self, order: CarveOrder) -> None:
        """Take an order; it is obeyed once, at the next ``step``."""
        self._waiting.append(order)

    def step(
        self, epoch: int, loss: float | None = None, accuracy: float | None = None, busy: bool = False
    ) -> CarveReport:
        """The epoch boundary: judge what is silenced, obey orders, measure, propose, silence.

        Args:
            epoch: the one just finished, from 0.
            loss, accuracy: held-back; measured when no loss is given.
            busy: whether a graft is in flight: nothing is then silenced or taken out.
        """
        now = held_back(self.host, self.validation, self.loss_fn) if loss is None else Standards(loss, accuracy)
        self.fossils.look(self.host.model)
        events = self._judge(epoch, now, busy)
        while self._waiting:
            order = self._waiting.popleft()
            if order.order_id not in self._applied:
                self._applied.append(order.order_id)
                events.append(self._obey(order, epoch, now, busy))
        survey = None
        calm = not busy and not self.ended and not any(event.state is PlanState.WOKEN for event in events)
        if self.trial is None and calm and self._due(epoch) and math.isfinite(now.loss):
            survey = self._survey(epoch, now)
            if self.autonomous and not survey.obstacle:
                events += self._by_the_rules(survey, epoch, now)
        return CarveReport(events=tuple(events), survey=survey)

    def finish(self, epoch: int) -> CarveReport:
        """The end of training: units that are still on trial wake, since nothing is proven about them."""
        if self.trial is None:
            return CarveReport()
        return CarveReport(
            events=(self._wake(self.trial, epoch, "training ended before they were proven dispensable", None),)
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs besides host and optimiser: tensors and plain values in dicts and lists."""
        reference = self._reference
        return {
            "version": VERSION,
            "trial": self.trial.state_dict() if self.trial else None,
            "failures": self.failures,
            "freed": self.freed,
            "removed": list(self.removed),
            "ended": self.ended,
            "plans": self._plans,
            "initial": self._initial,
            "reference": [reference.loss, reference.accuracy] if reference else None,
            "waiting": [order.model_dump(mode="json") for order in self._waiting],
            "applied": list(self._applied),
            "fossils": self.fossils.state_dict(),
            "barred": dict(self.eye.barred),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where ``state_dict`` was taken, on a host and an optimiser that have been loaded already.

        Raises:
            Corrupt: the state is of another version or another host.
        """
        if state.get("version") != VERSION:
            raise Corrupt(f"carving state has version {state.get('version')}, this build reads {VERSION}")
        self.failures, self.freed, self.ended = state["failures"], state["freed"], state["ended"]
        self.removed, self._plans, self._initial = list(state["removed"]), state["plans"], state["initial"]
        self._reference = Standards(*state["reference"]) if state["reference"] else None
        self._waiting = deque(CarveOrder.model_validate(order) for order in state["waiting"])
        self._applied = deque(state["applied"], maxlen=REMEMBERED_ORDERS)
        self.fossils.load_state_dict(state["fossils"])
        self.eye.barred = dict(state["barred"])
        self.eye.forget()
        try:
            self.trial = Trial.from_state_dict(state["trial"], self._warded) if state["trial"] else None
        except EsperError as problem:
            raise Corrupt(f"the units on trial are not this host's: {problem.message}") from None

    def _judge(self, epoch: int, now: Standards, busy: bool) -> list[CarveEvent]:
        """What becomes of the units on trial at this boundary."""
        trial, limits = self.trial, self.settings
        if trial is None:
            return []
        if worse := trial.before.failed_by(now, limits.max_accuracy_drop, limits.max_loss_rise):
            return [self._fail(trial, epoch, worse, now)]
        assert self._reference is not None  # noqa: S101
        if worse := self._reference.failed_by(now, limits.max_accuracy_drop, limits.max_loss_rise):
            self.ended = f"all plans together, {worse}"
            return [self._wake(trial, epoch, self.ended, now)]
        if epoch - trial.epoch < limits.observe_epochs or busy:
            return []
        try:
            return [self._remove(trial, epoch, now)]
        except EsperError as problem:
            self.eye.barred |= {cut.cluster: problem.message for cut in trial.ward.cuts}
            return [self._fail(trial, epoch, problem.message, now)]

    def _remove(self, trial: Trial, epoch: int, now: Standards) -> CarveEvent:
        """Take the units on trial out for good, compared on held-back rows."""
        trial.ward.silence(False)
        # Anew: a fold may have widened what the units stand in. Awake: a mask knows nothing of a unit that goes on trial.
        flops = self.eye.anatomy(fresh=True).flops
        trial.ward = ward = self._warded(trial.ward.cuts)
        ward.silence(True)
        removed = ward.remove(self.eye.rows(self.validation))
        for sedation in ward.sedations:
            self.fossils.removed(sedation.cluster, sedation.units)
        self.freed += removed.parameters
        self.removed.append(trial.plan_id)
        self.trial = None
        smaller = self.eye.anatomy(fresh=True)
        lasted = f"silenced for {epoch - trial.epoch} epochs without harm"
        return self._event(trial, epoch, PlanState.REMOVED, lasted, now).model_copy(
            update={
                "parameters": removed.parameters,
                "flops": flops - smaller.flops,
                "difference": removed.difference,
                "left_parameters": self._parameters(),
            }
        )

    def _fail(self, trial: Trial, epoch: int, reason: str, now: Standards) -> CarveEvent:
        self.failures += 1
        if self.failures >= self.settings.failures:
            self.ended = f"{self.failures} plans failed"
        return self._wake(trial, epoch, reason, now)

    def _wake(self, trial: Trial, epoch: int, reason: str, now: Standards | None, order_id: str = "") -> CarveEvent:
        trial.ward.wake(trial.kept)
        self.trial = None
        event = self._event(trial, epoch, PlanState.WOKEN, reason, now)
        return event.model_copy(update={"order_id": order_id}) if order_id else event

    def _obey(self, order: CarveOrder, epoch: int, now: Standards, busy: bool) -> CarveEvent:
        """An order that cannot be obeyed is answered, not raised: the run goes on."""
        try:
            if order.act is Act.WAKE:
                return self._wake_ordered(order, epoch, now)
            if busy:
                raise Conflict("a graft is in flight", hint="order it again when the graft has ended")
            if not math.isfinite(now.loss):
                raise Conflict("the held-back loss is not finite")
            self._ready()
            self.eye.look()
            return self._sedate(order.plan_id, order.order_id, order.cuts, order.reason or "ordered", epoch, now)
        except EsperError as problem:
            return CarveEvent(
                run_id=self.run_id,
                plan_id=order.plan_id,
                order_id=order.order_id,
                epoch=epoch,
                state=PlanState.REFUSED,
                cuts=order.cuts,
                reason=f"{problem.message}{f' ({problem.hint})' if problem.hint else ''}"[:REASON],
                left_parameters=self._parameters(),
            )

    def _wake_ordered(self, order: CarveOrder, epoch: int, now: Standards) -> CarveEvent:
        if order.plan_id in self.removed:
            raise Conflict(
                f"the units of {order.plan_id} are gone for good",
                hint="start again from a checkpoint of before, or carve a copy next time: `esperctl carve copy`",
            )
        if self.trial is None or self.trial.plan_id != order.plan_id:
            raise Conflict(f"no units are on trial for {order.plan_id}", hint="`esperctl carve show PLAN`")
        return self._wake(self.trial, epoch, order.reason or "ordered", now, order.order_id)

    def _by_the_rules(self, survey: CarveSurvey, epoch: int, now: Standards) -> list[CarveEvent]:
        proposal = propose(survey)
        if proposal is None:
            return []
        self._plans += 1
        plan = f"{self.run_id}/{self._plans}"
        try:
            return [self._sedate(plan, "", proposal.cuts, "worth the least per parameter", epoch, now)]
        except EsperError as problem:
            event = CarveEvent(run_id=self.run_id, plan_id=plan, epoch=epoch, state=PlanState.REFUSED)
            return [event.model_copy(update={"cuts": proposal.cuts, "reason": problem.message[:REASON]})]

    def _ready(self) -> None:
        """Raises Conflict when carving has ended or another plan is under way."""
        if self.ended:
            raise Conflict(f"carving has ended for this run: {self.ended}")
        if self.trial is not None:
            raise Conflict(f"plan {self.trial.plan_id} is under way", hint="wait until it has been judged")

    def _sedate(
        self, plan: str, order_id: str, cuts: tuple[Cut, ...], reason: str, epoch: int, now: Standards
    ) -> CarveEvent:
        """Silence what the counterfactual confirms of a plan.

        Raises:
            Conflict: not even one unit is confirmed, or a cluster has an obstacle.
            Exhausted: the plan exceeds the budget.
            NotFound, InvalidInput: the plan is not of this network as it stands.
        """
        self._begin()
        if self._reference is None or now.better_than(self._reference):
            self._reference = now
        ward, upper = self._confirmed(cuts, self._room(now))
        change = self.eye.worths.change(ward.cuts)
        self.trial = Trial(plan, order_id, ward, epoch, now, change, upper, ward.keep())
        ward.silence(True)
        grown = sum(len(self.fossils.of(s.cluster) & s.units) for s in ward.sedations) + len(ward.kernels)
        note = f"{reason}; {grown} of them had been grown" if grown else reason
        return self._event(self.trial, epoch, PlanState.SEDATED, note, now)

    def _confirmed(self, cuts: tuple[Cut, ...], room: float) -> tuple[Ward, float]:
        """The part of a plan without which the held-back loss surely rises no further than ``room``, and the bound of that rise."""
        if not cuts:
            raise InvalidInput("the order names no units")
        least = math.inf
        for _ in range(self.settings.halvings + 1):
            ward = self._warded(cuts)
            cost = self.eye.cost(cuts)
            if cost > self.left():
                raise Exhausted(
                    f"the plan frees {cost} parameters, {self.left()} may still go in this run",
                    hint="raise morphogenetic.carve.budget_share, or ask for less",
                )
            upper = missed(self.host, ward.silence, self.validation, self.loss_fn).upper
            if upper <= room:
                return ward, upper
            least = min(least, upper)
            cuts = halved(cuts, self.eye.worths.importance)
            if not cuts:
                break
        raise Conflict(f"held-back loss could rise by {least:.3g} without the units, more than {room:.3g}")

    def left(self) -> int:
        """Parameters that may still be freed in this run."""
        initial = self._parameters() if self._initial is None else self._initial
        return max(0, int(self.settings.budget_share * initial) - self.freed)

    def _survey(self, epoch: int, now: Standards) -> CarveSurvey:
        self._begin()
        self.eye.look()
        return self.eye.survey(epoch, now, self._room(now), self.left(), self.fossils)

    def _room(self, now: Standards) -> float:
        """Loss that one plan may cost at first; half of it after every plan that failed."""
        return (self.settings.loss_share * now.loss + self.settings.loss_floor) * 0.5**self.failures

    def _begin(self) -> None:
        """What the budget is measured against, noted once."""
        if self._initial is None:
            self._initial = self._parameters()

    def _due(self, epoch: int) -> bool:
        waited = epoch - self.settings.warmup_epochs
        return waited >= 0 and waited % self.settings.measure_every == 0

    def _warded(self, cuts: Sequence[Cut]) -> Ward:
        return Ward(self.host, self.optimizer, self.eye.anatomy(), cuts)

    def _parameters(self) -> int:
        return self.eye.parameters

    def _event(self, trial: Trial, epoch: int, state: PlanState, reason: str, now: Standards | None) -> CarveEvent:
        known = now if now is not None and math.isfinite(now.loss) else None
        return CarveEvent(
            run_id=self.run_id,
            plan_id=trial.plan_id,
            order_id=trial.order_id,
            epoch=epoch,
            state=state,
            cuts=trial.ward.cuts,
            reason=reason[:REASON],
            expected_change=trial.expected,
            upper_change=trial.upper,
            accuracy_before=trial.before.accuracy,
            accuracy=known.accuracy if known else None,
            loss_before=trial.before.loss,
            loss=known.loss if known else None,
            left_parameters=self._parameters(),
        )
