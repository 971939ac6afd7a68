"""The grower: call ``step`` once per epoch and a network grows where it pays.

    measure ──► decide ──► command ──► GERMINATED ► LOADING ► TRAINING ► GRAFTING ► … ──► folded, culled or rolled back

Drives the seeds of one run through their lifecycle inside anyone's own training loop. Knows no network: who decides and where
kernels come from are the two roles of ``roles``. Everything happens in ``step``, between epochs; a training step runs none of this.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from esper_core.control import resume
from esper_core.control.awaited import Awaited
from esper_core.control.boundary import Boundary, BoundaryReport
from esper_core.control.governor import Governor
from esper_core.control.harvest import GrowthReport, harvest
from esper_core.control.heuristic import HeuristicController
from esper_core.control.ledger import Ledger
from esper_core.control.packet import (
    Budget,
    Command,
    SeedEvent,
)
from esper_core.control.plot import Plot
from esper_core.control.roles import Controller, KernelSource
from esper_core.control.seed import Seed
from esper_core.control.settings import GrowthSettings
from esper_core.control.source import CatalogueSource
from esper_core.control.stages import STAGES
from esper_core.control.survey import Survey
from esper_core.errors import Conflict, EsperError, InvalidInput
from esper_core.lifecycle import BLENDED, IN_FLIGHT, State, check
from esper_core.nn.cache import KernelCache
from esper_core.nn.host import Host
from esper_core.nn.probe import Batch, LossFunction


class Grower:
    """Grows ``host`` while it trains.

    Args:
        host: from ``esper.wrap``.
        optimizer: over ``host.parameters()``; kernels join the group of the layer they span.
        loss_fn: (outputs, targets) → mean loss over the batch.
        probe: training batches for signals, 1024 samples or more, as a list.
        validation: held-back batches that judge grafts, as a list.
        budget: parameters that may be added in all.
        settings: every constant.
        controller: who decides; the heuristic policy when None.
        source: where kernels come from; the built-in catalogue when None.
        run_id: names the run in events.
        seed: of everything random in growing; the global random state is never touched.
    """

    def __init__(
        self,
        host: Host,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFunction,
        *,
        probe: Sequence[Batch],
        validation: Sequence[Batch],
        budget: Budget | None = None,
        settings: GrowthSettings | None = None,
        controller: Controller | None = None,
        source: KernelSource | None = None,
        run_id: str = "local",
        seed: int = 0,
    ) -> None:
        self.settings = settings or GrowthSettings()
        self.plot = Plot(host, optimizer, loss_fn, probe, validation, self.settings, seed)
        self.budget = budget or Budget()
        self.run_id = run_id
        self.controller = controller or HeuristicController(self.settings.policy)
        self.source = source or CatalogueSource(self.settings.widths, seed, KernelCache(self.settings.cache_bytes))
        self.governor = Governor(self.settings.governor)
        self.survey = Survey(self.plot)
        self._restored = False
        self._awaited = Awaited(self.plot, self.source)
        self._ledger = Ledger({name: Seed(run_id, name) for name in host.slots}, host.parameter_count)

    @property
    def seeds(self) -> tuple[Seed, ...]:
        """The present seed of every slot, in slot order."""
        return tuple(self._ledger.seeds.values())

    @property
    def busy(self) -> bool:
        """Whether a graft is in flight, from its order to its last judgement."""
        return any(seed.state in IN_FLIGHT for seed in self.seeds)

    @property
    def added_parameters(self) -> int:
        """Host and blended kernels against the host at the start."""
        return self.plot.parameters - self._ledger.initial_parameters

    def alpha(self, slot: str) -> float:
        """The slot's blend factor; 0 without a kernel."""
        graft = self.plot.host.slots[slot].graft
        return float(graft.alpha) if graft is not None else 0.0

    def command(self, command: Command) -> None:
        """Take an order; it is obeyed once, at the next ``step``."""
        self._ledger.waiting.append(command)

    def step(
        self,
        epoch: int,
        train_loss: float | None = None,
        validation_loss: float | None = None,
        validation_accuracy: float | None = None,
    ) -> BoundaryReport:
        """The epoch boundary: watch, move seeds, measure, decide, command.

        Args:
            epoch: the one just finished, from 0.
            train_loss: its mean; measured on the probe when None.
            validation_loss, validation_accuracy: told to the controller.
        """
        began = time.perf_counter()
        self._awaited.look(self._ledger.seeds)
        loss = self.survey.loss() if train_loss is None else train_loss
        self.survey.hear(loss)
        events: list[SeedEvent] = self._govern(epoch, loss)
        self._restored = False
        now = Boundary(
            self.plot, self.source, self.governor, epoch, loss, self._keep_snapshot, self._left_for, self._alone
        )
        for seed in list(self._ledger.seeds.values()):
            events += self._advance(seed, now)
        moved = time.perf_counter()
        if self._graft_free() and self.survey.due(epoch):  # otherwise nothing could come of it
            self.survey.measure(epoch)
        measured = time.perf_counter()
        signal = None
        if self.survey.fresh(epoch):
            packet = self.survey.packet(
                self._ledger.seeds,
                self.run_id,
                epoch,
                loss,
                validation_loss,
                validation_accuracy,
                self._left(),
                self.source,
            )
            signal = self.controller.decide(packet)
        decided = time.perf_counter()
        for action in signal.actions if signal else ():
            self.command(action.command)
        refused: list[tuple[Command, str]] = []
        while self._ledger.waiting:
            self._obey(self._ledger.waiting.popleft(), now, events, refused)
        rolled_back = self._restored or any(event.target is State.ROLLED_BACK for event in events)
        return BoundaryReport(
            events=tuple(events),
            signal=signal,
            health=self.survey.health(self._ledger.seeds, epoch),
            reports=tuple(self._ledger.close(event) for event in events if event.target in _ENDS),
            refused=tuple(refused),
            seconds={"stages": moved - began, "measure": measured - moved, "decide": decided - measured},
            rolled_back=rolled_back,
        )

    def finish(self) -> tuple[nn.Module, GrowthReport]:
        """Fold what can be folded, drop what is unfinished, and hand back the plain network with a report."""
        return harvest(self.plot, self._ledger)

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs, host and optimiser included: tensors and plain values in dicts and lists."""
        return resume.save(self.plot, self._ledger, self.survey, self.governor)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where ``state_dict`` was taken, on a freshly built host and optimiser.

        Raises:
            Corrupt: when the state is not of this host.
        """
        resume.load(state, self.plot, self._ledger, self.survey, self.governor)
        for seed in self.seeds:
            if seed.state is State.LOADING:  # what the source was asked for, this process never asked
                self.source.request(seed.kernel_id, self.plot.host.slots[seed.slot].interface)
        self._awaited.expect(self._ledger.seeds)
        self._awaited.look(self._ledger.seeds)

    def _govern(self, epoch: int, loss: float) -> list[SeedEvent]:
        """Throw every blended graft out when the loss, the host or a kernel says so."""
        blended = [seed for seed in self._ledger.seeds.values() if seed.state in BLENDED]
        reason = self.governor.observe(loss)
        if not blended:
            return []
        if not reason and not self.plot.finite():
            reason = "a host parameter is not finite"
        for seed in blended:
            graft = self.plot.host.slots[seed.slot].graft
            if not reason and graft is not None and graft.errors > self.settings.kernel_faults:
                reason = f"the kernel failed {graft.errors} forward passes"
        return [self._roll_back(seed, epoch, reason) for seed in blended] if reason else []

    def _roll_back(self, seed: Seed, epoch: int, reason: str, command_id: str = "") -> SeedEvent:
        event = seed.advance(State.ROLLED_BACK, epoch, reason, command_id=command_id)
        self._after_rollback(seed, epoch)
        return event

    def _after_rollback(self, seed: Seed, epoch: int) -> None:
        """Host and optimiser as they were before the graft; that blueprint never comes back to this slot."""
        self.plot.uproot(self.plot.host.slots[seed.slot])
        younger = [*self._ledger.snapshots]
        younger = younger[younger.index(seed.slot) + 1 :]
        self.plot.restore(self._ledger.snapshots.pop(seed.slot))
        self._renew_snapshots(younger)
        self.governor.forgive()
        self._embargo(seed, epoch)
        seed.barred.add(seed.blueprint_id)

    def _advance(self, seed: Seed, now: Boundary) -> list[SeedEvent]:
        """One stage for a seed in flight, the end of the embargo for one that rests."""
        slot = self.plot.host.slots[seed.slot]
        if seed.state in (State.CULLED, State.ROLLED_BACK):
            if now.epoch < seed.embargo_until:
                return []
            event = seed.advance(State.DORMANT, now.epoch, "the embargo is over", facts={"embargo_over": True})
            self._ledger.seeds[seed.slot] = seed.reborn()
            return [event]
        if seed.state not in IN_FLIGHT:
            return []
        events: list[SeedEvent] = []
        while seed.state in IN_FLIGHT and (moved := STAGES[seed.state](seed, slot, now)) is not None:
            self._settle(seed, moved)
            events.append(moved)
            if seed.state not in _PREPARING:
                break
        return events

    def _settle(self, seed: Seed, event: SeedEvent) -> None:
        """What an ending leaves behind."""
        slot = self.plot.host.slots[seed.slot]
        if event.target is State.CULLED:
            self.plot.uproot(slot)
            self._after_cull(seed)
            self._embargo(seed, event.epoch)
        elif event.target is State.ROLLED_BACK:
            self._after_rollback(seed, event.epoch)
        elif event.target is State.FOSSILIZED:
            self.survey.forget()
            if seed.fold_difference is not None:
                self._ledger.fold_differences.append(seed.fold_difference)
                self._renew_snapshots([name for name in self._ledger.snapshots if name != seed.slot])
        if event.target in _ENDS:
            self._ledger.snapshots.pop(seed.slot, None)

    def _after_cull(self, seed: Seed) -> None:
        """A graft that failed must not leave the host worse than it found it: the better of then and now, by the probe's loss.

        By the loss that training lowers: the held-back one may rise meanwhile for reasons that are not the graft's. With other
        grafts blended the host stays as it is, since they have learnt with it.
        """
        snapshot = self._ledger.snapshots.pop(seed.slot, None)
        if snapshot is None or not self._alone(seed):
            return
        now, kept = self.survey.loss(), self.plot.snapshot()
        self.plot.restore(snapshot)
        if now <= self.survey.loss():
            self.plot.restore(kept)
        else:
            self._restored = True

    def _renew_snapshots(self, slots: list[str]) -> None:
        """The host changed otherwise than by training: for grafts blended before that, the way back is from now."""
        for name in slots:
            self._ledger.snapshots[name] = self.plot.snapshot()

    def _embargo(self, seed: Seed, epoch: int) -> None:
        seed.failures += 1
        seed.embargo_until = epoch + self.settings.embargo_epochs * 2 ** min(seed.failures - 1, 10)
        self.survey.forget()

    def _keep_snapshot(self, seed: Seed) -> None:
        self._ledger.snapshots[seed.slot] = self.plot.snapshot()

    def _alone(self, seed: Seed) -> bool:
        """Whether no other graft is blended."""
        return not any(other.state in BLENDED for other in self.seeds if other is not seed)

    def _graft_free(self) -> bool:
        """Whether another graft may be under way."""
        return sum(seed.state in IN_FLIGHT for seed in self.seeds) < self.settings.policy.in_flight

    def _left(self) -> Budget:
        limit = self.budget.parameters
        grown = self.added_parameters
        # Kernels that are on their way or learning count as if they were blended.
        grown += sum(seed.parameters for seed in self.seeds if seed.state in IN_FLIGHT - BLENDED)
        left = None if limit is None else max(0, limit - grown)
        return Budget(parameters=left, adaptations=self.budget.adaptations)

    def _left_for(self, seed: Seed) -> int | None:
        left = self._left().parameters
        return None if left is None else left + seed.parameters

    def _obey(
        self, command: Command, now: Boundary, events: list[SeedEvent], refused: list[tuple[Command, str]]
    ) -> None:
        """Apply a command once; one that cannot be obeyed is answered, not raised: the run goes on."""
        if command.command_id in self._ledger.applied:
            return
        self._ledger.applied.append(command.command_id)
        try:
            events.append(self._apply(command, now.epoch))
        except EsperError as problem:
            refused.append((command, f"{problem.message}{f' ({problem.hint})' if problem.hint else ''}"))
            return
        if events[-1].target is State.GERMINATED:
            events += self._advance(self._ledger.seeds[command.slot], now)

    def _apply(self, command: Command, epoch: int) -> SeedEvent:
        self.plot.host.slot(command.slot)
        seed = self._ledger.seeds[command.slot]
        if command.target is State.ROLLED_BACK:
            return self._roll_back(seed, epoch, command.reason or "ordered", command.command_id)
        if command.target is State.CULLED:
            if seed.state in BLENDED - {State.EVALUATING, State.FINE_TUNING}:
                raise Conflict(
                    f"seed in {command.slot} is {seed.state.name}", hint="ROLLED_BACK undoes a graft on its way in"
                )
            event = seed.advance(State.CULLED, epoch, command.reason or "ordered", command_id=command.command_id)
            self._settle(seed, event)
            return event
        if command.target is not State.GERMINATED:
            raise InvalidInput(
                f"{command.target.name} cannot be ordered",
                hint="order GERMINATED, CULLED or ROLLED_BACK; the rest follows",
            )
        return self._germinate(seed, command, epoch)

    def _germinate(self, seed: Seed, command: Command, epoch: int) -> SeedEvent:
        slot = self.plot.host.slots[seed.slot]
        offers = {offer.kernel_id: offer for offer in self.source.candidates(slot.interface)}
        offer = offers.get(command.kernel_id)
        left = self._left().parameters
        facts = {
            # What the platform offers was validated there; its signatures are checked when it arrives.
            "kernel_validated": bool(command.kernel_id),
            "kernel_fits": not offers or offer is not None,
            "not_embargoed": epoch >= seed.embargo_until,
            "within_budget": left is None or offer is None or offer.cost(slot.unit_parameters) <= left,
            "graft_free": self._graft_free(),
        }
        check(seed.state, State.GERMINATED, facts)
        seed.kernel_id, seed.style = command.kernel_id, command.style
        seed.command_id, seed.germinated_epoch = command.command_id, epoch
        if offer is not None:
            seed.blueprint_id, seed.blueprint_name = offer.blueprint_id, offer.blueprint_name
            seed.parameters = offer.parameters
        return seed.advance(
            State.GERMINATED, epoch, command.reason or "ordered", facts=facts, command_id=command.command_id
        )


_PREPARING = frozenset({State.GERMINATED, State.LOADING, State.TRAINING})
"""While the host knows nothing of a kernel, a seed need not wait for an epoch to take the next step."""
_ENDS = (State.FOSSILIZED, State.CULLED, State.ROLLED_BACK)
