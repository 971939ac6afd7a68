"""Domain nouns to messages and back, field by field under equal names.

A field that is ``None`` in the model is unset on the wire and the other way round; a scalar without presence always
has a value. Enums travel as numbers, ``Timestamp`` is an aware ``datetime``, bytes and 64-bit integers stay exact.

Knows no rule of any message: the contract's own rules are checked where a message enters, the model's by the model.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import BaseModel, ValidationError

from esper_core.errors import InvalidInput

P = TypeVar("P", bound=Message)
M = TypeVar("M", bound=BaseModel)
_Field = Any  # the descriptor classes of protobuf's two engines share no type


def to_proto(model: BaseModel, cls: Callable[[], P]) -> P:
    """``model`` as a message of ``cls``.

    Raises:
        InvalidInput: a value does not fit its field's type, e.g. a negative number for an unsigned one.
        TypeError: the model has a field that the message has not: the twins have drifted apart.
    """
    message = cls()
    _fill(message, model)
    return message


def from_proto(message: Message, model: type[M]) -> M:
    """``message`` as a ``model``.

    Raises:
        InvalidInput: the message breaks one of the model's rules; says which field and why.
    """
    try:
        return model.model_validate(_fields(message))
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc'])) or 'message'}: {fault['msg']}"
            for fault in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        raise InvalidInput(
            f"{message.DESCRIPTOR.full_name}: {'; '.join(faults[:8])}", hint="correct the named fields and send again"
        ) from None


def _fill(message: Message, model: BaseModel) -> None:
    fields = message.DESCRIPTOR.fields_by_name
    for name in type(model).model_fields:
        value = getattr(model, name)
        field = fields.get(name)
        if field is None:
            raise TypeError(f"{type(model).__name__}.{name} has no place in {message.DESCRIPTOR.full_name}")
        if value is None:
            continue
        try:
            _put(message, field, value)
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidInput(
                f"{message.DESCRIPTOR.full_name}.{name}: {error}", hint="the value does not fit the field's type"
            ) from None


def _put(message: Message, field: _Field, value: Any) -> None:
    place = getattr(message, field.name) if field.is_repeated or field.message_type else None
    if place is None:
        setattr(message, field.name, value)
    elif _is_map(field):
        _put_map(place, field, value)
    elif not field.is_repeated:
        place.SetInParent()
        _put_message(place, value)
    elif field.message_type:
        for item in value:
            _put_message(place.add(), item)
    else:
        place.extend(value)


def _put_map(place: Any, field: _Field, value: Mapping[Any, Any]) -> None:
    if field.message_type.fields_by_name["value"].message_type:
        for key, item in value.items():
            place[key].SetInParent()
            _put_message(place[key], item)
    else:
        place.update(value)


def _put_message(place: Message, value: Any) -> None:
    if isinstance(place, Timestamp):
        if not isinstance(value, dt.datetime) or value.tzinfo is None:
            raise ValueError(f"{value!r} is no time with a zone")
        place.FromDatetime(value)
    elif isinstance(value, BaseModel):
        _fill(place, value)
    else:
        raise TypeError(f"{type(value).__name__} is no twin of {place.DESCRIPTOR.full_name}")


def _fields(message: Message) -> dict[str, Any]:
    """What is set in ``message``, as plain values under its fields' names."""
    return {
        field.name: _get(message, field)
        for field in message.DESCRIPTOR.fields
        if not field.has_presence or message.HasField(field.name)
    }


def _get(message: Message, field: _Field) -> Any:
    value = getattr(message, field.name)
    if _is_map(field):
        nested = field.message_type.fields_by_name["value"].message_type is not None
        return {key: _plain(item) if nested else item for key, item in value.items()}
    if not field.message_type:
        return list(value) if field.is_repeated else value
    return [_plain(item) for item in value] if field.is_repeated else _plain(value)


def _plain(message: Message) -> Any:
    return message.ToDatetime(tzinfo=dt.UTC) if isinstance(message, Timestamp) else _fields(message)


def _is_map(field: _Field) -> bool:
    return bool(field.message_type and field.message_type.GetOptions().map_entry)
