"""A fact: what a training process said of its run, and where among its facts it said it. Knows neither grpc nor the wire."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esper_core.errors import InvalidInput

if TYPE_CHECKING:
    from esper_core.bus.database import Connection
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


async def come_back(connection: Connection, schema: str, fact: Fact, epoch: int, *, voids: str) -> bool:
    """Note in a projection's ``runs`` and ``registrations`` that a run has begun or come back at ``epoch``.

    What it had told before of that epoch and later ones is void; ``voids`` is the table of ``schema`` to take it out of.

    Returns:
        Whether the run has not registered later still.
    """
    registered: int = await connection.fetchval(
        f"""
        INSERT INTO {schema}.runs AS r (run_id, registered) VALUES ($1, $2)
        ON CONFLICT (run_id) DO UPDATE SET registered = greatest(r.registered, excluded.registered)
        RETURNING registered
        """,  # noqa: S608 - the names are the caller's own
        fact.run_id,
        fact.sequence,
    )
    await connection.execute(
        f"INSERT INTO {schema}.registrations VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",  # noqa: S608
        fact.run_id,
        fact.sequence,
        epoch,
    )
    await connection.execute(
        f"DELETE FROM {schema}.{voids} WHERE run_id = $1 AND sequence < $2 AND epoch >= $3",  # noqa: S608
        fact.run_id,
        fact.sequence,
        epoch,
    )
    return registered == fact.sequence
