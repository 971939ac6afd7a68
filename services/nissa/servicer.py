"""Nissa's wire edge: the journal over gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
from google.protobuf import json_format
from google.protobuf.message import DecodeError

from esper_core.bus.subjects import PREFIX
from esper_core.pb.esper.bus.v1 import bus_pb2
from esper_core.pb.esper.core.v1 import run_pb2
from esper_core.pb.esper.nissa.v1 import nissa_pb2, nissa_pb2_grpc
from services import page
from services.bell import Bell
from services.nissa.journal import Entry, Journal

NEWS = "nissa"
Context = grpc.aio.ServicerContext[object, object]


class NissaServicer(nissa_pb2_grpc.NissaServiceServicer):
    """See ``protos/esper/nissa/v1/nissa.proto`` for what each call promises."""

    def __init__(self, journal: Journal, bell: Bell) -> None:
        self._journal = journal
        self._bell = bell

    async def ListEvents(self, request: nissa_pb2.ListEventsRequest, _: Context) -> nissa_pb2.ListEventsResponse:
        entries, token = await self._journal.newest(
            run_id=request.run_id,
            kind=request.type,
            size=page.wanted(request.page_size),
            token=request.page_token,
        )
        return nissa_pb2.ListEventsResponse(events=map(_event, entries), next_page_token=token)

    async def WatchEvents(
        self, request: nissa_pb2.WatchEventsRequest, _: Context
    ) -> AsyncIterator[nissa_pb2.WatchEventsResponse]:
        ordinal = await self._journal.last_ordinal()
        while True:
            news = self._bell.expect(NEWS)
            entries = await self._journal.after(ordinal, run_id=request.run_id, kind=request.type)
            for entry in entries:
                yield nissa_pb2.WatchEventsResponse(event=_event(entry))
            if entries:
                ordinal = entries[-1].ordinal
            else:
                await self._bell.wait(news)

    async def GetRunHistory(
        self, request: nissa_pb2.GetRunHistoryRequest, _: Context
    ) -> nissa_pb2.GetRunHistoryResponse:
        figures = await self._journal.history(request.run_id)
        return nissa_pb2.GetRunHistoryResponse(
            epochs=[json_format.ParseDict(each, run_pb2.EpochMetrics()) for each in figures]
        )

    async def ListDeadLetters(
        self, request: nissa_pb2.ListDeadLettersRequest, _: Context
    ) -> nissa_pb2.ListDeadLettersResponse:
        letters = [
            nissa_pb2.DeadLetter(
                consumer=consumer,
                subject=subject.removeprefix(PREFIX),
                event_id=_event_id(data),
                reason=reason,
                data=data,
                created=created,
            )
            for consumer, subject, reason, data, created in await self._journal.dead_letters(
                page.wanted(request.page_size)
            )
        ]
        return nissa_pb2.ListDeadLettersResponse(letters=letters)


def _event(entry: Entry) -> nissa_pb2.LoggedEvent:
    return nissa_pb2.LoggedEvent(
        subject=entry.subject,
        envelope=bus_pb2.EventEnvelope.FromString(entry.envelope),
        payload_json=entry.payload,
    )


def _event_id(data: bytes) -> str:
    """The event's id when the bytes are an envelope at all."""
    try:
        return bus_pb2.EventEnvelope.FromString(data).event_id
    except DecodeError:
        return ""
