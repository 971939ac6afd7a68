"""The journal: everything that was said, paged, watched, counted, and forgotten in time."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Mapping

import pytest
from prometheus_client.parser import text_string_to_metric_families

from esper_core.bus import subjects
from esper_core.errors import NotFound
from esper_core.lifecycle import State
from esper_core.pb.esper.nissa.v1 import nissa_pb2
from services.nissa.journal import Journal
from tests.service.platform import Stage, epoch_completed, until


async def events(stage: Stage, run_id: str, **fields: int | str) -> nissa_pb2.ListEventsResponse:
    return await stage.stub("nissa").ListEvents(nissa_pb2.ListEventsRequest(run_id=run_id, **fields))


async def count(stage: Stage, run_id: str, wanted: int) -> nissa_pb2.ListEventsResponse:
    """The run's events once there are so many."""

    async def enough() -> nissa_pb2.ListEventsResponse | None:
        answer = await events(stage, run_id)
        return answer if len(answer.events) >= wanted else None

    return await until(enough)


async def test_every_event_is_there_once_newest_first(stage: Stage, run_id: str) -> None:
    await stage.register(run_id)
    envelope = stage.seal(epoch_completed(run_id, 0, 0.5), run_id, 0)
    await stage.send(subjects.EPOCH_EVENTS, envelope)
    await stage.send(subjects.EPOCH_EVENTS, envelope)
    await stage.seed(run_id, State.DORMANT, State.GERMINATED, 0)
    found = (await count(stage, run_id, 3)).events
    assert [event.envelope.type.rpartition(".")[2] for event in found] == [
        "SeedEvent",
        "EpochCompleted",
        "RunRegistered",
    ]
    assert found[1].envelope == envelope
    assert found[1].subject == f"system.events.epoch.{run_id}"
    assert json.loads(found[1].payload_json)["metrics"]["train_loss"] == 0.5
    only = await events(stage, run_id, type="esper.bus.v1.EpochCompleted")
    assert [event.envelope.event_id for event in only.events] == [envelope.event_id]
    first = await events(stage, run_id, page_size=2)
    rest = await events(stage, run_id, page_size=2, page_token=first.next_page_token)
    assert [*first.events, *rest.events] == list(found)
    assert rest.next_page_token == ""


async def test_a_watch_sees_what_comes_from_now_on(stage: Stage, run_id: str) -> None:
    await stage.register(run_id)
    await count(stage, run_id, 1)
    call = stage.stub("nissa").WatchEvents(
        nissa_pb2.WatchEventsRequest(run_id=run_id, type="esper.bus.v1.EpochCompleted")
    )
    arrivals = call.__aiter__()
    first = asyncio.ensure_future(anext(arrivals))
    await asyncio.sleep(0.2)  # until the server has looked where it stands
    for epoch in range(3):
        await stage.epoch(run_id, epoch)
    seen = [(await asyncio.wait_for(first, 10)).event]
    seen += [(await asyncio.wait_for(anext(arrivals), 10)).event for _ in range(2)]
    call.cancel()
    assert [event.envelope.epoch for event in seen] == [0, 1, 2]


async def test_the_history_of_a_run_follows_its_return_to_a_checkpoint(stage: Stage, run_id: str) -> None:
    await stage.register(run_id)
    for epoch in range(3):
        await stage.epoch(run_id, epoch, 1.0 + epoch)
    await stage.register(run_id, epoch=1)
    await stage.epoch(run_id, 1, 9.0)
    await count(stage, run_id, 6)
    answer = await stage.stub("nissa").GetRunHistory(nissa_pb2.GetRunHistoryRequest(run_id=run_id))
    assert [(epoch.epoch, epoch.train_loss) for epoch in answer.epochs] == [(0, 1.0), (1, 9.0)]
    with pytest.raises(NotFound) as caught:
        await stage.stub("nissa").GetRunHistory(nissa_pb2.GetRunHistoryRequest(run_id=run_id[:-1] + "z"))
    assert run_id in caught.value.hint


async def test_dead_letters_are_listed_with_their_reason(stage: Stage, run_id: str) -> None:
    await stage.bus.publish_bytes(subjects.EPOCH_EVENTS.of(run_id), b"\xff\xffpoison", message_id=f"poison-{run_id}")

    async def there() -> list[nissa_pb2.DeadLetter]:
        answer = await stage.stub("nissa").ListDeadLetters(nissa_pb2.ListDeadLettersRequest())
        return [letter for letter in answer.letters if run_id in letter.subject]

    consumers = {"nissa", "tolaria-runs"}

    async def all_there() -> list[nissa_pb2.DeadLetter] | None:
        letters = await there()
        return letters if {letter.consumer for letter in letters} == consumers else None

    for letter in await until(all_there):
        assert letter.data == b"\xff\xffpoison"
        assert letter.event_id == ""
        assert letter.reason


async def test_metrics_tell_what_happened(stage: Stage, run_id: str) -> None:
    before = await until(lambda: settled(stage))
    await stage.register(run_id)
    await stage.epoch(run_id, 0, 0.625)
    await stage.seed(run_id, State.DORMANT, State.GERMINATED, 0)
    await stage.end(run_id)

    async def counted() -> Mapping[str, float] | None:
        now = await scrape(stage)
        key, last = 'esper_runs{state="finished"}', f'esper_validation_accuracy{{run="{run_id}"}}'
        return now if now.get(key, 0) > before.get(key, 0) and last in now else None

    after = await until(counted)

    def grew(key: str) -> float:
        return after.get(key, 0.0) - before.get(key, 0.0)

    assert grew("esper_epochs_total{}") == 1
    assert grew('esper_seed_transitions_total{target="germinated"}') == 1
    assert grew('esper_events_total{type="RunEnded"}') == 1
    assert after[f'esper_train_loss{{run="{run_id}"}}'] == 0.625
    assert after[f'esper_validation_accuracy{{run="{run_id}"}}'] == 0.5
    assert "esper_outbox_pending{}" in after
    assert "esper_dead_letters{}" in after
    assert any(key.startswith("esper_build_info") for key in after)


async def settled(stage: Stage) -> Mapping[str, float] | None:
    """The metrics once they tell of every event so far."""
    now = await scrape(stage)
    told = sum(value for key, value in now.items() if key.startswith("esper_events_total"))
    return now if told == await stage.database.fetchval("SELECT max(ordinal) FROM nissa.events") else None


async def scrape(stage: Stage) -> dict[str, float]:
    def read() -> str:
        with urllib.request.urlopen(stage.endpoints.metrics_url, timeout=5) as answer:  # noqa: S310 - loopback
            return str(answer.read().decode())

    found: dict[str, float] = {}
    for family in text_string_to_metric_families(await asyncio.to_thread(read)):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


async def test_the_journal_is_bounded_by_count_and_age(stage: Stage, run_id: str) -> None:
    await stage.register(run_id)
    for epoch in range(9):
        await stage.epoch(run_id, epoch)
    await count(stage, run_id, 10)
    journal = Journal(stage.database)
    await journal.forget(keep=4, days=1)
    assert [event.envelope.epoch for event in (await events(stage, run_id)).events] == [8, 7, 6, 5]
    await stage.database.execute(
        "UPDATE nissa.events SET created = now() - interval '3 days' WHERE run_id = $1", run_id
    )
    await journal.forget(keep=100, days=2)
    assert not (await events(stage, run_id)).events
    answer = await stage.stub("nissa").GetRunHistory(nissa_pb2.GetRunHistoryRequest(run_id=run_id))
    assert len(answer.epochs) == 9
