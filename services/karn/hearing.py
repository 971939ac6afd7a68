"""What Karn hears: slots that runs offer, verdicts on kernels whoever had them built, and what became of kernels in runs."""

from __future__ import annotations

from esper_core.blueprint.interface import SlotInterface
from esper_core.bus.database import Connection
from esper_core.bus.envelope import Event
from esper_core.errors import NotFound
from esper_core.lifecycle import State
from esper_core.pb.esper.bus.v1 import bus_pb2
from esper_core.rpc.convert import from_proto
from services.bell import Bell
from services.karn.gardener import NEWS
from services.karn.nursery import Nursery
from services.karn.trade import Trade


class Hearing:
    """Handlers of events; each writes through the connection that also notes the event."""

    def __init__(self, nursery: Nursery, trade: Trade, bell: Bell) -> None:
        self._nursery, self._trade, self._bell = nursery, trade, bell

    async def on_run(self, connection: Connection, event: Event) -> None:
        """Learn which slots there are."""
        if not isinstance(event.message, bus_pb2.RunRegistered) or not event.message.run.morphogenetic:
            return
        run = event.message.run
        for slot in run.slots:
            await self._nursery.meet(connection, from_proto(slot.interface, SlotInterface), run.run_id)
        await self._bell.ring(connection, NEWS)

    async def on_verdict(self, connection: Connection, event: Event) -> None:
        """Learn what a kernel is good for, ours or not.

        Raises:
            Unavailable: the library is away.
        """
        try:
            record = await self._trade.kernel(event.message.kernel_id)
        except NotFound:
            return  # collected meanwhile: nothing to learn from
        await self._nursery.judged(connection, record)
        await self._bell.ring(connection, NEWS)

    async def on_report(self, connection: Connection, event: Event) -> None:
        """Learn what became of a kernel where it was really grafted; one culled before that says nothing of its design."""
        report = event.message
        outcome = State(report.outcome)
        if outcome is State.CULLED and not report.HasField("contribution"):
            return
        await self._nursery.report(
            connection,
            report.report_id,
            report.kernel_id,
            kept=outcome is State.FOSSILIZED,
            rolled_back=outcome is State.ROLLED_BACK,
        )
