"""A bell: wakes those who wait for news in the database, so that a watch needs neither busy polling nor a connection.

Whoever commits news calls ``ring`` inside the transaction; one connection per process listens and wakes the waiters of
that name. A lost notification costs at most ``timeout`` seconds, never a row: waiters read rows by ordinal.
"""

from __future__ import annotations

import asyncio

import asyncpg

from esper_core.bus.database import Connection, Pool
from esper_core.errors import Unavailable

CHANNEL = "esper_news"
CHECK_SECONDS = 5.0


class Bell:
    """Rings, by name, in every process of the platform once a transaction that rang it has committed."""

    def __init__(self, database: Pool, draining: asyncio.Event) -> None:
        self._database = database
        self._draining = draining
        self._rung: dict[str, asyncio.Event] = {}

    async def ring(self, connection: Connection, name: str) -> None:
        """Announce news under ``name`` at the commit of the transaction that ``connection`` is in."""
        await connection.execute("SELECT pg_notify($1, $2)", CHANNEL, name)

    async def listen(self) -> None:
        """Forward notifications until cancelled.

        Raises:
            Unavailable: the database connection was lost; call again.
        """
        async with self._database.acquire() as connection:
            await connection.add_listener(CHANNEL, self._heard)
            try:
                for name in list(self._rung):
                    self._wake(name)
                while True:
                    await asyncio.sleep(CHECK_SECONDS)
                    await connection.execute("SELECT 1")
            except (OSError, asyncpg.InterfaceError, asyncpg.PostgresConnectionError) as error:
                raise Unavailable("the listener lost its database connection") from error
            finally:
                if not connection.is_closed():
                    await connection.remove_listener(CHANNEL, self._heard)

    def expect(self, name: str) -> asyncio.Event:
        """Set at the next ring for ``name``; ask for it *before* reading rows, so that nothing falls in between."""
        return self._rung.setdefault(name, asyncio.Event())

    async def wait(self, rung: asyncio.Event, timeout: float = 2.0) -> None:
        """Return when it has rung, or after ``timeout`` seconds.

        Raises:
            Unavailable: the platform is stopping.
        """
        waits = [asyncio.ensure_future(rung.wait()), asyncio.ensure_future(self._draining.wait())]
        try:
            await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self._draining.is_set():
            raise Unavailable("the platform is stopping", hint="watch again when it is back")

    def _heard(self, _connection: object, _pid: object, _channel: object, payload: object) -> None:
        self._wake(str(payload))

    def _wake(self, name: str) -> None:
        """Wake those who expect it; whoever asks from now on expects the next ring."""
        rung = self._rung.pop(name, None)
        if rung is not None:
            rung.set()
