"""What the next test finds is whole again, and what the last one did to it can be read when it failed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from esper_core.local import stack as local_stack
from tests.e2e.living import Living


@pytest.fixture(autouse=True)
async def mended(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    yield
    if "platform" not in request.fixturenames:
        return
    platform: Living = request.getfixturevalue("platform")
    for child in platform.status().children:
        print(f"{child.name}: {child.phase} {child.pid} restarts={child.restarts} {child.message}")
    for name, lines in (("supervisor", 30), ("services", 15), ("postgres", 15)):
        log = await asyncio.to_thread((platform.data_dir / "logs" / f"{name}.log").read_text, errors="replace")
        print(f"--- {name}", *(line[:400] for line in log.splitlines()[-lines:]), sep="\n")
    for training in platform.trainings:
        print(f"--- {training.name}", *training.stderr.splitlines()[-40:], sep="\n")
    await asyncio.to_thread(local_stack.up, platform.config)
