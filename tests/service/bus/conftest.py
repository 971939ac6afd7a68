"""A provisioned bus with empty streams, a database with the bus's schema, and consumers that are stopped afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from esper_core.bus import SCHEMA
from esper_core.bus.bus import Bus
from esper_core.bus.login import Login
from esper_core.bus.subjects import STREAMS
from esper_core.config import Endpoints
from esper_core.store.postgres import migrate, open_pool

Start = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


@pytest.fixture(scope="module")
async def connection(stack: Endpoints) -> AsyncIterator[Bus]:
    """A connection to the stack's NATS server as the one who may do everything there."""
    bus = await Bus.join(stack, "oona", "test")
    yield bus
    await bus.close()


@pytest.fixture
async def bus(connection: Bus) -> Bus:
    """A provisioned bus with empty streams and without consumers."""
    await connection.provision()
    for stream in STREAMS:
        for consumer in await connection.jetstream.consumers_info(stream.name):
            await connection.jetstream.delete_consumer(stream.name, consumer.name)
        await connection.jetstream.purge_stream(stream.name)
    return connection


@pytest.fixture(scope="module")
async def dsn(stack: Endpoints) -> AsyncIterator[str]:
    """A database with the bus's schema. No connection of this fixture is open meanwhile: tests kill the server."""
    name, main = f"bus_{secrets.token_hex(6)}", stack.postgres_dsn.get_secret_value()

    async def execute(statement: str) -> None:
        connection = await asyncpg.connect(main)
        await connection.execute(statement)
        await connection.close()

    await execute(f'CREATE DATABASE "{name}" STRATEGY = file_copy')
    dsn = main.replace("/esper?", f"/{name}?")
    await migrate(dsn, {"bus": SCHEMA})
    yield dsn
    await execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
async def pool(dsn: str) -> AsyncIterator[asyncpg.Pool]:
    """Empty tables of the bus, and one named ``effects``."""
    pool = await open_pool(dsn)
    await pool.execute(
        "TRUNCATE bus.outbox, bus.inbox, bus.streams, bus.dead_letters RESTART IDENTITY;"
        "DROP TABLE IF EXISTS effects; CREATE TABLE effects (position serial, epoch int)"
    )
    yield pool
    await asyncio.wait_for(pool.close(), 5)


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts a forever-task; all are cancelled afterwards, and one that died of something else fails the test."""
    tasks: list[asyncio.Task[None]] = []

    def begin(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        tasks.append(asyncio.create_task(work))
        return tasks[-1]

    yield begin
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], Awaitable[Any]], seconds: float = 10.0) -> Any:
    """Wait until ``condition`` is true and return what it said."""
    async with asyncio.timeout(seconds):
        while not (said := await condition()):  # noqa: ASYNC110 - what is awaited happens in a server
            await asyncio.sleep(0.02)
        return said


class NatsServer:
    """A nats-server of one's own, to be killed and robbed."""

    def __init__(self, folder: Path) -> None:
        self.store = folder / "store"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.config = folder / "nats.conf"
        self.config.write_text(f'listen: "127.0.0.1:{self.port}"\njetstream {{ store_dir: "{self.store}" }}\n')
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name("nats-server"), "-c", self.config],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 0.2):
                return
            time.sleep(0.02)
        raise TimeoutError("nats-server does not listen")

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self) -> None:
        """As an operator stops it."""
        if self.process:
            self.process.terminate()
            self.process.wait(10)
            self.process = None

    def wipe(self) -> None:
        shutil.rmtree(self.store)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
async def own_bus(server: NatsServer) -> AsyncIterator[Bus]:
    """A provisioned bus on ``server``."""
    bus = await Bus.connect(server.url, Login(), "own")
    await bus.provision()
    yield bus
    await bus.close()
