"""Nissa: what to serve, what to write in the journal, how long to keep it."""

from __future__ import annotations

import asyncio
from functools import partial

from google.protobuf import json_format

import esper_core
from esper_core import log
from esper_core.bus import subjects
from esper_core.bus.database import Connection
from esper_core.bus.envelope import Event
from esper_core.bus.inbox import consume
from esper_core.pb.esper.bus.v1 import bus_pb2
from esper_core.pb.esper.nissa.v1 import nissa_pb2_grpc
from esper_core.rpc.server import ServedService
from services.bell import Bell
from services.nissa.journal import Entry, Journal
from services.nissa.metrics import Metrics
from services.nissa.servicer import NEWS, NissaServicer
from services.runtime import Platform, Service

SERVICE = "esper.nissa.v1.NissaService"
KEPT_EVENTS, KEPT_DAYS, SWEEP_SECONDS = 100_000, 14.0, 300.0
_log = log.get("nissa")


class Scribe:
    """Writes every event of the bus into the journal."""

    def __init__(self, journal: Journal, bell: Bell) -> None:
        self._journal = journal
        self._bell = bell

    async def handle(self, connection: Connection, event: Event) -> None:
        """Write one, in the transaction that also notes its event id."""
        envelope, message = event.envelope, event.message
        entry = Entry(
            event_id=envelope.event_id,
            subject=event.subject.removeprefix(subjects.PREFIX),
            type=envelope.type,
            run_id=envelope.run_id,
            envelope=envelope.SerializeToString(),
            payload=json_format.MessageToJson(message, preserving_proto_field_name=True, indent=None),
        )
        await self._journal.write(connection, entry)
        run_id, sequence = envelope.run_id, envelope.sequence
        if isinstance(message, bus_pb2.RunRegistered):
            await self._journal.begin(connection, run_id, sequence, message.epoch)
        elif isinstance(message, bus_pb2.RunEnded):
            await self._journal.end(connection, run_id, sequence, message.state)
        elif isinstance(message, bus_pb2.EpochCompleted):
            figures = json_format.MessageToDict(message.metrics, preserving_proto_field_name=True)
            await self._journal.figures(connection, envelope.event_id, run_id, sequence, message.metrics.epoch, figures)
        await self._bell.ring(connection, NEWS)


async def sweep(journal: Journal) -> None:
    """Keep the journal bounded, for ever."""
    while True:
        if removed := await journal.forget(keep=KEPT_EVENTS, days=KEPT_DAYS):
            _log.info("journal.swept", events=removed)
        await asyncio.sleep(SWEEP_SECONDS)


async def build(platform: Platform) -> Service:
    """Observability, over the schema ``nissa``."""
    journal = Journal(platform.database)
    metrics = Metrics(platform.metrics, platform.database, journal, esper_core.__version__)
    everything = partial(
        consume,
        platform.database,
        platform.bus,
        durable="nissa",
        subjects=tuple(subject.all for subject in subjects.SUBJECTS),
        handler=Scribe(journal, platform.bell).handle,
    )
    register = nissa_pb2_grpc.add_NissaServiceServicer_to_server
    served = ServedService(SERVICE, register, NissaServicer(journal, platform.bell))
    return Service("nissa", (served,), (everything, metrics.keep, partial(sweep, journal)))
