"""The platform's services are killed in the middle of a search of Karn's: it goes on by itself to its end, and proposes, builds and
measures what it would have, each once.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from typing import Any

import pytest

from tests.e2e.living import NARROW, Living, until

pytestmark = pytest.mark.timeout(300)  # on a machine that is busy with other things
GENERATIONS, POPULATION = 3, 2
RUN = {"optimization": {"epochs": 2}, "morphogenetic": {"prepare_seconds": 1, "spans": [NARROW.split(":")]}}


async def test_a_search_survives_kill_nine(platform: Living) -> None:
    training = platform.train("muse", "--no-twin", settings=RUN)
    assert await training.ends() == 0, training.stderr

    async def met() -> list[dict[str, Any]]:
        known: list[dict[str, Any]] = await platform.read("karn", "interfaces")
        return known

    slot = (await until(met))[0]["interface_id"]
    size = ("-g", str(GENERATIONS), "-p", str(POPULATION), "--seed", "8")
    search = (await platform.read("karn", "run", "--interface", slot, *size, "--detach"))["search_id"]

    async def now() -> dict[str, Any]:
        found = await platform.read("karn", "searches")
        return next(other for other in found if other["search_id"] == search)

    async def under_way() -> bool:
        told = await now()
        return bool(told["generation"] >= 1 and told["proposed"] > POPULATION)

    await until(under_way, 120)
    killed = platform.pid("services")
    assert killed is not None
    os.kill(killed, signal.SIGKILL)

    async def another() -> bool:
        return platform.pid("services") not in (None, killed)

    await until(another)
    await platform.healed()

    async def over() -> bool:
        return (await now())["state"] == "FINISHED"

    await until(over, 180)
    told = await now()
    assert (told["generation"], told["proposed"], told["waiting"]) == (GENERATIONS, GENERATIONS * POPULATION, 0)
    proposals = [p for p in await platform.read("karn", "proposals", "--limit", "1000") if p["search_id"] == search]
    assert len(proposals) == told["proposed"]
    assert {proposal["state"] for proposal in proposals} <= {"MEASURED", "FAILED", "REJECTED"}
    kernels = [proposal["kernel_id"] for proposal in proposals if proposal["state"] == "MEASURED"]
    assert kernels
    assert len(set(kernels)) == len(kernels)
    builds = Counter(build["kernel_id"] for build in await platform.read("build", "list", "--limit", "1000"))
    assert {builds[kernel] for kernel in kernels} == {1}
