"""The platform goes away in the middle of a run, or is away for the whole of one: training goes on, and what it had to
tell is delivered when somebody is there to hear it.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter

import pytest

from esper_core.cli.platform import Platform, dial
from esper_core.errors import Unavailable
from esper_core.lifecycle import State
from esper_core.local import stack as local_stack
from esper_core.pb.esper.core.v1 import run_pb2
from esper_core.pb.esper.nissa.v1 import nissa_pb2
from esper_core.pb.esper.tamiyo.v1 import tamiyo_pb2
from esper_core.pb.esper.tolaria.v1 import tolaria_pb2
from tests.e2e.living import Living, Training, until

pytestmark = pytest.mark.timeout(300)  # on a machine that is busy with other things
LONG, SHORT = 200, 4
LEFT = {
    "optimization": {"epochs": LONG},
    "morphogenetic": {"decision_wait_seconds": 0.5, "growth": {"evaluate_at_most_every": 2}},
    "services": {"drain_seconds": 60},
}
ALONE = {
    "optimization": {"epochs": SHORT},
    "morphogenetic": {"prepare_seconds": 1},
    "services": {"drain_seconds": 0.5},
}


async def test_training_goes_on_without_the_platform_and_tells_it_everything_later(platform: Living) -> None:
    left = platform.train("left", "--no-twin", settings=LEFT)
    await left.becomes(State.TRAINING)
    assert await asyncio.to_thread(local_stack.down, platform.config)
    try:
        gone = len(left.boundaries())
        await left.reaches(gone + 5)
        with left.paused():
            await nobody_hears(platform)
            await asyncio.to_thread(local_stack.up, platform.config)
    finally:
        await asyncio.to_thread(local_stack.up, platform.config)
    back = len(left.boundaries())
    print(f"down at epoch {gone}, up at epoch {back}")
    again = platform.train("alone", "--no-twin", "--resume", settings=ALONE | {"services": {"drain_seconds": 60}})
    for training in (again, left):
        assert await training.ends() == 0, training.stderr
        assert "not delivered" not in training.stderr

    async with dial(platform.data_dir) as api:
        for training, epochs in ((left, LONG), (again, SHORT)):
            await everything_is_told(api, training, epochs)
        asked = tamiyo_pb2.ListDecisionsRequest(run_id="left", page_size=1000)
        decided = [decision.epoch for decision in (await api.tamiyo.ListDecisions(asked)).decisions]
    heard = [epoch for epoch in decided if epoch > back]
    assert heard, "Tamiyo was never asked again"
    print(f"decided again at epoch {min(heard)}")
    assert json.loads(left.stdout)["fossilized"] >= 1


async def nobody_hears(platform: Living) -> None:
    """A whole run while nothing of the platform is there."""
    alone = platform.train("alone", "--no-twin", settings=ALONE)
    assert await alone.ends() == 0, alone.stderr
    assert len(alone.boundaries()) == SHORT
    facts = len(alone.told())
    assert facts == SHORT + 2  # begin, epochs, end
    assert re.search(rf"{facts} facts of alone are not delivered yet.*--resume --name alone", alone.stderr)
    assert "Traceback" not in alone.stderr
    refused = platform.esperctl("runs", "list")
    assert (refused.returncode, refused.stdout) == (Unavailable.exit_code, ""), refused.stderr
    assert "esperctl up" in refused.stderr


async def everything_is_told(api: Platform, training: Training, epochs: int) -> None:
    """The platform's books agree with what the run told."""
    assert training.delivered() == len(training.told())

    async def finished() -> bool:
        run = (await api.tolaria.GetRun(tolaria_pb2.GetRunRequest(run_id=training.name))).run
        return bool(run.state == run_pb2.RUN_STATE_FINISHED and run.latest.epoch == epochs - 1)

    await until(finished)
    history = await api.nissa.GetRunHistory(nissa_pb2.GetRunHistoryRequest(run_id=training.name))
    losses = [line["figures"]["train_loss"] for line in training.boundaries()]
    assert [(epoch.epoch, epoch.train_loss) for epoch in history.epochs] == list(enumerate(losses))
    assert len(losses) == epochs

    async def logged() -> bool:
        request = nissa_pb2.ListEventsRequest(run_id=training.name, page_size=1000)
        events = (await api.nissa.ListEvents(request)).events
        heard = Counter(event.envelope.event_id for event in events if event.envelope.producer == "tolaria")
        told = {event.envelope.event_id for event in training.told()}
        return {name: heard[name] for name in told} == dict.fromkeys(told, 1)

    await until(logged)
