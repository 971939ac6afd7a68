"""Other ways of choosing a place, as controllers in the same lifecycle: chance, turns, a schedule, and signals from the literature.

Each grows with the same kernel (the usual foldable one of ``WIDTH`` units), so that only the choice of place and time differs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from esper_core.control.packet import (
    AdaptationAction,
    AdaptationSignal,
    Command,
    KernelCandidate,
    Reason,
    ReasonCode,
    SlotState,
    SystemStatePacket,
)
from esper_core.ids import new_id
from esper_core.lifecycle import IN_FLIGHT, State
from esper_core.nn.host import Host
from esper_core.nn.probe import Batch, LossFunction, look
from esper_core.nn.rows import entering_rows, inner_rows, leaving_rows

WIDTH = 8
"""Units of a rival's kernel."""

Rank = Callable[[SystemStatePacket], Mapping[str, float]]
"""How much each slot is worth by some signal; the highest is grown."""


@dataclass
class Rival:
    """Grows the best slot by ``rank``, ``times`` times, whenever no graft is in flight; asks for no evidence.

    Attributes:
        rank: worth per slot name.
        times: grafts in all.
        every: epochs that lie between two of them at least.
    """

    rank: Rank
    times: int = 1
    every: int = 1
    grown: list[int] = field(default_factory=list)

    def decide(self, packet: SystemStatePacket) -> AdaptationSignal:
        """An action for the best slot when it is time, otherwise none."""
        action = self._action(packet) if self._due(packet) else None
        return AdaptationSignal(
            decision_id=new_id(),
            run_id=packet.run_id,
            epoch=packet.epoch,
            policy_version="rival",
            actions=(action,) if action else (),
        )

    def _due(self, packet: SystemStatePacket) -> bool:
        busy = any(slot.state in IN_FLIGHT for slot in packet.slots)
        rested = not self.grown or packet.epoch - self.grown[-1] >= self.every
        return not busy and rested and len(self.grown) < self.times

    def _action(self, packet: SystemStatePacket) -> AdaptationAction | None:
        worth = self.rank(packet)
        open_slots = [slot for slot in packet.slots if slot.state is State.DORMANT and slot.slot in worth]
        for slot in sorted(open_slots, key=lambda slot: -worth[slot.slot]):
            kernel = usual_kernel(slot, packet.budget.parameters)
            if kernel is not None:
                self.grown.append(packet.epoch)
                return germinate(packet, slot.slot, kernel)
        return None


def usual_kernel(slot: SlotState, left: int | None) -> KernelCandidate | None:
    """The foldable kernel of ``WIDTH`` units that has most to learn with; the nearest width where there is none."""
    cost = slot.evidence[-1].unit_parameters if slot.evidence else 0
    within = [kernel for kernel in slot.candidates if left is None or kernel.cost(cost) <= left]
    offers = [kernel for kernel in within if kernel.foldable] or within
    return min(offers, key=lambda k: (abs(k.width - WIDTH), -k.parameters, k.kernel_id), default=None)


def germinate(packet: SystemStatePacket, slot: str, kernel: KernelCandidate) -> AdaptationAction:
    """The order to grow there."""
    command = Command(
        command_id=new_id(),
        run_id=packet.run_id,
        slot=slot,
        target=State.GERMINATED,
        kernel_id=kernel.kernel_id,
        issued_by="arena",
        reason="its turn",
    )
    return AdaptationAction(command=command, reasons=(Reason(code=ReasonCode.TURN, detail="its turn"),))


def at(slot: str) -> Rank:
    """That slot and no other."""
    return lambda _: {slot: 1.0}


def by_chance(seed: int) -> Rank:
    """Any slot, each as likely."""
    dice = random.Random(seed)  # noqa: S311 - no secret
    return lambda packet: {slot.slot: dice.random() for slot in packet.slots}


def in_turns(packet: SystemStatePacket) -> dict[str, float]:
    """The slot that has grown least so far; the earlier one among equals."""
    return {slot.slot: -slot.generation - index * 1e-6 for index, slot in enumerate(packet.slots)}


def tiny_raw(packet: SystemStatePacket) -> dict[str, float]:
    """First-order gain as it is, neither relative nor per parameter (Verbockhaven et al., 2024)."""
    return {slot.slot: slot.evidence[-1].gain for slot in packet.slots if slot.evidence}


def senn(packet: SystemStatePacket) -> dict[str, float]:
    """The natural expansion score (Mitchell et al., 2023)."""
    return {slot.slot: slot.evidence[-1].score for slot in packet.slots if slot.evidence}


def narrowest(packet: SystemStatePacket) -> dict[str, float]:
    """The layer with the fewest units."""
    return {slot.slot: -float(slot.interface.hidden_width) for slot in packet.slots}


def effective_rank(packet: SystemStatePacket) -> dict[str, float]:
    """The layer whose activations have the lowest effective rank."""
    ranks = {slot.slot: slot.health.effective_rank for slot in packet.slots}
    return {name: -rank for name, rank in ranks.items() if rank is not None}


def dead_units(packet: SystemStatePacket) -> dict[str, float]:
    """The layer with the largest share of units that never fire on the probe."""
    ratios = {slot.slot: slot.health.dead_unit_ratio for slot in packet.slots}
    return {name: ratio for name, ratio in ratios.items() if ratio is not None}


def fisher(host: Host, probe: Sequence[Batch], loss_fn: LossFunction) -> Rank:
    """Diagonal of the empirical Fisher information of the weights that leave the layer, their mean: E[g²] E[h²] as K-FAC splits it.

    g is the loss's gradient at the sink's output and h what the sink reads (Martens and Grosse, 2015).
    """

    def rank(_: SystemStatePacket) -> dict[str, float]:
        found: dict[str, list[float]] = {name: [] for name in host.slots}
        for _loss, sights in look(host, host.slots.values(), probe, loss_fn):
            for name, sight in sights.items():
                rows = inner_rows(sight.inner, host.slots[name].interface)
                descent = leaving_rows(sight.descent, host.slots[name].interface)
                found[name].append(float(rows.square().mean() * descent.square().mean()))
        return {name: sum(parts) / len(parts) for name, parts in found.items()}

    return rank


def gradmax(host: Host, probe: Sequence[Batch], loss_fn: LossFunction, units: int = WIDTH) -> Rank:
    """Squared norm of the largest possible gradient of new fan-out weights (Evci et al., 2022): top σ² of Hᵀ(−∂L/∂z)/n."""

    def rank(_: SystemStatePacket) -> dict[str, float]:
        worth: dict[str, float] = {}
        for name, (entering, descent) in _rows(host, probe, loss_fn).items():
            values = torch.linalg.svdvals(entering.T @ descent / len(entering))
            worth[name] = float(values[:units].square().sum())
        return worth

    return rank


def firefly(host: Host, probe: Sequence[Batch], loss_fn: LossFunction, units: int = WIDTH, trials: int = 128) -> Rank:
    """First-order gain of the best of many random new units, scaled alike (after Wu et al., 2020)."""

    def rank(packet: SystemStatePacket) -> dict[str, float]:
        dice = torch.Generator().manual_seed(packet.epoch)
        worth: dict[str, float] = {}
        for name, (entering, descent) in _rows(host, probe, loss_fn).items():
            into = torch.randn(entering.shape[1], trials, generator=dice) / math.sqrt(entering.shape[1])
            new = (entering @ into).relu()
            new = new / new.square().mean(0).sqrt().clamp_min(1e-9)
            gains = (new.T @ descent / len(entering)).norm(dim=1)
            worth[name] = float(gains.topk(units).values.sum())
        return worth

    return rank


def _rows(host: Host, probe: Sequence[Batch], loss_fn: LossFunction) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in host.slots}
    for _, sights in look(host, host.slots.values(), probe, loss_fn):
        for name, sight in sights.items():
            interface = host.slots[name].interface
            rows = entering_rows(sight.entering, interface), leaving_rows(sight.descent, interface)
            found[name].append(rows)
    return {name: (torch.cat([h for h, _ in parts]), torch.cat([g for _, g in parts])) for name, parts in found.items()}
