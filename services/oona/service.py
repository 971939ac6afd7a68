"""Oona, the message bus: the streams, the outbox relay and the dead-letter book.

Serves no RPC of its own. The relay keeps the streams as declared and fills them again when they were wiped.
"""

from __future__ import annotations

from functools import partial

from esper_core.bus.dead import collect
from esper_core.bus.outbox import relay
from services.runtime import Platform, Service


async def build(platform: Platform) -> Service:
    """Make the streams, so that every other service finds them.

    Raises:
        Unavailable: JetStream does not answer.
        Conflict: the server keeps other stream settings than asked for.
    """
    await platform.bus.provision()
    return Service(
        name="oona",
        tasks=(partial(relay, platform.database, platform.bus), partial(collect, platform.database, platform.bus)),
    )
