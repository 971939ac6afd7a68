"""``grown``: the one run that these tests look at from all sides."""

from __future__ import annotations

import json

import pytest

from tests.e2e.living import NARROW, Grown, Living, until


@pytest.fixture(scope="session")
async def grown(platform: Living) -> Grown:
    training = platform.train("adaptation")
    assert await training.ends() == 0, training.stderr
    figures = json.loads(training.stdout)

    async def told() -> bool:
        return (await platform.read("runs", "show", "adaptation"))["state"] == "FINISHED"

    await until(told)
    return Grown(training, figures, await platform.read("seed", "show", NARROW, "--run", "adaptation"))
