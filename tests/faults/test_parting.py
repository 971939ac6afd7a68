"""Who leaves while the other side is gone leaves quietly."""

from __future__ import annotations

import asyncio
from pathlib import Path

from esper_core.bus.bus import Bus
from esper_core.bus.login import Login
from tests.service.bus.conftest import NatsServer


async def test_a_bus_whose_server_died_is_closed_without_a_word(tmp_path: Path) -> None:
    server = NatsServer(tmp_path)
    server.start()
    try:
        for pause in (0.0, 0.05):  # before and after the client notices
            bus = await Bus.connect(server.url, Login(), "leaving")
            server.kill()
            await asyncio.sleep(pause)
            await bus.client.publish("last.words", b"x" * 100_000)
            await bus.close()
            await bus.close()
            server.start()
    finally:
        server.kill()
