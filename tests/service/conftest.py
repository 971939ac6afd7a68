"""``stage``: a running platform, one per test module."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator

import asyncpg
import pytest

from esper_core.config import Endpoints
from tests.service.platform import Stage, on_free_ports, staged


@pytest.fixture(scope="module")
async def stage(stack: Endpoints) -> AsyncIterator[Stage]:
    """A running platform (without forge and evaluation) on a new database."""
    name = f"test_{secrets.token_hex(6)}"
    dsn = stack.postgres_dsn.get_secret_value()
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(f'CREATE DATABASE "{name}" STRATEGY = file_copy')
        async with staged(on_free_ports(stack, dsn.replace("/esper?", f"/{name}?"))) as stage:
            yield stage
    finally:
        await connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        await connection.close()


@pytest.fixture
def run_id() -> str:
    """A run of the test's own."""
    return f"run-{secrets.token_hex(6)}"
