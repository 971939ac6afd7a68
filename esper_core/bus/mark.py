"""A mark in a stream: what was last acknowledged there, by which one can tell later whether the stream still holds it.

Detects a stream that was made anew and one whose end is gone, as after a wiped, truncated or damaged data directory.
A hole in the middle is not seen from here; see ``rebuild``.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

import nats.errors
import nats.js.errors
from nats.js.api import StreamInfo

from esper_core.bus.bus import Bus, translated
from esper_core.bus.subjects import Stream
from esper_core.clock import SYSTEM

MARGIN = 3600.0  # seconds by which the server's ageing and our clocks may disagree


@dataclass(frozen=True)
class Mark:
    """The last message known to be in a stream.

    Attributes:
        created: the stream's incarnation.
        sequence: the message's place; 0 when none is known.
        message_id: its ``Nats-Msg-Id``.
        acked: when the stream acknowledged it; None when no message is known.
    """

    created: dt.datetime | None
    sequence: int = 0
    message_id: str = ""
    acked: dt.datetime | None = None


async def damage(bus: Bus, stream: Stream, info: StreamInfo, mark: Mark) -> str:
    """What happened to ``stream`` since ``mark``, in words; empty when it is still the one that was marked.

    Raises:
        Unavailable: JetStream does not answer.
    """
    if info.created != mark.created:
        return "it was made anew"
    if stream.shed or mark.acked is None:
        return ""
    if (SYSTEM.now() - mark.acked).total_seconds() > stream.max_age - MARGIN:
        return ""
    try:
        message = await bus.jetstream.get_msg(stream.name, mark.sequence)
    except nats.js.errors.NotFoundError:
        return "its end is gone"
    except (nats.errors.Error, TimeoutError, OSError) as error:
        raise translated(error, f"reading message {mark.sequence} of {stream.name}") from error
    return "" if (message.headers or {}).get("Nats-Msg-Id") == mark.message_id else "its end is another's"


def generation_id(event_id: str, generation: int) -> str:
    """The ``Nats-Msg-Id`` for publishing an event when its stream is filled for the ``generation``-th time.

    A server goes on dropping the ids of messages it has lost for as long as its duplicate window reaches back.
    """
    return f"{event_id}/{generation}" if generation else event_id
