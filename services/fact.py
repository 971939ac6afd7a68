"""A fact: what a training process said of its run, and where among its facts it said it. Knows neither grpc nor the wire."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esper_core.errors import InvalidInput

if TYPE_CHECKING:
    from esper_core.bus.envelope import Event


@dataclass(frozen=True)
class Fact:
    """Where and when something was said about a run.

    Attributes:
        sequence: position among its run's facts; decides between two of them.
        created: the teller's clock, shown to people, never used for ordering.
    """

    event_id: str
    run_id: str
    sequence: int
    created: dt.datetime


def fact_of(event: Event) -> Fact:
    """Where an event about a run stands.

    Raises:
        InvalidInput: envelope and message are about different runs; it belongs among the dead letters.
    """
    envelope, message = event.envelope, event.message
    told = message.run.run_id if "run" in message.DESCRIPTOR.fields_by_name else message.run_id
    if told != envelope.run_id:
        raise InvalidInput(f"event {envelope.event_id} of run {envelope.run_id!r} speaks of {told!r}")
    return Fact(envelope.event_id, envelope.run_id, envelope.sequence, envelope.created.ToDatetime(tzinfo=dt.UTC))
