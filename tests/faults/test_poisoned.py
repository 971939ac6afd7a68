"""Poison on every subject that somebody listens to: it is put aside with a reason that people can read, and whoever
found it goes on with the next good event.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from typing import Any

import pytest
from google.protobuf.message import Message

from esper_core.bus import subjects
from esper_core.bus.bus import Bus
from esper_core.bus.envelope import wrap
from esper_core.cli.platform import Platform, dial
from esper_core.errors import NotFound
from esper_core.ids import new_id, sha256
from esper_core.lifecycle import State
from esper_core.pb.esper.bus.v1 import bus_pb2
from esper_core.pb.esper.core.v1 import blueprint_pb2, decision_pb2, kernel_pb2, lifecycle_pb2, run_pb2, telemetry_pb2
from esper_core.pb.esper.kasmina.v1 import kasmina_pb2
from esper_core.pb.esper.nissa.v1 import nissa_pb2
from esper_core.pb.esper.tamiyo.v1 import tamiyo_pb2, tamiyo_pb2_grpc
from esper_core.pb.esper.tezzeret.v1 import tezzeret_pb2
from esper_core.pb.esper.tolaria.v1 import tolaria_pb2
from esper_core.pb.esper.urza.v1 import urza_pb2
from esper_core.rpc.client import open_channel
from tests.e2e.living import NARROW, Living, until

pytestmark = pytest.mark.timeout(300)  # on a machine that is busy with other things
RUN = "poisoned"
LISTENERS = {
    subjects.RUN_EVENTS: {"tezzeret-runs", "tolaria-runs", "kasmina-seeds", "emrakul-plans", "karn-runs", "nissa"},
    subjects.EPOCH_EVENTS: {"tolaria-runs", "nissa"},
    subjects.SEED_EVENTS: {"kasmina-seeds", "nissa"},
    subjects.SEED_HEALTH: {"kasmina-telemetry", "nissa"},
    subjects.KASMINA_COMMANDS: {"nissa"},  # and the run itself, see test_killed
    subjects.CARVE_ORDERS: {"nissa"},  # and the run itself, see test_carving_on_the_wire
    subjects.CARVE_EVENTS: {"emrakul-plans", "nissa"},
    subjects.BLUEPRINT_SUBMITTED: {"tezzeret-builds", "urabrask-warm", "nissa"},
    subjects.KERNEL_READY: {"urabrask-kernels", "nissa"},
    subjects.KERNEL_CHARACTERIZED: {"karn-verdicts", "nissa"},
    subjects.FIELD_REPORTS: {"tamiyo-experience", "urza-usage", "urabrask-reports", "karn-reports", "nissa"},
}
INTERFACE = blueprint_pb2.SlotInterface(
    layout=blueprint_pb2.LAYOUT_FEATURES, in_width=64, out_width=64, hidden_width=2, activation="relu", foldable=True
)


def poisons(subject: subjects.Subject) -> dict[str, bytes]:
    """Messages that nobody can take, by the word that their reason contains."""
    good = bus_pb2.EventEnvelope(
        event_id=new_id(),
        type=sorted(subject.types)[0],
        schema_version=1,
        producer=min(subject.producers),
        run_id=RUN if subject.per_run else "",
        payload=b"",
        payload_sha256=sha256(b""),
    )
    good.created.GetCurrentTime()

    def altered(**fields: Any) -> bytes:
        out = bus_pb2.EventEnvelope()
        out.CopyFrom(good)
        for name, value in {"event_id": new_id(), **fields}.items():
            setattr(out, name, value)
        return out.SerializeToString()

    return {
        "envelope": b"\xff\xfe" + sha256(subject.name.encode()).encode(),
        "digest": altered(payload=b"\x0a\x01x"),
        "unknown type": altered(type="esper.bus.v1.Rumour"),
        "may not speak": altered(producer="nissa"),
        "": altered(),  # a payload without a single of its required fields
    }


@pytest.fixture
async def bus(platform: Living) -> AsyncIterator[Bus]:
    endpoints = platform.endpoints
    bus = await Bus.join(endpoints, "oona", "vandal")
    yield bus
    await bus.close()


async def test_poison_is_put_aside_by_every_listener_and_the_line_goes_on(platform: Living, bus: Bus) -> None:
    assert set(LISTENERS) == set(subjects.SUBJECTS)
    expected: dict[tuple[str, str, bytes], str] = {}
    for subject, listeners in LISTENERS.items():
        full = subject.of(RUN if subject.per_run else "")
        for reason, data in poisons(subject).items():
            await bus.publish_bytes(full, data, message_id=new_id())
            for listener in listeners:
                expected[listener, full.removeprefix(subjects.PREFIX), data] = reason

    async def buried() -> dict[tuple[str, str, bytes], str]:
        letters = await platform.read("bus", "dead-letters", "-n", "1000")
        found = {(x["consumer"], x["subject"], base64.b64decode(x["data"])): x["reason"] for x in letters}
        return found if expected.keys() <= found.keys() else {}

    found = await until(buried)
    assert not {key: found[key] for key, word in expected.items() if word not in found[key] or not found[key]}
    assert {key for key in found if RUN in key[1]} == {key for key in expected if RUN in key[1]}
    async with dial(platform.data_dir) as api:
        await good_events_have_their_effect(api, bus)
    assert platform.status().healthy


async def good_events_have_their_effect(api: Platform, bus: Bus) -> None:
    """A small run's story, an outcome, and a build from wish to verdict: something for every listener."""
    run = run_pb2.Run(
        run_id=RUN,
        host="mlp",
        dataset="digits",
        epochs=1,
        morphogenetic=True,
        slots=[run_pb2.Slot(slot=NARROW, interface=INTERFACE)],
    )
    seed_id = f"{RUN}/{NARROW}/0"
    reports = await kept_reports(api)
    report = decision_pb2.FieldReport(
        report_id=new_id(),
        run_id=RUN,
        seed_id=seed_id,
        slot=NARROW,
        kernel_id="none",
        outcome=lifecycle_pb2.SEED_STATE_CULLED,
    )
    story: list[tuple[subjects.Subject, Message]] = [
        (subjects.RUN_EVENTS, bus_pb2.RunRegistered(run=run)),
        (subjects.SEED_HEALTH, bus_pb2.SeedTelemetry(run_id=RUN, signals=[telemetry_pb2.HealthSignal(slot=NARROW)])),
        (subjects.SEED_EVENTS, seed_event(seed_id)),
        (subjects.EPOCH_EVENTS, bus_pb2.EpochCompleted(run_id=RUN, metrics=run_pb2.EpochMetrics(train_loss=0.5))),
        (subjects.FIELD_REPORTS, report),
        (subjects.RUN_EVENTS, bus_pb2.RunEnded(run_id=RUN, state=run_pb2.RUN_STATE_FINISHED)),
    ]
    for sequence, (subject, message) in enumerate(story, 1):
        envelope = wrap(message, producer="tolaria", run_id=RUN, sequence=sequence)
        await bus.publish(subject.of(RUN if subject.per_run else ""), envelope)
    wish = tezzeret_pb2.SubmitBuildRequest(
        blueprint_id=(
            await api.urza.GetBlueprint(urza_pb2.GetBlueprintRequest(blueprint_id="bottleneck_mlp"))
        ).blueprint_id,
        interface=INTERFACE,
        symbols={"width": 5},
    )
    build_id = (await api.tezzeret.SubmitBuild(wish)).build.build_id

    async def heard() -> bool:
        known = (await api.tolaria.GetRun(tolaria_pb2.GetRunRequest(run_id=RUN))).run
        seed = (await api.kasmina.GetSeed(kasmina_pb2.GetSeedRequest(run_id=RUN, slot=NARROW))).seed
        stats = await api.kasmina.GetLayerStats(kasmina_pb2.GetLayerStatsRequest(run_id=RUN, slot=NARROW))
        history = await api.nissa.GetRunHistory(nissa_pb2.GetRunHistoryRequest(run_id=RUN))
        return bool(
            known.state == run_pb2.RUN_STATE_FINISHED
            and known.latest.train_loss == 0.5
            and [event.target for event in seed.history] == [State.GERMINATED]
            and len(stats.signals) == 1
            and [epoch.train_loss for epoch in history.epochs] == [0.5]
        )

    async def learned() -> bool:
        return await kept_reports(api) == reports + 1

    async def judged() -> bool:
        build = (await api.tezzeret.GetBuild(tezzeret_pb2.GetBuildRequest(build_id=build_id))).build
        if build.state != tezzeret_pb2.BUILD_STATE_DONE:
            return False
        kernel = (await api.urza.GetKernel(urza_pb2.GetKernelRequest(kernel_id=build.kernel_id))).kernel
        return bool(kernel.status == kernel_pb2.KERNEL_STATUS_VALIDATED)

    await until(lambda: _found(heard))
    await until(learned)
    await until(judged)


async def kept_reports(api: Platform) -> int:
    """How much experience there is; to tell the same outcome again adds nothing."""
    report = decision_pb2.FieldReport(
        report_id="of-old", run_id="of-old", seed_id="of-old", slot="s", kernel_id="none", outcome=State.CULLED
    )  # type: ignore[arg-type]
    endpoints = api.endpoints
    channel = open_channel(endpoints.grpc_address, tls_dir=endpoints.tls_dir, principal="kasmina")
    tamiyo: Any = tamiyo_pb2_grpc.TamiyoServiceStub(channel)  # type: ignore[no-untyped-call]
    try:
        return int((await tamiyo.AddExperience(tamiyo_pb2.AddExperienceRequest(report=report))).reports)
    finally:
        await channel.close()


def seed_event(seed_id: str) -> lifecycle_pb2.SeedEvent:
    return lifecycle_pb2.SeedEvent(
        seed_id=seed_id,
        run_id=RUN,
        slot=NARROW,
        source=lifecycle_pb2.SEED_STATE_DORMANT,
        target=lifecycle_pb2.SEED_STATE_GERMINATED,
        reason="after the poison",
    )


async def _found(condition: Any) -> bool:
    try:
        return bool(await condition())
    except NotFound:
        return False
