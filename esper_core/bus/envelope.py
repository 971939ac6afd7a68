"""The outside of every event, and the checks that nothing gets past.

``wrap`` seals a payload on the producer's side and refuses what a consumer would refuse; ``unwrap`` opens it on the
other: decoding proves nothing, so envelope rules, payload digest, known type and payload rules are all checked before
anything acts on an event.

Does not authenticate the producer: an event that names a principal which may not speak on its subject is refused, but
whoever may publish at all can name another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import protovalidate
from google.protobuf import message_factory
from google.protobuf.descriptor_pool import Default
from google.protobuf.message import DecodeError, Message

from esper_core import telemetry
from esper_core.bus.subjects import MAX_PAYLOAD, TYPES, find
from esper_core.clock import SYSTEM
from esper_core.errors import InvalidInput, nearest
from esper_core.ids import new_id, sha256

# bus_pb2 imports every contract whose messages travel, which is what puts them into the descriptor pool;
# field reports are the one kind it does not mention.
from esper_core.pb.esper.bus.v1.bus_pb2 import PRIORITY_NORMAL, EventEnvelope, Priority
from esper_core.pb.esper.core.v1 import decision_pb2, lifecycle_pb2  # noqa: F401

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Event:
    """An event that passed every check.

    Attributes:
        envelope: its outside.
        message: its payload, of the type that ``envelope.type`` names.
        subject: what it travelled on, in full; empty when it came from nowhere in particular.
    """

    envelope: EventEnvelope
    message: Any
    subject: str = ""


def wrap(
    message: Message,
    *,
    producer: str,
    run_id: str = "",
    epoch: int = 0,
    sequence: int = 0,
    causation_id: str = "",
    correlation_id: str = "",
    priority: Priority = PRIORITY_NORMAL,
    event_id: str | None = None,
) -> EventEnvelope:
    """Seal ``message`` for the bus.

    Args:
        message: one of the payload types in ``subjects.TYPES``.
        producer: principal that made it.
        run_id, epoch, sequence: what it is about; ``sequence`` counts this producer's events of the run from 1.
        causation_id, correlation_id: the event or command behind it, and the first of that chain.
        priority: admission class.
        event_id: its name when it must be the same on every attempt; a fresh UUIDv7 otherwise.

    Raises:
        InvalidInput: no payload type of the bus, larger than 256 KiB, or against the contract's rules.
    """
    name = message.DESCRIPTOR.full_name
    if name not in TYPES:
        raise InvalidInput(f"{name} does not travel on the bus", hint=nearest(name, TYPES))
    payload = message.SerializeToString(deterministic=True)
    if len(payload) > MAX_PAYLOAD:
        raise InvalidInput(
            f"a {name} of {len(payload)} bytes is larger than the bus takes ({MAX_PAYLOAD})",
            hint="store the bulk as a blob and send its digest",
        )
    _check(message, name)
    envelope = EventEnvelope(
        event_id=new_id() if event_id is None else event_id,
        type=name,
        schema_version=SCHEMA_VERSION,
        producer=producer,
        run_id=run_id,
        epoch=epoch,
        sequence=sequence,
        causation_id=causation_id,
        correlation_id=correlation_id,
        priority=priority,
        payload=payload,
        payload_sha256=sha256(payload),
        traceparent=telemetry.current(),
    )
    envelope.created.FromDatetime(SYSTEM.now())
    _check(envelope, "the envelope")
    return envelope


def unwrap(data: bytes, subject: str = "") -> Event:
    """Open what came from the bus.

    Args:
        data: a serialised envelope.
        subject: what it came on; when given, the payload's type, the producer and the run must belong there.

    Raises:
        InvalidInput: undecodable, against a rule, altered, of unknown type, or astray on this subject.
    """
    envelope = EventEnvelope()
    try:
        envelope.ParseFromString(data)
    except DecodeError:
        raise InvalidInput(f"{len(data)} bytes that are no event envelope") from None
    _check(envelope, "the envelope")
    if sha256(envelope.payload) != envelope.payload_sha256:
        raise InvalidInput(f"event {envelope.event_id}: the payload does not match its digest")
    if envelope.type not in TYPES:
        raise InvalidInput(
            f"event {envelope.event_id}: unknown type {envelope.type!r}", hint=nearest(envelope.type, TYPES)
        )
    if subject:
        check_belongs(envelope, subject)
    message = message_factory.GetMessageClass(Default().FindMessageTypeByName(envelope.type))()
    try:
        message.ParseFromString(envelope.payload)
    except DecodeError:
        raise InvalidInput(f"event {envelope.event_id}: the payload is no {envelope.type}") from None
    _check(message, envelope.type)
    return Event(envelope, message, subject)


def check_belongs(envelope: EventEnvelope, subject: str) -> None:
    """Refuse an event that is not meant for ``subject``.

    Raises:
        InvalidInput: the subject is not declared, takes no such payload, or none by this producer, or is another run's.
    """
    declared = find(subject)
    if envelope.type not in declared.types:
        raise InvalidInput(
            f"a {envelope.type} does not travel on {declared.name}",
            hint=f"it takes {', '.join(sorted(declared.types))}",
        )
    if envelope.producer not in declared.producers:
        raise InvalidInput(
            f"{envelope.producer} may not speak on {declared.name}",
            hint=f"only {', '.join(sorted(declared.producers))}",
        )
    run_id = subject.rpartition(".")[2]
    if declared.per_run and envelope.run_id not in ("", run_id):
        raise InvalidInput(f"an event of run {envelope.run_id!r} came on the subject of run {run_id!r}")


def _check(message: Message, what: str) -> None:
    try:
        protovalidate.validate(message)
    except protovalidate.ValidationError as error:
        faults = "; ".join(_fault(violation.proto) for violation in error.violations[:4])
        raise InvalidInput(f"{what} breaks its contract: {faults}") from None


def _fault(violation: protovalidate.ViolationPb) -> str:
    path = ".".join(part.field_name for part in violation.field.elements) if violation.field else ""
    return f"{path}: {violation.message}" if path else violation.message
