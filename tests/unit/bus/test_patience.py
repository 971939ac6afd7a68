"""What passes is waited out, what does not is not, and whoever is told to stop stops."""

from __future__ import annotations

import asyncio

import nats.errors
import pytest

from esper_core.bus.patience import insist, persist
from esper_core.errors import InvalidInput, Unavailable


async def test_work_is_taken_up_again_until_it_fails_for_good() -> None:
    troubles: list[Exception] = [Unavailable("away"), nats.errors.TimeoutError(), ConnectionResetError()]

    async def work() -> None:
        if troubles:
            raise troubles.pop()
        raise InvalidInput("never right")

    with pytest.raises(InvalidInput):
        await asyncio.wait_for(persist(work, "w"), 5)
    assert troubles == []


async def test_insisting_has_an_end() -> None:
    tries = 0

    async def work() -> None:
        nonlocal tries
        tries += 1
        raise Unavailable("away")

    with pytest.raises(Unavailable):
        await insist(work, (Unavailable,), seconds=0.35)
    assert tries == 3  # at 0, 0.1 and 0.3 s
    with pytest.raises(Unavailable):
        await insist(work, (OSError,))
    assert tries == 4


async def test_a_cancellation_that_the_work_swallows_is_heeded_all_the_same() -> None:
    async def deaf() -> None:
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            raise nats.errors.ConnectionClosedError from None

    for forever in (persist(deaf, "deaf"), insist(deaf, (nats.errors.Error,))):
        task = asyncio.create_task(forever)
        await asyncio.sleep(0.01)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=2)
        assert done == {task}
        assert task.cancelled()
