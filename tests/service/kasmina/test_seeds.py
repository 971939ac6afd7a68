"""The projection of seeds: the same rows for any order and number of deliveries; histories and live streams."""

from __future__ import annotations

import asyncio
import itertools
import random
from typing import Any

import pytest

from esper_core.bus import subjects
from esper_core.bus.envelope import Event, unwrap
from esper_core.errors import InvalidInput, NotFound, Unavailable
from esper_core.lifecycle import State
from esper_core.pb.esper.core.v1 import decision_pb2, lifecycle_pb2
from esper_core.pb.esper.kasmina.v1 import kasmina_pb2
from services.bell import Bell
from services.kasmina.projection import Projection
from services.kasmina.service import Facts
from tests.service.platform import SLOT, Stage, registration, seed_event, telemetry, until

PATH = (
    State.DORMANT, State.GERMINATED, State.LOADING, State.TRAINING, State.GRAFTING, State.STABILIZATION,
    State.EVALUATING, State.FINE_TUNING, State.FOSSILIZED,
)  # fmt: skip


async def get(stage: Stage, run_id: str, slot: str = SLOT, **fields: int) -> lifecycle_pb2.Seed:
    request = kasmina_pb2.GetSeedRequest(run_id=run_id, slot=slot, **fields)
    answer = await stage.stub("kasmina").GetSeed(request)
    return answer.seed


async def listed(stage: Stage, run_id: str, *states: int) -> list[tuple[str, int, int]]:
    request = kasmina_pb2.ListSeedsRequest(run_id=run_id, states=states)
    answer = await stage.stub("kasmina").ListSeeds(request)
    return [(seed.slot, seed.generation, seed.state) for seed in answer.seeds]


async def walk(stage: Stage, run_id: str, path: tuple[State, ...], epoch: int = 0, **fields: Any) -> None:
    for step, (source, target) in enumerate(itertools.pairwise(path)):
        await stage.seed(run_id, source, target, epoch + step, **fields)


async def test_registration_plants_dormant_seeds(stage: Stage, run_id: str) -> None:
    await stage.register(run_id, ("a:b", "b:c"))
    seeds = await until(lambda: listed(stage, run_id))
    assert sorted(seeds) == [("a:b", 0, State.DORMANT), ("b:c", 0, State.DORMANT)]
    seed = await get(stage, run_id, "a:b")
    assert (seed.seed_id, seed.health, seed.kernel_id) == (f"{run_id}/a:b/0", -1.0, "")
    assert not seed.history


async def test_a_life_with_its_history_and_health(stage: Stage, run_id: str) -> None:
    await stage.register(run_id)
    await walk(stage, run_id, PATH)
    envelope = stage.seal(telemetry(run_id, 4, 0.25), run_id, 4)
    await stage.send(subjects.SEED_HEALTH, envelope)

    async def done() -> lifecycle_pb2.Seed | None:
        seed = await get(stage, run_id)
        return seed if seed.state == State.FOSSILIZED and seed.health >= 0 else None

    seed = await until(done)
    assert seed.health == 0.25
    assert seed.epoch == len(PATH) - 2
    assert [event.target for event in seed.history] == list(PATH[1:])


async def test_after_an_embargo_the_slot_has_a_new_seed(stage: Stage, run_id: str) -> None:
    """Nobody tells of the next generation before it does something; the one that rests shows what it went through."""
    await stage.register(run_id)
    await walk(stage, run_id, (State.DORMANT, State.GERMINATED, State.CULLED, State.DORMANT))
    await until(lambda: _listed_as(stage, run_id, [(SLOT, 1, State.DORMANT)]))
    seed = await get(stage, run_id)
    assert (seed.generation, len(seed.history)) == (0, 3)
    await stage.seed(run_id, State.DORMANT, State.GERMINATED, 9, generation=1)
    await until(lambda: _listed_as(stage, run_id, [(SLOT, 1, State.GERMINATED)]))
    assert (await get(stage, run_id)).generation == 1


async def test_a_folded_fossil_makes_room_and_a_detour_does_not(stage: Stage, run_id: str) -> None:
    """Fossils stay in the list beside the slot's present seed; the latest that ever left DORMANT is the one shown."""
    await stage.register(run_id, (SLOT, "b:c"))
    await walk(stage, run_id, PATH)
    await walk(stage, run_id, PATH, slot="b:c")
    for slot, folded in (("b:c", False), (SLOT, True)):
        report = decision_pb2.FieldReport(
            report_id=f"{run_id}-{slot}",
            run_id=run_id,
            seed_id=f"{run_id}/{slot}/0",
            slot=slot,
            kernel_id="kernel-" + "1" * 64,
            outcome=lifecycle_pb2.SEED_STATE_FOSSILIZED,
            finished_epoch=7,
            folded=folded,
        )
        await stage.send(subjects.FIELD_REPORTS, stage.seal(report, run_id, 7))
    fossils = [("b:c", 0, State.FOSSILIZED), (SLOT, 0, State.FOSSILIZED)]
    await until(lambda: _listed_as(stage, run_id, [*fossils, (SLOT, 1, State.DORMANT)]))
    assert await listed(stage, run_id, State.DORMANT) == [(SLOT, 1, State.DORMANT)]
    assert (await get(stage, run_id)).generation == 0
    assert (await get(stage, run_id, generation=1)).state == State.DORMANT
    with pytest.raises(NotFound):
        await get(stage, run_id, generation=7)


async def _listed_as(stage: Stage, run_id: str, wanted: list[tuple[str, int, int]]) -> bool:
    return sorted(await listed(stage, run_id)) == wanted


async def test_an_order_of_arrival_cannot_change_what_is_known(stage: Stage) -> None:
    """Seeded shuffles with duplicates and a return to a checkpoint, against the state that the story ends in."""
    facts = Facts(Projection(), Bell(stage.database, asyncio.Event()))
    for trial in range(12):
        chance = random.Random(trial)
        run_id = f"shuffled-{trial}-{stage.endpoints.metrics_port}"
        story = _story(stage, run_id)
        deliveries = story + chance.choices(story, k=5)
        chance.shuffle(deliveries)
        async with stage.database.acquire() as connection:
            for event in deliveries:
                async with connection.transaction():
                    await facts.handle(connection, event)
        seed = await get(stage, run_id)
        assert (seed.state, seed.epoch) == (State.CULLED, 3), f"trial {trial}"
        # epochs 2 and 3 of the first life were lost with the return to epoch 2
        assert [(event.target, event.epoch) for event in seed.history] == [
            (State.GERMINATED, 0), (State.LOADING, 1), (State.TRAINING, 2), (State.CULLED, 3),
        ]  # fmt: skip
        stats = await stage.stub("kasmina").GetLayerStats(kasmina_pb2.GetLayerStatsRequest(run_id=run_id, slot=SLOT))
        assert [(signal.epoch, signal.health) for signal in stats.signals] == [(0, 0.5), (1, 0.5), (2, 0.75)]


def _story(stage: Stage, run_id: str) -> list[Event]:
    told = [(registration(run_id), 0)]
    for epoch, (source, target) in enumerate(itertools.pairwise(PATH[:5])):
        told.append((seed_event(run_id, source, target, epoch), epoch))
        told.append((telemetry(run_id, epoch, 0.5), epoch))
    told.append((registration(run_id, epoch=2), 2))
    told.append((seed_event(run_id, State.LOADING, State.TRAINING, 2), 2))
    told.append((telemetry(run_id, 2, 0.75), 2))
    told.append((seed_event(run_id, State.TRAINING, State.CULLED, 3), 3))
    return [unwrap(stage.seal(message, run_id, epoch).SerializeToString()) for message, epoch in told]


async def test_a_seed_must_be_named_after_its_place(stage: Stage, run_id: str) -> None:
    event = seed_event(run_id, State.DORMANT, State.GERMINATED, 0)
    event.seed_id = "elsewhere"
    facts = Facts(Projection(), Bell(stage.database, asyncio.Event()))
    async with stage.database.acquire() as connection:
        with pytest.raises(InvalidInput, match="elsewhere"):
            await facts.handle(connection, unwrap(stage.seal(event, run_id).SerializeToString()))


async def test_telemetry_without_an_order_counts_as_it_comes(stage: Stage, run_id: str) -> None:
    """As training processes send it: sequence 0, beside the facts; a resumed run measures an epoch again."""
    await stage.register(run_id, epoch=3)
    await until(lambda: get(stage, run_id))
    for health in (0.5, 0.25):
        await stage.send(subjects.SEED_HEALTH, stage.seal(telemetry(run_id, 4, health), run_id, 4, sequence=0))

    async def measured() -> bool:
        return (await get(stage, run_id)).health == 0.25

    assert await until(measured)


async def test_layer_stats_of_the_last_epochs(stage: Stage, run_id: str) -> None:
    await stage.register(run_id)
    for epoch in range(25):
        await stage.send(subjects.SEED_HEALTH, stage.seal(telemetry(run_id, epoch, epoch / 100), run_id, epoch))
    request = kasmina_pb2.GetLayerStatsRequest(run_id=run_id, slot=SLOT)

    async def all_there() -> list[int] | None:
        answer = await stage.stub("kasmina").GetLayerStats(request)
        epochs = [signal.epoch for signal in answer.signals]
        return epochs if epochs and epochs[-1] == 24 else None

    assert await until(all_there) == list(range(5, 25))
    request.epochs = 3
    assert await until(all_there) == [22, 23, 24]
    request.slot = "fc1:fc9"
    with pytest.raises(NotFound) as caught:
        await stage.stub("kasmina").GetLayerStats(request)
    assert SLOT in caught.value.hint


async def test_a_watch_has_no_gap_between_history_and_live(stage: Stage, run_id: str) -> None:
    await stage.register(run_id)
    await walk(stage, run_id, PATH[:4])
    await until(
        lambda: stage.database.fetchval("SELECT count(*) >= 3 FROM kasmina.seed_events WHERE run_id = $1", run_id)
    )

    async def watch() -> list[int]:
        call = stage.stub("kasmina").WatchSeeds(kasmina_pb2.WatchSeedsRequest(run_id=run_id, until_run_ends=True))
        return [news.event.target async for news in call]

    watching = [asyncio.create_task(watch()) for _ in range(3)]
    await walk(stage, run_id, PATH[3:], epoch=3)
    await until(
        lambda: stage.database.fetchval("SELECT count(*) >= 8 FROM kasmina.seed_events WHERE run_id = $1", run_id)
    )
    await stage.end(run_id)
    assert await asyncio.wait_for(asyncio.gather(*watching), 10) == [list(PATH[1:])] * 3


async def test_news_is_prompt(stage: Stage, run_id: str) -> None:
    """A watch is woken by the commit, not by its fallback poll of 2 s."""
    await stage.register(run_id)
    call = stage.stub("kasmina").WatchSeeds(kasmina_pb2.WatchSeedsRequest(run_id=run_id))
    arrivals = call.__aiter__()
    loop = asyncio.get_running_loop()
    waits = []
    for step, (source, target) in enumerate(itertools.pairwise(PATH[:4])):
        news = asyncio.ensure_future(anext(arrivals))
        await asyncio.sleep(0.05)
        begun = loop.time()
        await stage.seed(run_id, source, target, step)
        assert (await asyncio.wait_for(news, 5)).event.target == target
        waits.append(loop.time() - begun)
    call.cancel()
    assert min(waits) < 1.0


async def test_draining_ends_watches_with_a_word(stage: Stage) -> None:
    draining = asyncio.Event()
    bell = Bell(stage.database, draining)
    waiting = asyncio.create_task(bell.wait(bell.expect("news"), timeout=30))
    await asyncio.sleep(0.01)
    draining.set()
    with pytest.raises(Unavailable):
        await asyncio.wait_for(waiting, 1)
