"""Emrakul: what to serve, which facts about units and plans to write down, and how an order goes out."""

from __future__ import annotations

from functools import partial

from esper_core.bus import subjects
from esper_core.bus.database import Connection
from esper_core.bus.envelope import Event, wrap
from esper_core.bus.inbox import consume
from esper_core.bus.outbox import enqueue
from esper_core.control.carve.papers import CarveEvent, CarveOrder, CarveSurvey
from esper_core.pb.esper.bus.v1 import bus_pb2
from esper_core.pb.esper.core.v1 import carve_pb2
from esper_core.pb.esper.emrakul.v1 import emrakul_pb2_grpc
from esper_core.rpc.convert import from_proto, to_proto
from esper_core.rpc.server import ServedService
from services.emrakul.plans import SCULPTOR, Plans
from services.emrakul.projection import Projection
from services.emrakul.servicer import EmrakulServicer
from services.fact import fact_of
from services.runtime import Platform, Service

SERVICE = "esper.emrakul.v1.EmrakulService"


class Facts:
    """Takes events about runs, units and plans to the projection."""

    def __init__(self, projection: Projection) -> None:
        self._projection = projection

    async def handle(self, connection: Connection, event: Event) -> None:
        """Note one fact, in the transaction that also notes its event id.

        Raises:
            InvalidInput: the event contradicts itself; it belongs among the dead letters.
        """
        fact, message = fact_of(event), event.message
        if isinstance(message, bus_pb2.RunRegistered):
            await self._projection.register(connection, fact, message.epoch)
        elif isinstance(message, bus_pb2.RunEnded):
            await self._projection.end(connection, fact)
        elif isinstance(message, carve_pb2.CarveSurvey):
            await self._projection.measured(connection, fact, from_proto(message, CarveSurvey))
        elif isinstance(message, carve_pb2.CarveEvent):
            await self._projection.carved(connection, fact, from_proto(message, CarveEvent))


async def send(connection: Connection, order: CarveOrder) -> None:
    """Put an order into the outbox of the connection's transaction."""
    envelope = wrap(
        to_proto(order, carve_pb2.CarveOrder),
        producer=SCULPTOR,
        run_id=order.run_id,
        causation_id=order.plan_id[:64],
        correlation_id=order.order_id,
        priority=bus_pb2.PRIORITY_CONTROL,
    )
    await enqueue(connection, subjects.CARVE_ORDERS.of(order.run_id), envelope)


async def build(platform: Platform) -> Service:
    """The architectural sculptor, over the schema ``emrakul``."""
    plans = Plans(platform.database, send)
    facts = partial(
        consume,
        platform.database,
        platform.bus,
        durable="emrakul-plans",
        subjects=(subjects.RUN_EVENTS.all, subjects.CARVE_EVENTS.all),
        handler=Facts(Projection(plans)).handle,
    )
    served = ServedService(SERVICE, emrakul_pb2_grpc.add_EmrakulServiceServicer_to_server, EmrakulServicer(plans))
    return Service("emrakul", (served,), (facts,))
