"""Oona, Urza, Tezzeret and Urabrask as the platform runs them, over real servers, once for all tests here."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aioboto3
import asyncpg
import pytest
from pydantic import SecretStr

from esper_core.bus.database import Pool
from esper_core.config import Endpoints
from esper_core.store.blobs import Blobs
from esper_core.store.postgres import migrate
from services.composition import run, schemas
from tests.service.innovation.papers import Innovation
from tests.service.innovation.shelf import scratch
from tests.service.innovation.store import Shelf

NAMES = ("oona", "urza", "tezzeret", "urabrask")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def own_nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A nats-server of our own: consumers have global names, and other tests purge the shared one."""
    with nats_in(tmp_path_factory.mktemp("nats")) as url:
        yield url


@contextlib.contextmanager
def nats_in(folder: Path) -> Iterator[str]:
    """The address of a running nats-server that keeps its streams in ``folder``."""
    port = free_port()
    config = folder / "nats.conf"
    config.write_text(f'listen: "127.0.0.1:{port}"\njetstream {{ store_dir: "{folder}" }}\n')
    program = Path(sys.executable).with_name("nats-server")
    process = subprocess.Popen([program, "-c", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 10
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
            break
        assert time.monotonic() < deadline, "nats-server does not listen"
        time.sleep(0.02)
    try:
        yield f"nats://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
async def endpoints(stack: Endpoints, own_nats: str) -> AsyncIterator[Endpoints]:
    """The stack with a NATS, a database, a bucket and ports of our own."""
    dsn = stack.postgres_dsn.get_secret_value()
    await _administer(
        dsn, "DROP DATABASE IF EXISTS innovation WITH (FORCE)", "CREATE DATABASE innovation STRATEGY = file_copy"
    )
    grpc = f"127.0.0.1:{free_port()}"
    yield stack.model_validate(
        {
            **stack.model_dump(),
            "nats_url": own_nats,
            "nats_keys_dir": None,
            "postgres_dsn": dsn.replace("/esper?", "/innovation?"),
            "s3_bucket": "innovation",
            "grpc_address": grpc,
            "grpc_listen": grpc,
            "metrics_port": free_port(),
        }
    )
    await _administer(dsn, "DROP DATABASE innovation WITH (FORCE)")


async def _administer(dsn: str, *statements: str) -> None:
    """On a connection of its own: others kill the server during a session."""
    connection = await asyncpg.connect(dsn)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


@pytest.fixture(scope="session")
async def innovation(endpoints: Endpoints) -> AsyncIterator[Innovation]:
    """The running services and ways to talk to them."""
    task = asyncio.create_task(run(endpoints, NAMES))
    made = await Innovation.connect(endpoints)
    yield made
    await made.close()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@pytest.fixture(scope="session")
def s3(endpoints: Endpoints) -> contextlib.AbstractAsyncContextManager[object]:
    """A client of the blob store behind Urza's back."""
    client: contextlib.AbstractAsyncContextManager[object] = aioboto3.Session().client(
        "s3",
        endpoint_url=endpoints.s3_endpoint,
        aws_access_key_id=endpoints.s3_access_key,
        aws_secret_access_key=endpoints.s3_secret_key.get_secret_value(),
        region_name=endpoints.s3_region,
    )
    return client


@pytest.fixture(scope="module")
async def bare(endpoints: Endpoints) -> AsyncIterator[Innovation]:
    """The library alone, on a database of its own that also has Urabrask's tables: for judges that tests start."""
    dsn = endpoints.postgres_dsn.get_secret_value()
    name = f"bare_{secrets.token_hex(4)}"
    await _administer(dsn, f'CREATE DATABASE "{name}" STRATEGY = file_copy')
    grpc = f"127.0.0.1:{free_port()}"
    own = endpoints.model_copy(
        update={
            "postgres_dsn": SecretStr(dsn.replace("/innovation?", f"/{name}?")),
            "grpc_address": grpc,
            "grpc_listen": grpc,
            "metrics_port": free_port(),
        }
    )
    await migrate(own.postgres_dsn.get_secret_value(), schemas(("urza", "urabrask")))
    task = asyncio.create_task(run(own, ("urza",)))
    made = await Innovation.connect(own)
    yield made
    await made.close()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await _administer(dsn, f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture(scope="module")
async def shelf_pool(stack: Endpoints) -> AsyncIterator[Pool]:
    """The library's tables on a database of the module's own."""
    async with scratch(stack) as pool:
        yield pool


@pytest.fixture
async def shelf(stack: Endpoints, bucket: Endpoints, shelf_pool: Pool) -> AsyncIterator[Shelf]:
    """An empty library that a test fills and collects itself."""
    await shelf_pool.execute(
        """TRUNCATE urza.kernels, urza.natives, urza.attestations, urza.usage, urza.tombstones, urza.copies, urza.upkeep;
           INSERT INTO urza.upkeep DEFAULT VALUES"""
    )
    own = await shelf_pool.fetchval("SELECT current_database()")
    dsn = stack.postgres_dsn.get_secret_value().replace("/esper?", f"/{own}?")
    async with await Blobs.open(bucket) as blobs:
        yield Shelf.on(shelf_pool, blobs, bucket, dsn)
