"""Tolaria on the platform's side: what to serve and which facts about runs to write down."""

from __future__ import annotations

from functools import partial
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from esper_core.bus import subjects
from esper_core.bus.database import Connection
from esper_core.bus.envelope import Event
from esper_core.bus.inbox import consume
from esper_core.pb.esper.bus.v1 import bus_pb2
from esper_core.pb.esper.tolaria.v1 import tolaria_pb2_grpc
from esper_core.rpc.server import ServedService
from services.bell import Bell
from services.fact import fact_of
from services.runtime import Platform, Service
from services.tolaria.runs import Runs
from services.tolaria.servicer import NEWS, TolariaServicer

SERVICE = "esper.tolaria.v1.TolariaService"
DURABLE = "tolaria-runs"
_OUTCOME = ("results", "reason", "report")


class Projection:
    """Writes run events into the book."""

    def __init__(self, runs: Runs, bell: Bell) -> None:
        self._runs = runs
        self._bell = bell

    async def handle(self, connection: Connection, event: Event) -> None:
        """Note one fact, in the transaction that also notes its event id.

        Raises:
            InvalidInput: the event contradicts itself; it belongs among the dead letters.
        """
        fact, message = fact_of(event), event.message
        if isinstance(message, bus_pb2.RunRegistered):
            await self._runs.register(connection, fact, message.epoch, _json(message.run))
        elif isinstance(message, bus_pb2.EpochCompleted):
            await self._runs.complete_epoch(connection, fact, message.metrics.epoch, _json(message.metrics))
        elif isinstance(message, bus_pb2.RunEnded):
            told = _json(message)
            outcome = {key: told[key] for key in _OUTCOME if key in told}
            await self._runs.end(connection, fact, message.state, outcome)
        await self._bell.ring(connection, NEWS)


async def build(platform: Platform) -> Service:
    """The book of runs, over the schema ``tolaria``."""
    runs = Runs(platform.database)
    facts = partial(
        consume,
        platform.database,
        platform.bus,
        durable=DURABLE,
        subjects=(subjects.RUN_EVENTS.all, subjects.EPOCH_EVENTS.all),
        handler=Projection(runs, platform.bell).handle,
    )
    register = tolaria_pb2_grpc.add_TolariaServiceServicer_to_server
    served = ServedService(SERVICE, register, TolariaServicer(runs, platform.bell))
    return Service("tolaria", (served,), (facts,))


def _json(message: Message) -> dict[str, Any]:
    return json_format.MessageToDict(message, preserving_proto_field_name=True)
