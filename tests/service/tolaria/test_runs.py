"""The book of runs: what training processes tell, in whatever order it comes in."""

from __future__ import annotations

import asyncio

import pytest

from esper_core.bus import subjects
from esper_core.bus.envelope import unwrap
from esper_core.errors import InvalidInput, NotFound
from esper_core.pb.esper.core.v1 import run_pb2
from esper_core.pb.esper.tolaria.v1 import tolaria_pb2
from services.bell import Bell
from services.tolaria.runs import Runs
from services.tolaria.service import Projection
from tests.service.platform import SLOT, Stage, epoch_completed, registration, until


async def get(stage: Stage, run_id: str) -> run_pb2.Run:
    answer = await stage.stub("tolaria").GetRun(tolaria_pb2.GetRunRequest(run_id=run_id))
    return answer.run


async def test_a_run_from_registration_to_its_end(stage: Stage, run_id: str) -> None:
    await stage.register(run_id)
    run = await until(lambda: get(stage, run_id))
    assert (run.state, run.host, run.dataset, run.epochs) == (run_pb2.RUN_STATE_RUNNING, "mlp", "digits", 30)
    assert [slot.slot for slot in run.slots] == [SLOT]
    assert not run.HasField("latest")
    assert run.started
    await stage.epoch(run_id, 0, 2.0)
    await stage.epoch(run_id, 1, 1.5)
    await stage.end(run_id, reason="done")
    run = await until(lambda: _ended(stage, run_id))
    assert (run.latest.epoch, run.latest.train_loss) == (1, 1.5)
    assert (run.state, run.reason, run.results["test_accuracy"]) == (run_pb2.RUN_STATE_FINISHED, "done", 0.75)


async def _ended(stage: Stage, run_id: str) -> run_pb2.Run | None:
    run = await get(stage, run_id)
    return run if run.state != run_pb2.RUN_STATE_RUNNING else None


async def test_latest_is_the_newest_and_a_mistyped_name_is_guessed(stage: Stage, run_id: str) -> None:
    await stage.register(run_id)
    await until(lambda: get(stage, run_id))
    assert (await get(stage, "latest")).run_id == run_id
    with pytest.raises(NotFound) as caught:
        await get(stage, run_id[:-1] + "z")
    assert run_id in caught.value.hint


async def test_facts_out_of_order_give_the_same_run(stage: Stage, run_id: str) -> None:
    """End and epochs overtake the registration; the last epoch is the one with the highest sequence."""
    opened = stage.seal(registration(run_id), run_id)
    first, second = (stage.seal(epoch_completed(run_id, n, float(n)), run_id, n) for n in (0, 1))
    await stage.end(run_id)
    for subject, envelope in (
        (subjects.EPOCH_EVENTS, second),
        (subjects.EPOCH_EVENTS, first),
        (subjects.RUN_EVENTS, opened),
    ):
        await stage.send(subject, envelope)
    run = await until(lambda: get(stage, run_id))
    assert (run.state, run.latest.epoch) == (run_pb2.RUN_STATE_FINISHED, 1)


async def test_going_back_to_a_checkpoint_voids_the_epochs_after_it(stage: Stage, run_id: str) -> None:
    await stage.register(run_id)
    for epoch in range(4):
        await stage.epoch(run_id, epoch, 10.0 + epoch)
    await until(lambda: _at(stage, run_id, 3))  # or the first pass through epoch 1 could be taken for the way back
    late = stage.seal(epoch_completed(run_id, 3, 99.0), run_id, 3)
    await stage.end(run_id, run_pb2.RUN_STATE_STOPPED)
    await stage.register(run_id, epoch=2)
    await stage.send(subjects.EPOCH_EVENTS, late)
    run = await until(lambda: _back(stage, run_id))
    assert (run.latest.epoch, run.latest.train_loss) == (1, 11.0)
    await stage.epoch(run_id, 2, 20.0)
    await until(lambda: _at(stage, run_id, 2))
    losses = [news.latest.train_loss for news in await _watched(stage, run_id, 3)]
    assert losses == [10.0, 11.0, 20.0]


async def _back(stage: Stage, run_id: str) -> run_pb2.Run | None:
    run = await get(stage, run_id)
    return run if run.state == run_pb2.RUN_STATE_RUNNING and run.latest.epoch == 1 else None


async def _at(stage: Stage, run_id: str, epoch: int) -> bool:
    return (await get(stage, run_id)).latest.epoch == epoch


async def _watched(stage: Stage, run_id: str, count: int) -> list[run_pb2.Run]:
    call = stage.stub("tolaria").WatchRun(tolaria_pb2.WatchRunRequest(run_id=run_id))
    seen: list[run_pb2.Run] = []
    async for news in call:
        seen.append(news.run)
        if len(seen) == count:
            call.cancel()
            break
    return seen


async def test_a_watch_begins_with_history_goes_on_live_and_ends_with_the_run(stage: Stage, run_id: str) -> None:
    await stage.register(run_id)
    for epoch in range(3):
        await stage.epoch(run_id, epoch)
    await until(lambda: _at(stage, run_id, 2))

    async def watch() -> list[tuple[int, int]]:
        call = stage.stub("tolaria").WatchRun(tolaria_pb2.WatchRunRequest(run_id=run_id))
        return [(news.run.latest.epoch, news.run.state) async for news in call]

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0.1)
    for epoch in range(3, 6):
        await stage.epoch(run_id, epoch)
    await until(lambda: _at(stage, run_id, 5))
    await stage.end(run_id)
    seen = await asyncio.wait_for(watching, 10)
    assert list(dict.fromkeys(epoch for epoch, _ in seen)) == [0, 1, 2, 3, 4, 5]
    assert seen[-1] == (5, run_pb2.RUN_STATE_FINISHED)


async def test_lists_in_pages_newest_first(stage: Stage) -> None:
    names = [f"page-{n}-{stage.endpoints.metrics_port}" for n in range(3)]
    for name in names:
        await stage.register(name)
        await stage.end(name, run_pb2.RUN_STATE_FAILED)
        await until(lambda name=name: _ended(stage, name))
    request = tolaria_pb2.ListRunsRequest(state=run_pb2.RUN_STATE_FAILED, page_size=2)
    first = await stage.stub("tolaria").ListRuns(request)
    request.page_token = first.next_page_token
    second = await stage.stub("tolaria").ListRuns(request)
    assert [run.run_id for page in (first, second) for run in page.runs] == names[::-1]
    assert second.next_page_token == ""
    with pytest.raises(InvalidInput):
        await stage.stub("tolaria").ListRuns(tolaria_pb2.ListRunsRequest(page_token="elsewhere"))


async def test_an_event_that_speaks_of_another_run_is_refused(stage: Stage, run_id: str) -> None:
    handle = Projection(Runs(stage.database), Bell(stage.database, asyncio.Event())).handle
    astray = unwrap(stage.seal(epoch_completed("someone-else", 0), run_id).SerializeToString())
    async with stage.database.acquire() as connection:
        with pytest.raises(InvalidInput, match="someone-else"):
            await handle(connection, astray)
