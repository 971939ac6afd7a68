"""The heuristic policy: grow where the residual gradient, twice in a row and surely, says that it pays; otherwise wait.

Pure: the same packet gives the same actions. Where: gain × share per added parameter. Whether: health and confidence past their
thresholds in the last two evaluations, or a layer that is wholly dead; and never a run that is about to solve its task by itself.
How much: the cheapest kernel that covers most of the singular spectrum, within budget. When every signal is mute because whole
layers are dead, slots take turns.
"""

from __future__ import annotations

from dataclasses import dataclass

from esper_core.blueprint.interface import canonical_json
from esper_core.control.packet import (
    AdaptationAction,
    AdaptationSignal,
    Command,
    GrowthSignal,
    KernelCandidate,
    Reason,
    ReasonCode,
    SlotState,
    SystemStatePacket,
)
from esper_core.control.settings import HeuristicSettings
from esper_core.ids import new_id, sha256
from esper_core.lifecycle import IN_FLIGHT, State

ALIKE = 0.8
"""Share of the best slot's worth from which another counts as equally good."""
PACE_EPOCHS = 2
"""Epochs over which the pace of training is taken."""


@dataclass(frozen=True)
class Choice:
    """A slot worth growing and the kernel for it."""

    slot: SlotState
    kernel: KernelCandidate
    expected_gain: float
    confidence: float
    reasons: tuple[Reason, ...]


class HeuristicPolicy:
    """Decides on packets.

    Args:
        settings: thresholds and caps.
        issued_by: principal named on the commands.
    """

    def __init__(self, settings: HeuristicSettings | None = None, issued_by: str = "tamiyo") -> None:
        self.settings = settings or HeuristicSettings()
        self.issued_by = issued_by
        self.version = f"heuristic-{sha256(canonical_json(self.settings.model_dump(mode='json')))[:12]}"

    def decide(self, packet: SystemStatePacket) -> AdaptationSignal:
        """Actions and abstentions for an epoch; never more than the settings and the packet's budget allow."""
        choices, abstentions = self._choose(packet)
        return AdaptationSignal(
            decision_id=new_id(),
            run_id=packet.run_id,
            epoch=packet.epoch,
            policy_version=self.version,
            actions=tuple(self._action(packet, choice) for choice in choices),
            abstentions=tuple(abstentions),
        )

    def _choose(self, packet: SystemStatePacket) -> tuple[list[Choice], list[Reason]]:
        if on_its_way := self._on_its_way(packet):
            return [], [on_its_way]
        busy = sum(slot.state in IN_FLIGHT for slot in packet.slots)
        room = min(self.settings.adaptations_per_epoch, packet.budget.adaptations, self.settings.in_flight - busy)
        if busy >= self.settings.in_flight:
            return [], [
                Reason(code=ReasonCode.GRAFT_IN_FLIGHT, detail="one graft at a time keeps credit clear", value=busy)
            ]
        if room <= 0:
            return [], [Reason(code=ReasonCode.NO_BUDGET, detail="no adaptation left for this epoch", value=room)]
        open_slots = [slot for slot in packet.slots if slot.state is State.DORMANT]
        abstentions: list[Reason] = []
        if _mute(open_slots):
            ranked = _turns(packet.epoch, open_slots)
        else:
            ranked, abstentions = self._rank(packet.epoch, open_slots)
        choices: list[Choice] = []
        left = packet.budget.parameters
        alike = _alike([slot for slot, _ in ranked[:room]])
        for slot, reasons in ranked:
            if len(choices) == room:
                break
            # Where several places are about equally good, a part for each beats all for one.
            most = left if left is None or len(choices) >= alike else left // (alike - len(choices))
            choice = self._kernel(slot, reasons, most)
            if isinstance(choice, Reason):
                abstentions.append(choice)
                continue
            choices.append(choice)
            left = None if left is None else left - _cost(slot, choice.kernel)
        return choices, abstentions

    def _on_its_way(self, packet: SystemStatePacket) -> Reason | None:
        """Where the loss is heading without help: a run that will be done before a graft is judged needs none."""
        first, losses = packet.first_loss, packet.loss_window
        if not first or len(losses) <= PACE_EPOCHS or losses[-1 - PACE_EPOCHS] <= 0 or losses[-1] < 0:
            return None
        pace = min(1.0, losses[-1] / losses[-1 - PACE_EPOCHS]) ** (1 / PACE_EPOCHS)
        left = losses[-1] * pace**self.settings.horizon_epochs / first
        if left >= self.settings.solved:
            return None
        detail = f"at this pace {left:.1%} of the first loss will be left before a graft is judged"
        return Reason(code=ReasonCode.ON_ITS_WAY, detail=detail, value=left, threshold=self.settings.solved)

    def _rank(self, epoch: int, slots: list[SlotState]) -> tuple[list[tuple[SlotState, list[Reason]]], list[Reason]]:
        worthy: list[tuple[float, SlotState, list[Reason]]] = []
        abstentions: list[Reason] = []
        for slot in slots:
            verdict = self._verdict(epoch, slot)
            if isinstance(verdict, Reason):
                abstentions.append(verdict)
            else:
                worthy.append((_worth(slot.evidence[-1]), slot, verdict))
        worthy.sort(key=lambda entry: -entry[0])
        if worthy:
            worth, _, reasons = worthy[0]
            reasons.append(Reason(code=ReasonCode.BEST_PLACE, detail="most gain per added parameter", value=worth))
        return [(slot, reasons) for _, slot, reasons in worthy], abstentions

    def _verdict(self, epoch: int, slot: SlotState) -> Reason | list[Reason]:
        """Why the slot should grow, or the one reason why not."""
        health = slot.health.health
        limit, sure = self.settings.health_threshold, self.settings.confidence_threshold
        if slot.embargo_until_epoch > epoch:
            detail = f"{slot.slot} rests until epoch {slot.embargo_until_epoch}"
            return Reason(code=ReasonCode.EMBARGOED, detail=detail, value=slot.embargo_until_epoch)
        if slot.health.signal is None or health is None or not slot.evidence:
            return Reason(code=ReasonCode.NOT_MEASURED, detail=f"{slot.slot} was not measured at this epoch")
        if slot.health.dead_unit_ratio == 1.0 and len(slot.evidence) > 1:
            detail = f"{slot.slot}: no unit of the spanned layer ever fires"
            return [Reason(code=ReasonCode.DEAD, detail=detail, value=1.0)]
        if health >= limit:
            return Reason(code=ReasonCode.HEALTHY, detail=f"{slot.slot} is healthy", value=health, threshold=limit)
        if len(slot.evidence) < 2:
            return Reason(code=ReasonCode.NOT_CONFIDENT, detail=f"{slot.slot}: evidence seen only once")
        confidence = _confidence(slot)
        if confidence <= sure:
            detail = f"{slot.slot}: the evidence does not hold surely in two evaluations"
            return Reason(code=ReasonCode.NOT_CONFIDENT, detail=detail, value=confidence, threshold=sure)
        return [
            Reason(
                code=ReasonCode.UNHEALTHY,
                detail=f"health {health:.2f} is below {limit:g}",
                value=health,
                threshold=limit,
            ),
            Reason(
                code=ReasonCode.CONFIDENT,
                detail=f"{confidence:.0%} sure in two evaluations",
                value=confidence,
                threshold=sure,
            ),
        ]

    def _kernel(self, slot: SlotState, reasons: list[Reason], left: int | None) -> Choice | Reason:
        offers = [
            offer
            for offer in slot.candidates
            if offer.blueprint_id not in slot.barred_blueprint_ids and (left is None or _cost(slot, offer) <= left)
        ]
        if not offers:
            detail = f"{slot.slot}: none of {len(slot.candidates)} kernels is free and within the budget"
            return Reason(code=ReasonCode.NO_KERNEL, detail=detail)
        spectrum = slot.evidence[-1].spectrum if slot.evidence else ()
        total = sum(spectrum)

        def covered(offer: KernelCandidate) -> float:
            return sum(spectrum[: offer.width]) / total if total > 0 else 0.0

        # A kernel that cannot be folded stays a detour for ever, so it is taken only where nothing else fits.
        foldable = [offer for offer in offers if offer.foldable] or offers
        enough = [offer for offer in foldable if covered(offer) >= self.settings.coverage]
        if enough:
            # At the same final cost, the kernel that learned its exercises better, or has more to learn with in the meantime.
            best = min(
                enough,
                key=lambda offer: (_cost(slot, offer), -(offer.learned or 0.0), -offer.parameters, offer.kernel_id),
            )
        else:
            best = max(foldable, key=lambda offer: (covered(offer), -_cost(slot, offer), offer.kernel_id))
        share = covered(best)
        fits = Reason(
            code=ReasonCode.KERNEL_FITS_SPECTRUM,
            detail=f"{best.blueprint_name} covers {share:.0%} of it with {_cost(slot, best)} parameters",
            value=share,
            threshold=self.settings.coverage,
        )
        confidence = _confidence(slot) if len(slot.evidence) > 1 else 0.0
        return Choice(slot, best, share * total, confidence, (*reasons, fits))

    def _action(self, packet: SystemStatePacket, choice: Choice) -> AdaptationAction:
        command = Command(
            command_id=new_id(),
            run_id=packet.run_id,
            slot=choice.slot.slot,
            target=State.GERMINATED,
            kernel_id=choice.kernel.kernel_id,
            issued_by=self.issued_by,
            reason="; ".join(reason.detail for reason in choice.reasons)[:500],
        )
        return AdaptationAction(
            command=command,
            confidence=choice.confidence,
            expected_gain=choice.expected_gain,
            reasons=choice.reasons,
        )


class HeuristicController:
    """The policy as an in-process controller."""

    def __init__(self, settings: HeuristicSettings) -> None:
        self.policy = HeuristicPolicy(settings, issued_by="library")

    def decide(self, packet: SystemStatePacket) -> AdaptationSignal:
        """Decide at once."""
        return self.policy.decide(packet)


def _cost(slot: SlotState, offer: KernelCandidate) -> int:
    return offer.cost(slot.evidence[-1].unit_parameters if slot.evidence else 0)


def _worth(signal: GrowthSignal) -> float:
    return signal.gain_relative * signal.share / max(signal.unit_parameters, 1)


def _alike(slots: list[SlotState]) -> int:
    """How many of the best-first slots are worth nearly as much as the best; 1 where nothing is measured."""
    worths = [_worth(slot.evidence[-1]) if slot.evidence else 0.0 for slot in slots]
    return max(1, sum(worth > 0 and worth >= ALIKE * worths[0] for worth in worths))


def _confidence(slot: SlotState) -> float:
    """The weaker of the last two evaluations."""
    return min(signal.confidence for signal in slot.evidence[-2:])


def _mute(slots: list[SlotState]) -> bool:
    """Whether dead layers have silenced every closed form: nothing to gain anywhere, and a layer without a living unit."""
    measured = [slot for slot in slots if slot.evidence and slot.health.signal is not None]
    return (
        bool(measured)
        and all(slot.evidence[-1].gain == 0 for slot in measured)
        and any(slot.health.dead_unit_ratio == 1.0 for slot in measured)
    )


def _turns(epoch: int, slots: list[SlotState]) -> list[tuple[SlotState, list[Reason]]]:
    """The dead slots that do not rest, those with the fewest turns so far first."""
    dead = [slot for slot in slots if slot.health.dead_unit_ratio == 1.0 and slot.embargo_until_epoch <= epoch]
    dead.sort(key=lambda slot: slot.generation)
    turn = Reason(code=ReasonCode.TURN, detail="every signal is mute: dead layers take turns")
    return [(slot, [turn]) for slot in dead]
