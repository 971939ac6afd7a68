"""Two forges are killed at random moments through many builds: each is done exactly once, and nothing is told twice.

What it has found so far (seed, fault, what was wrong): nothing yet.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import secrets
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import SecretStr

import services.tezzeret
from esper_core.blueprint.catalogue import candidates
from esper_core.bus import subjects
from esper_core.config import ENDPOINTS_FILE, Endpoints
from esper_core.store.postgres import migrate
from services.tezzeret import builds
from services.tezzeret.builds import Wish
from services.tezzeret.toolchain import here
from services.tezzeret.worker import MAX_FAILURES
from tests.service.innovation.papers import interface
from tests.service.platform import Stage

INTERFACES = 25  # eight kernels each
KILLS = 10
BETWEEN = 0, 15  # builds done between an order and the kill
PAUSE = 0, 0.012  # seconds between a claim and the kill: a build takes longer
LEASE_SECONDS = 1.5
PATIENCE = 500.0
FORGE = "services.tezzeret.forge"


@dataclass
class Smithy:
    """One forge, started again whenever it was killed."""

    data_dir: Path
    process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process is not None else None

    async def open(self) -> None:
        command = (sys.executable, "-m", "services.tezzeret", "--data-dir", str(self.data_dir))
        options = ("--lease-seconds", str(LEASE_SECONDS), "--log-level", "warning")
        self.process = await asyncio.create_subprocess_exec(*command, *options)

    async def strike(self, whom: str) -> bool:
        """Kill -9 the forge, or the child that builds for it; False when there is none to kill."""
        assert self.process is not None
        if whom == "child":
            try:
                children = psutil.Process(self.process.pid).children()
            except psutil.NoSuchProcess:
                return False
            found = [child for child in children if FORGE in child.cmdline()]
            for child in found:
                child.kill()
            return bool(found)
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()
        await self.open()
        return True

    async def close(self) -> None:
        assert self.process is not None
        self.process.terminate()
        await self.process.wait()


@pytest.fixture
async def smithies(stage: Stage, tmp_path: Path) -> AsyncIterator[list[Smithy]]:
    """Two forges on a platform without any of its own."""
    await migrate(
        stage.endpoints.postgres_dsn.get_secret_value(),
        {"tezzeret": Path(services.tezzeret.__path__[0]) / "schema"},
    )
    (tmp_path / ENDPOINTS_FILE).write_text(json.dumps(_plain(stage.endpoints)))
    made = [Smithy(tmp_path), Smithy(tmp_path)]
    await asyncio.gather(*(smithy.open() for smithy in made))
    yield made
    await asyncio.gather(*(smithy.close() for smithy in made))


def _plain(endpoints: Endpoints) -> dict[str, Any]:
    """As the platform writes them down: with their secrets."""
    values = endpoints.model_dump(mode="python")
    shown = {key: value.get_secret_value() if isinstance(value, SecretStr) else value for key, value in values.items()}
    return {key: str(value) if isinstance(value, Path) else value for key, value in shown.items()}


@pytest.mark.timeout(600)  # on a machine that is busy with other things
async def test_forges_killed_at_random_build_everything_exactly_once(stage: Stage, smithies: list[Smithy]) -> None:
    seed = int(os.environ.get("FAULT_SEED") or secrets.randbelow(2**32))
    print(f"replay: FAULT_SEED={seed} python -m pytest tests/service/innovation/test_forges_killed.py")
    wishes = wished(INTERFACES)
    assert len(wishes) == len({wish.build_id for wish in wishes}) == 8 * INTERFACES
    killed = await storm(stage, smithies, wishes, random.Random(seed))
    print(f"killed: {dict(killed)}")
    await finished(stage, wishes)
    assert sum(killed.values()) == KILLS

    ids = [wish.build_id for wish in wishes]
    rows = await stage.database.fetch("SELECT * FROM tezzeret.builds WHERE build_id = ANY($1)", ids)
    kernels = [row["kernel_id"] for row in rows]
    assert Counter(row["state"] for row in rows) == {3: len(wishes)}
    assert len(set(kernels)) == len(wishes)
    print(f"begun more than once: {sum(row['attempts'] > 1 for row in rows)} of {len(rows)}")

    stored = await stage.database.fetch(
        "SELECT blueprint_id, interface_id, manifest FROM urza.kernels WHERE kernel_id = ANY($1)", kernels
    )
    assert len(stored) == len(wishes)
    named = {(row["blueprint_id"], row["interface_id"], _symbols(row["manifest"])) for row in stored}
    assert named == {(wish.blueprint_id, wish.interface.id, _sorted(wish.symbols)) for wish in wishes}
    of_interfaces = await stage.database.fetchval(
        "SELECT count(*) FROM urza.kernels WHERE interface_id = ANY($1)", [wish.interface.id for wish in wishes]
    )
    assert of_interfaces == len(wishes)  # nothing was built beside what is told of
    for kernel_id in kernels:
        told = await stage.database.fetchval(
            "SELECT count(*) FROM bus.outbox WHERE subject = $1 AND position($2::bytea IN data) > 0",
            subjects.KERNEL_READY.of(),
            kernel_id.encode(),
        )
        assert told == 1


def wished(interfaces: int) -> list[Wish]:
    """Eight kernels for each of so many new slots."""
    found = []
    for _ in range(interfaces):
        slot = interface(in_width=24)
        fitting = candidates(slot)[:8]
        found += [
            Wish(blueprint_id=ir.id, interface=slot, symbols=ir.bind(symbols), pipeline="fast", rank=rank).on(here())
            for rank, (_, ir, symbols) in enumerate(fitting)
        ]
    return found


async def storm(stage: Stage, smithies: list[Smithy], wishes: list[Wish], chance: random.Random) -> Counter[str]:
    """Order piece by piece, and strike forges that are at work; how often each kind of victim died."""
    killed: Counter[str] = Counter()
    struck: Counter[str] = Counter()
    pieces = [wishes[start :: KILLS + 1] for start in range(KILLS + 1)]
    for piece in pieces[:-1]:
        await order(stage, piece)
        await progress(stage, chance.randint(*BETWEEN))
        victim = chance.choice(("forge", "forge", "child"))
        while True:
            async with asyncio.timeout(PATIENCE):
                held = await working(stage, smithies)
            await asyncio.sleep(chance.uniform(*PAUSE))
            target = chance.choice(smithies)
            if held is not None:
                pid, build_id = held
                target = next(smithy for smithy in smithies if smithy.pid == pid)
                victim = "forge" if struck[build_id] == MAX_FAILURES - 1 else victim
                struck[build_id] += victim == "child"
            if await target.strike(victim):
                killed[victim] += 1
                break
            victim = "forge"
    await order(stage, pieces[-1])
    return killed


async def order(stage: Stage, wishes: list[Wish]) -> None:
    async with stage.database.acquire() as connection, connection.transaction():
        for wish in wishes:
            assert await builds.add(connection, wish)
        await connection.execute("SELECT pg_notify('esper_news', 'tezzeret')")


async def progress(stage: Stage, number: int) -> None:
    """Return when so many more builds are done."""
    count = "SELECT count(*) FROM tezzeret.builds WHERE state = 3"
    goal = await stage.database.fetchval(count) + number
    async with asyncio.timeout(PATIENCE):
        while await stage.database.fetchval(count) < goal:  # noqa: ASYNC110
            await asyncio.sleep(0.003)


async def working(stage: Stage, smithies: list[Smithy]) -> tuple[int, str] | None:
    """A living forge's process and the build it holds; None when there is nothing left to do."""
    while True:
        row = await stage.database.fetchrow(
            "SELECT pid, build_id FROM tezzeret.builds JOIN tezzeret.forges ON forge = claimed_by"
            " WHERE lease_until > now() AND pid = ANY($1) LIMIT 1",
            [smithy.pid for smithy in smithies],
        )
        if row is not None:
            return row["pid"], row["build_id"]
        if not await stage.database.fetchval("SELECT count(*) FROM tezzeret.builds WHERE state IN (1, 2)"):
            return None
        await asyncio.sleep(0.003)


async def finished(stage: Stage, wishes: list[Wish]) -> None:
    ids = [wish.build_id for wish in wishes]
    async with asyncio.timeout(PATIENCE):
        while await stage.database.fetchval(  # noqa: ASYNC110
            "SELECT count(*) FROM tezzeret.builds WHERE build_id = ANY($1) AND state IN (1, 2)", ids
        ):
            await asyncio.sleep(0.05)


def _sorted(symbols: Any) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((str(name), int(value)) for name, value in symbols.items()))


def _symbols(manifest: str) -> tuple[tuple[str, int], ...]:
    return _sorted(json.loads(manifest)["symbols"])
