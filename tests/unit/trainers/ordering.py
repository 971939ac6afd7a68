"""A controller that orders one kernel, so that growing in a trainer's hands goes the same way every time."""

from __future__ import annotations

from esper_core.control.packet import AdaptationAction, AdaptationSignal, Command, SystemStatePacket
from esper_core.lifecycle import State


class Ordering:
    """Orders ``blueprint`` into ``slot`` at the end of ``epoch``, and nothing else."""

    def __init__(self, slot: str, epoch: int, blueprint: str = "bottleneck_mlp") -> None:
        self.slot, self.epoch, self.blueprint = slot, epoch, blueprint

    def decide(self, packet: SystemStatePacket) -> AdaptationSignal | None:
        if packet.epoch != self.epoch:
            return None
        slot = next(slot for slot in packet.slots if slot.slot == self.slot)
        kernel = next(kernel for kernel in slot.candidates if kernel.blueprint_name == self.blueprint)
        command = Command(
            command_id="ordered",
            run_id=packet.run_id,
            slot=self.slot,
            target=State.GERMINATED,
            kernel_id=kernel.kernel_id,
            issued_by="test",
        )
        return AdaptationSignal(
            decision_id="decision",
            run_id=packet.run_id,
            epoch=packet.epoch,
            policy_version="test",
            actions=(AdaptationAction(command=command, reasons=()),),
        )
