"""The real servers, once per test session: NATS, PostgreSQL and S3 as `esperctl up` starts them, without the services.

``stack`` gives their endpoints; ``database`` and ``bucket`` give one test an empty corner of its own. ``platform`` is
another stack, whole, with its services: for those who look at it from outside and for those who kill it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest

from esper_core.config import Endpoints, PlatformConfig
from esper_core.local import stack as local_stack
from tests.e2e.living import Living, living

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # connections that end are part of the tests
os.environ["ESPER_FORGE_POLITE"] = "0"  # tests keep every core busy and wait for kernels all the same


@pytest.fixture(scope="session")
def stack() -> Iterator[Endpoints]:
    """Endpoints of a running stack on free ports in a temporary directory."""
    # not pytest's own temporary directory: under root that one is closed to the account PostgreSQL runs as
    folder = Path(tempfile.mkdtemp(prefix="esper-test-"))
    config = PlatformConfig(data_dir=folder, services_command=())
    try:
        yield local_stack.up(config)
    finally:
        local_stack.down(config)
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def platform() -> Iterator[Living]:
    """A running platform with everything that `esperctl up` starts."""
    with living() as platform:
        yield platform


@pytest.fixture
async def database(stack: Endpoints) -> AsyncIterator[str]:
    """DSN of a new, empty database, dropped afterwards."""
    name = f"test_{secrets.token_hex(6)}"
    dsn = stack.postgres_dsn.get_secret_value()
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(f'CREATE DATABASE "{name}" STRATEGY = file_copy')
        yield dsn.replace("/esper?", f"/{name}?")
        await connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    finally:
        await connection.close()


@pytest.fixture
async def bucket(stack: Endpoints) -> Endpoints:
    """The endpoints with a new, empty bucket in them; its blobs go with the session."""
    import aioboto3

    name = f"test-{secrets.token_hex(6)}"
    async with aioboto3.Session().client(
        "s3",
        endpoint_url=stack.s3_endpoint,
        aws_access_key_id=stack.s3_access_key,
        aws_secret_access_key=stack.s3_secret_key.get_secret_value(),
        region_name=stack.s3_region,
    ) as s3:
        await s3.create_bucket(Bucket=name)
    return stack.model_copy(update={"s3_bucket": name})
