"""What comes in to be built: new slots of registered runs, wishes on the bus, and wishes by call.

Each becomes a row and, when it is new, an event on the work queue in the same transaction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from esper_core.blueprint.interface import SlotInterface
from esper_core.bus import subjects
from esper_core.bus.database import Connection, Pool
from esper_core.bus.envelope import Event, wrap
from esper_core.bus.outbox import enqueue
from esper_core.errors import InvalidInput
from esper_core.pb.esper.bus.v1 import bus_pb2
from esper_core.pb.esper.core.v1 import blueprint_pb2
from esper_core.rpc.convert import from_proto, to_proto
from services.bell import Bell
from services.tezzeret import builds
from services.tezzeret.assortment import assortment
from services.tezzeret.builds import PIPELINE, Build, Estimate, Wish
from services.tezzeret.designs import Designs
from services.tezzeret.toolchain import here

PRINCIPAL = "tezzeret"
NEWS = "tezzeret"


class Orders:
    """The counter where wishes are taken."""

    def __init__(self, database: Pool, bell: Bell, designs: Designs) -> None:
        self._database, self._bell, self._designs = database, bell, designs

    async def on_run(self, connection: Connection, event: Event) -> None:
        """Order what fits the slots of a run that has registered; most useful first, slot by slot in turn."""
        if not isinstance(event.message, bus_pb2.RunRegistered) or not event.message.run.morphogenetic:
            return
        interfaces = {found.id: found for found in _interfaces(event.message)}
        compiling = event.message.native
        wishes = [wish.on(here()) for found in interfaces.values() for wish in assortment(found, compiling=compiling)]
        await self._take(connection, sorted(wishes, key=lambda wish: wish.rank), event.envelope.event_id)

    async def on_wish(self, connection: Connection, event: Event) -> None:
        """Note a wish that somebody published; our own are known already.

        Raises:
            InvalidInput: its id does not follow from its contents; it belongs among the dead letters.
        """
        message: bus_pb2.BuildRequested = event.message
        wish = Wish(
            blueprint_id=message.blueprint_id,
            interface=from_proto(message.interface, SlotInterface),
            symbols=dict(message.symbols),
            pipeline=message.pipeline,
            target=message.target,
            toolchain=message.toolchain,
        )
        if wish.build_id != message.build_id:
            raise InvalidInput(f"{message.build_id} is not the id of what it asks for", hint=f"it is {wish.build_id}")
        await builds.expect(connection, wish.on(here()))
        await self._bell.ring(connection, NEWS)

    async def submit(
        self, blueprint_id: str, interface: SlotInterface, symbols: Mapping[str, int], pipeline: str
    ) -> Build:
        """Order one kernel.

        Raises:
            NotFound: the library has no such blueprint.
            InvalidInput: blueprint, symbols and interface do not fit together.
            Unsupported: no such pipeline.
            Unavailable: the library is away.
        """
        builds.check_pipeline(pipeline or PIPELINE)
        design = await self._designs.get(blueprint_id)
        bound = design.bind(symbols)
        estimate = Estimate.of(design, interface, bound)
        wish = Wish(
            blueprint_id=design.id,
            blueprint_name=design.name,
            interface=interface,
            symbols=bound,
            pipeline=pipeline or PIPELINE,
            estimate=estimate,
        ).on(here())
        async with self._database.acquire() as connection, connection.transaction():
            await self._take(connection, [wish], "")
        return await builds.get(self._database, wish.build_id)

    async def _take(self, connection: Connection, wishes: Iterable[Wish], cause: str) -> None:
        for wish in wishes:
            if await builds.add(connection, wish):
                envelope = wrap(_requested(wish), producer=PRINCIPAL, causation_id=cause)
                await enqueue(connection, subjects.BLUEPRINT_SUBMITTED.of(), envelope)
        await self._bell.ring(connection, NEWS)


def _interfaces(message: bus_pb2.RunRegistered) -> list[SlotInterface]:
    return [from_proto(slot.interface, SlotInterface) for slot in message.run.slots]


def _requested(wish: Wish) -> bus_pb2.BuildRequested:
    return bus_pb2.BuildRequested(
        build_id=wish.build_id,
        blueprint_id=wish.blueprint_id,
        interface=to_proto(wish.interface, blueprint_pb2.SlotInterface),
        symbols=dict(wish.symbols),
        pipeline=wish.pipeline,
        target=wish.target,
        toolchain=wish.toolchain,
    )
