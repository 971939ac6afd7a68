"""``esperctl bus``: what travels on the bus, now and before, and what nobody could take."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from rich.console import RenderableType

from esper_core.cli.command import Invocation, command, noun
from esper_core.cli.output import moment, plain, table, words
from esper_core.cli.resolve import run_of
from esper_core.errors import NotFound, nearest
from esper_core.pb.esper.core.v1 import decision_pb2, lifecycle_pb2  # noqa: F401 - payloads that travel, by name
from esper_core.pb.esper.nissa.v1 import nissa_pb2

app = noun("bus", "The event bus: events as they happen, events of before, dead letters.")

ANY = "any"
_CUT = 160
RunOption = Annotated[str, typer.Option("--run", "-r", help="The run: a name, a prefix, latest, or any.")]
TypeOption = Annotated[str, typer.Option("--type", "-t", help="Only this kind of event, e.g. SeedEvent.")]


@command(app, "tail")
async def tail(call: Invocation, run: RunOption = ANY, kind: TypeOption = "") -> None:
    """Follow events as they come in, until Ctrl-C.

    Example:  esperctl bus tail --type EpochCompleted -o json | jq .payload.metrics.train_loss
    """
    wanted = _type(kind)
    async with call.platform() as platform:
        run_id = "" if run == ANY else (await run_of(platform, run)).run_id
        request = nissa_pb2.WatchEventsRequest(run_id=run_id, type=wanted)
        async for news in platform.nissa.WatchEvents(request):
            call.output.line(_document(news.event), _line(news.event))


@command(app, "events")
async def events(
    call: Invocation,
    run: RunOption = ANY,
    kind: TypeOption = "",
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="At most this many.")] = 50,
) -> None:
    """List events of before, newest first.

    Example:  esperctl bus events --run latest --type SeedEvent
    """
    wanted = _type(kind)
    async with call.platform() as platform:
        run_id = "" if run == ANY else (await run_of(platform, run)).run_id
        request = nissa_pb2.ListEventsRequest(run_id=run_id, type=wanted, page_size=limit)
        answer: nissa_pb2.ListEventsResponse = await platform.nissa.ListEvents(request)
    rows = [
        (
            moment(event.envelope.created.ToJsonString()), event.subject, event.envelope.epoch,
            event.envelope.producer, _name(event), event.payload_json[:_CUT],
        )
        for event in answer.events
    ]  # fmt: skip
    columns = ("TIME", "SUBJECT", ">EPOCH", "FROM", "TYPE", "*PAYLOAD")
    documents = [_document(event) for event in answer.events]
    call.output.document(documents, table(columns, rows, empty="no events"))


@command(app, "dead-letters")
async def dead_letters(
    call: Invocation,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="At most this many.")] = 50,
) -> None:
    """List messages that no consumer could take, with the reason, newest first.

    Example:  esperctl bus dead-letters -o json | jq -r '.[].reason'
    """
    async with call.platform() as platform:
        request = nissa_pb2.ListDeadLettersRequest(page_size=limit)
        answer: nissa_pb2.ListDeadLettersResponse = await platform.nissa.ListDeadLetters(request)
    rows = [
        (moment(letter.created), letter.consumer, letter.subject, letter.event_id, len(letter.data), letter.reason)
        for letter in answer.letters
    ]
    columns = ("TIME", "CONSUMER", "SUBJECT", "EVENT", ">BYTES", "*REASON")
    call.output.document([plain(letter) for letter in answer.letters], table(columns, rows, empty="no dead letters"))


def _type(given: str) -> str:
    """The full name of a payload type from its last part.

    Raises:
        NotFound: no such payload travels.
    """
    from esper_core.bus.subjects import TYPES

    by_name = {name.rpartition(".")[2]: name for name in TYPES}
    if not given or given in TYPES:
        return given
    if given not in by_name:
        raise NotFound(f"no event type {given!r}", hint=nearest(given, by_name))
    return by_name[given]


def _name(event: nissa_pb2.LoggedEvent) -> str:
    return event.envelope.type.rpartition(".")[2]


def _document(event: nissa_pb2.LoggedEvent) -> dict[str, Any]:
    """The envelope with its payload opened; one of a kind that this build does not know stays base64."""
    outside = plain(event.envelope)
    try:
        kind = descriptor_pool.Default().FindMessageTypeByName(event.envelope.type)
        message = message_factory.GetMessageClass(kind)()
        message.ParseFromString(event.envelope.payload)
    except (KeyError, DecodeError):
        return {"subject": event.subject, **outside}
    return {"subject": event.subject, **outside, "payload": plain(message)}


def _line(event: nissa_pb2.LoggedEvent) -> RenderableType:
    envelope = event.envelope
    time = envelope.created.ToJsonString()[11:23]
    return words(f"{time}  {event.subject}  {_name(event)}  {event.payload_json[:_CUT]}")
