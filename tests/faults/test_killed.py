"""Servers are killed at random moments while a network grows: the run ends well, everything heals, nothing that was
acknowledged is lost and nothing happens twice.

What it has found so far (seed, fault, what was wrong):
    4  postgres  calls that met its recovery were told INTERNAL, which nobody repeats; now UNAVAILABLE
    7  nats      killed while it was asked how it is, it was never started again: the question swallowed its cancellation
    38 postgres  killed while it was asked how it is, the question failed oddly and took the supervisor with it
    38 nats      a run that ended while it was away showed a traceback: closing the connection raised
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import secrets
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
import pytest

from esper_core.blueprint.interface import SlotInterface
from esper_core.bus import subjects
from esper_core.bus.bus import Bus
from esper_core.cli.platform import Platform, dial
from esper_core.errors import DeadlineExceeded, Unavailable
from esper_core.ids import new_id
from esper_core.lifecycle import State
from esper_core.pb.esper.core.v1 import blueprint_pb2, kernel_pb2, lifecycle_pb2, run_pb2
from esper_core.pb.esper.kasmina.v1 import kasmina_pb2
from esper_core.pb.esper.nissa.v1 import nissa_pb2
from esper_core.pb.esper.tamiyo.v1 import tamiyo_pb2
from esper_core.pb.esper.tezzeret.v1 import tezzeret_pb2
from esper_core.pb.esper.tolaria.v1 import tolaria_pb2
from esper_core.pb.esper.urza.v1 import urza_pb2
from esper_core.rpc.convert import from_proto
from tests.e2e.living import AFTER, Living, Training, until

pytestmark = pytest.mark.timeout(300)  # on a machine that is busy with other things
T = TypeVar("T")
VICTIMS = ("nats", "postgres", "s3", "services")
EXTRA = 1  # further kills of any of them
PAUSE = 0.05, 0.8  # seconds between kills
EPOCHS = 180
SETTINGS = {
    "optimization": {"epochs": EPOCHS},
    "morphogenetic": {
        "decision_wait_seconds": 0.5,
        # No fold before everyone was killed: it would change the interface that the operator's kernel was chosen for.
        "growth": {"policy": {"in_flight": 3}, "fine_tune_epochs": 80},
    },
}
RUN = "killed"


async def test_whoever_is_killed_the_run_ends_and_nothing_is_lost_or_doubled(platform: Living) -> None:
    seed = int(os.environ.get("FAULT_SEED") or secrets.randbelow(2**32))
    print(f"replay: FAULT_SEED={seed} python -m pytest tests/faults/test_killed.py")
    chance = random.Random(seed)
    before = {child.name: child.restarts for child in platform.status().children}
    await poison_orders(platform)
    training = platform.train(RUN, "--no-twin", settings=SETTINGS)
    await training.becomes(State.GERMINATED)

    async with dial(platform.data_dir) as api:
        given = asyncio.create_task(orders(api, chance.random()))
        killed = await rampage(platform, training, chance)
        with training.paused():
            order, blueprint_id, build_id = await given
        assert await training.ends() == 0, training.stderr
        assert training.delivered() == len(training.told())
        await platform.healed()
        assert platform.esperctl("status").returncode == 0
        restarts = {child.name: child.restarts - before[child.name] for child in platform.status().children}
        assert all(restarts[name] >= number for name, number in killed.items()), (restarts, killed)

        assert json.loads(training.stdout)["run"] == RUN
        await every_fact_is_told_once(api, training)
        await every_decision_is_kept(api, training)
        answers = [event.message for event in training.told() if event.envelope.type == "esper.core.v1.SeedEvent"]
        assert [answer.target for answer in answers if answer.command_id == order.command_id] == [State.GERMINATED]
        found = await api.urza.GetBlueprint(urza_pb2.GetBlueprintRequest(blueprint_id=blueprint_id))
        assert found.blueprint.name == "in-the-storm"
        await until(lambda: kernel_is_validated(api, build_id))
    letters = await platform.read("bus", "dead-letters")
    orders_subject = subjects.KASMINA_COMMANDS.of(RUN).removeprefix(subjects.PREFIX)
    assert {(letter["consumer"], letter["subject"]) for letter in letters if RUN in letter["subject"]} == {
        (f"tolaria-{RUN}", orders_subject),
        ("nissa", orders_subject),
    }


async def rampage(platform: Living, training: Training, chance: random.Random) -> Counter[str]:
    """Kill every victim once and a few again, in random order with random pauses; how often each died."""
    doomed = [*VICTIMS, *chance.choices(VICTIMS, k=EXTRA)]
    chance.shuffle(doomed)
    killed: Counter[str] = Counter()
    for name in doomed:
        await asyncio.sleep(chance.uniform(*PAUSE))
        pid = await until(lambda name=name: _pid(platform, name))
        assert training.lives, "the run ended before everyone was killed: give it more epochs"
        print(f"epoch {len(training.boundaries())}: kill -9 {name} ({pid})")
        os.kill(pid, signal.SIGKILL)
        killed[name] += 1
        await until(lambda name=name, pid=pid: _gone(platform, name, pid))
    return killed


async def orders(api: Platform, pause: float) -> tuple[lifecycle_pb2.Command, str, str]:
    """What an operator insists on meanwhile: a germination, told three times; a blueprint; a build of it.

    Returns:
        What was acknowledged: the order, the blueprint's id, the build's id.
    """
    await asyncio.sleep(pause)
    run = (await insist(lambda: api.tolaria.GetRun(tolaria_pb2.GetRunRequest(run_id=RUN)))).run
    interface = next(slot.interface for slot in run.slots if slot.slot == AFTER)
    query = urza_pb2.QueryKernelsRequest(
        interface_id=from_proto(interface, SlotInterface).id, status=kernel_pb2.KERNEL_STATUS_VALIDATED
    )
    kernel = (await insist(lambda: api.urza.QueryKernels(query))).kernels[0]
    wish = kasmina_pb2.GerminateRequest(
        command_id=new_id(), run_id=RUN, slot=AFTER, kernel_id=kernel.manifest.kernel_id, reason="in the storm"
    )
    answers = [(await insist(lambda: api.kasmina.Germinate(wish))).command for _ in range(3)]
    assert answers == [answers[0]] * 3
    design = blueprint_pb2.BlueprintIR(
        name="in-the-storm",
        schema_version=1,
        symbols={"width": 3},
        nodes=[
            blueprint_pb2.BlueprintNode(name="down", op="linear", inputs=["input"], attributes={"out": "width"}),
            blueprint_pb2.BlueprintNode(name="up", op="linear", inputs=["down"], attributes={"out": "out_width"}),
        ],
        output="up",
        layouts=[blueprint_pb2.LAYOUT_FEATURES],
    )
    stored = await insist(lambda: api.urza.UploadBlueprint(urza_pb2.UploadBlueprintRequest(blueprint=design)))
    built = tezzeret_pb2.SubmitBuildRequest(blueprint_id=stored.blueprint_id, interface=interface)
    build = (await insist(lambda: api.tezzeret.SubmitBuild(built))).build
    return answers[0], stored.blueprint_id, build.build_id


async def insist(call: Callable[[], Awaitable[T]]) -> T:
    """Repeat a call until it is answered; being away is the only excuse that is taken."""
    while True:
        try:
            return await call()
        except (Unavailable, DeadlineExceeded, grpc.aio.UsageError) as error:
            print(f"not yet: {error}")
            await asyncio.sleep(0.3)


async def every_fact_is_told_once(api: Platform, training: Training) -> None:
    """What the run told against what the books of Kasmina, Tolaria and Nissa hold of it."""
    told = training.told()
    assert [event.envelope.sequence for event in told] == list(range(1, len(told) + 1))
    assert len({event.envelope.event_id for event in told}) == len(told)
    epochs = [event.message.metrics for event in told if event.envelope.type == "esper.bus.v1.EpochCompleted"]
    changes = [event.message for event in told if event.envelope.type == "esper.core.v1.SeedEvent"]
    assert [metrics.epoch for metrics in epochs] == list(range(EPOCHS))

    async def arrived() -> bool:
        listed = [
            event
            for kind in sorted({event.envelope.type for event in told})
            for event in (await log(api, kind))
            if event.envelope.producer == "tolaria"
        ]
        return Counter(event.envelope.event_id for event in listed) == Counter(e.envelope.event_id for e in told)

    async def booked() -> bool:
        return (await api.tolaria.GetRun(tolaria_pb2.GetRunRequest(run_id=RUN))).run.state == run_pb2.RUN_STATE_FINISHED

    await until(arrived)
    await until(booked)
    history = await api.nissa.GetRunHistory(nissa_pb2.GetRunHistoryRequest(run_id=RUN))
    assert list(history.epochs) == epochs
    run = (await api.tolaria.GetRun(tolaria_pb2.GetRunRequest(run_id=RUN))).run
    assert run.latest == epochs[-1]
    assert dict(run.results) == dict(told[-1].message.results)
    kept = []
    for slot, generation in sorted({(change.slot, change.generation) for change in changes}):
        asked = kasmina_pb2.GetSeedRequest(run_id=RUN, slot=slot, generation=generation)
        kept += (await api.kasmina.GetSeed(asked)).seed.history
    order = [change for _, change in sorted(enumerate(changes), key=lambda at: (at[1].slot, at[1].generation, at[0]))]
    assert kept == order


async def every_decision_is_kept(api: Platform, training: Training) -> None:
    lived = {line["signal"]["decision_id"]: line["signal"] for line in training.boundaries() if line.get("signal")}
    assert lived
    asked = tamiyo_pb2.ListDecisionsRequest(run_id=RUN, page_size=1000)
    kept = (await api.tamiyo.ListDecisions(asked)).decisions
    assert len({decision.epoch for decision in kept}) == len(kept)
    by_id = {decision.decision_id: decision for decision in kept}
    assert set(lived) <= set(by_id)
    for decision_id, signal_ in lived.items():
        mine = [action["command"]["command_id"] for action in signal_.get("actions", ())]
        assert mine == [action.command.command_id for action in by_id[decision_id].actions]


async def kernel_is_validated(api: Platform, build_id: str) -> bool:
    build = (await api.tezzeret.GetBuild(tezzeret_pb2.GetBuildRequest(build_id=build_id))).build
    assert build.state != tezzeret_pb2.BUILD_STATE_FAILED, build.reason
    if build.state != tezzeret_pb2.BUILD_STATE_DONE:
        return False
    kernel = (await api.urza.GetKernel(urza_pb2.GetKernelRequest(kernel_id=build.kernel_id))).kernel
    return bool(kernel.status == kernel_pb2.KERNEL_STATUS_VALIDATED)


async def log(api: Platform, kind: str) -> list[nissa_pb2.LoggedEvent]:
    """Every event of the run of one type."""
    found: list[Any] = []
    token = ""
    while True:
        request = nissa_pb2.ListEventsRequest(run_id=RUN, type=kind, page_size=1000, page_token=token)
        page = await api.nissa.ListEvents(request)
        found += page.events
        token = page.next_page_token
        if not token:
            return found


async def poison_orders(platform: Living) -> None:
    """Something nobody can read lies in front of the run's first order."""
    bus = await Bus.join(platform.endpoints, "oona", "vandal")
    await bus.publish_bytes(subjects.KASMINA_COMMANDS.of(RUN), b"\xff\xfegarbage", message_id=new_id())
    await bus.close()


async def _pid(platform: Living, name: str) -> int | None:
    return platform.pid(name)


async def _gone(platform: Living, name: str, pid: int) -> bool:
    return platform.pid(name) != pid
