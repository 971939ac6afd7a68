"""Judges side by side, judges that die, kernels that would stop a judge, and tags and risks that follow the population."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from collections import Counter
from typing import Any

import pytest

from esper_core.blueprint.interface import Layout
from esper_core.bus.envelope import Event, wrap
from esper_core.ids import new_id
from esper_core.kernel.manifest import KernelManifest
from esper_core.kernel.record import KernelStatus, Measurement, RejectionReason
from esper_core.kernel.trust import TrustList, verify_kernel, verify_statement
from esper_core.lifecycle import State
from esper_core.pb.esper.core.v1 import decision_pb2
from esper_core.pb.esper.urza.v1 import urza_pb2
from services.bell import Bell
from services.sandbox import Limits
from services.urabrask import evaluations, experience, risk
from services.urabrask.evaluations import Phase
from services.urabrask.experience import Experience
from services.urabrask.judge import MODULE, Judge
from services.urabrask.retag import Retag
from services.urabrask.tags import ENOUGH, FIXED, tags_for
from services.urabrask.verdict import Verdict
from tests.corpus.kernels import IMPATIENT, bad
from tests.service.innovation.benches import library, running
from tests.service.innovation.papers import Innovation, Kernel, interface, until

CORPUS = "tests.corpus.child"
WIDE = interface(layout=Layout.IMAGE, in_width=8, out_width=8, in_size=(20, 20), out_size=(20, 20), foldable=False)
TARGET = "a machine of a test"


@pytest.fixture(autouse=True)
async def empty(bare: Innovation) -> None:
    await bare.database.execute("TRUNCATE urabrask.evaluations, urabrask.reports, urabrask.risk_models, bus.outbox")


def judge(bare: Innovation, name: str, told: list[Any], limits: Limits = Limits(), module: str = MODULE) -> Judge:  # noqa: B008
    bell = Bell(bare.database, asyncio.Event())
    shelf, trust = library(bare, name, told), bare.endpoints.keys_dir / "trust.json"
    return Judge(bare.database, bell, shelf, trust, limits, module, lease_seconds=2.0)


async def queued(bare: Innovation, kernel: Kernel) -> str:
    await bare.upload(kernel)
    await evaluations.add(bare.database, kernel.manifest.kernel_id, kernel.manifest.interface_id)
    return kernel.manifest.kernel_id


async def phase(bare: Innovation, kernel_id: str) -> Phase:
    return (await evaluations.get(bare.database, kernel_id)).phase


async def done(bare: Innovation, kernel_ids: list[str]) -> bool:
    return all([await phase(bare, kernel_id) is Phase.DONE for kernel_id in kernel_ids])


async def attempts(bare: Innovation, kernel_id: str) -> int:
    return int(
        await bare.database.fetchval("SELECT attempts FROM urabrask.evaluations WHERE kernel_id = $1", kernel_id)
    )


async def test_two_judges_share_the_work_and_never_a_kernel(bare: Innovation) -> None:
    kernel_ids = [await queued(bare, bare.make(interface())) for _ in range(8)]
    told: list[Any] = []
    async with running(*(judge(bare, name, told, module=CORPUS) for name in ("one", "other"))):
        await until(lambda: done(bare, kernel_ids))
    assert Counter(record.manifest.kernel_id for _, record, _ in told) == dict.fromkeys(kernel_ids, 1)
    assert {name for name, _, _ in told} == {"one", "other"}
    assert [await attempts(bare, kernel_id) for kernel_id in kernel_ids] == [1] * len(kernel_ids)
    assert await bare.database.fetchval("SELECT count(*) FROM bus.outbox") == len(kernel_ids)


async def test_a_bench_killed_in_the_middle_measures_anew(bare: Innovation) -> None:
    told: list[Any] = []
    one = judge(bare, "one", told, module=CORPUS)
    await one.child.warm()
    async with running(one):
        kernel_id = await queued(bare, bare.make(WIDE, "conv_bypass_1x1"))  # takes a while
        await until(lambda: _examining(bare, kernel_id))
        pid = one.child.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await until(lambda: done(bare, [kernel_id]))
    assert (await bare.record(kernel_id)).status is KernelStatus.VALIDATED
    assert await attempts(bare, kernel_id) == 2
    assert len(told) == 1


async def _examining(bare: Innovation, kernel_id: str) -> bool:
    return await phase(bare, kernel_id) in (Phase.SAFETY, Phase.BENCHMARK)


async def test_what_a_killed_judge_held_is_judged_by_another(bare: Innovation) -> None:
    """It dies over a kernel that it would never have finished; to the heir, who has the real bench, it is a good one."""
    manifest = bare.make(interface(), symbols={"width": 4}).manifest
    blob = bare.make(manifest.interface, symbols={"width": 4}).blob
    sleeping = bare.signed(manifest.model_copy(update={"pipeline": "Sleeps"}), blob)
    kernel_id = await queued(bare, sleeping)
    at = bare.endpoints
    command = [sys.executable, "-m", "tests.service.innovation.benches", at.postgres_dsn.get_secret_value()]
    command += [at.grpc_address, str(at.tls_dir), str(at.keys_dir), CORPUS, "2"]
    process = await asyncio.create_subprocess_exec(*command)
    try:
        await until(lambda: _examining(bare, kernel_id))
        told: list[Any] = []
        async with running(judge(bare, "heir", told)):
            await asyncio.sleep(2.5)  # longer than the lease: it is renewed while its holder lives
            assert not told
            process.kill()
            await until(lambda: done(bare, [kernel_id]))
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
    assert (await bare.record(kernel_id)).status is KernelStatus.VALIDATED
    assert [name for name, _, _ in told] == ["heir"]
    assert await attempts(bare, kernel_id) == 2


async def test_a_kernel_that_never_answers_is_rejected_and_holds_nobody_up(bare: Innovation) -> None:
    adversaries = {kernel.name: kernel for kernel in bad()}
    endless = adversaries["module Spins"]
    ids = [await queued(bare, bare.signed(endless.manifest, endless.blob))]
    other = bare.make(interface())
    honest = await queued(bare, other)
    told: list[Any] = []
    async with running(judge(bare, "one", told, IMPATIENT, CORPUS)):
        await until(lambda: done(bare, [honest]))
        assert await phase(bare, ids[0]) is not Phase.DONE
        await until(lambda: done(bare, ids))
    found = await evaluations.get(bare.database, ids[0])
    assert (found.verdict, found.rejection) == (KernelStatus.REJECTED, RejectionReason.TIMEOUT)
    assert "3 attempts" in found.reason
    assert (await bare.record(ids[0])).status is KernelStatus.REJECTED
    assert (await evaluations.get(bare.database, honest)).rejection is None
    assert [record.manifest.kernel_id for _, record, _ in told] == [honest, *ids]


def measurement(seconds: float, target: str = TARGET) -> Measurement:
    return Measurement(
        batch=64, forward_seconds=seconds, forward_seconds_p99=seconds, backward_seconds=seconds, peak_memory_bytes=64,
        precision_drift=1e-7, gradient_norm=1.0, gradient_ratio=1.0, input_gradient_norm=1.0, deterministic=True,
        repetitions=30, target=target,
    )  # fmt: skip


async def standing(bare: Innovation, seconds: float, target: str = TARGET) -> KernelManifest:
    """A kernel that was validated when nobody else had been, with the figures given."""
    kernel = bare.make(interface(), symbols={"width": 4})
    manifest, found = kernel.manifest, measurement(seconds, target)
    verdict = Verdict.fit(found, tags_for(manifest, found, FIXED, risk.UNKNOWN), risk.UNKNOWN, risk.CONSTANT)
    await queued(bare, kernel)
    shelf = library(bare, "before", [])
    await shelf.tell(await shelf.find(manifest.kernel_id), verdict)
    await bare.database.execute(
        """UPDATE urabrask.evaluations SET phase = 5, verdict = 2, measurement = $2, tags = $3, design = $4, risk = $5
           WHERE kernel_id = $1""",
        manifest.kernel_id, found.model_dump_json(), list(verdict.tags), json.dumps(risk.design(manifest)), verdict.risk,
    )  # fmt: skip
    return manifest


async def test_only_those_whose_tier_moved_are_told_and_their_signatures_hold(bare: Innovation) -> None:
    everyone = [
        await standing(bare, 1e-7 * 64 * (n + 1)) for n in range(ENOUGH)
    ]  # all of them fast by the fixed bounds
    elsewhere = await standing(bare, 1.0, "a machine of another kind")
    before = {m.kernel_id: await bare.record(m.kernel_id) for m in (*everyone, elsewhere)}
    told: list[Any] = []
    retag = Retag(bare.database, Bell(bare.database, asyncio.Event()), library(bare, "retag", told))

    examined, wanted = await retag.once(dry_run=True)
    assert (examined, told) == (ENOUGH + 1, [])
    _, changed = await retag.once()
    assert [change.kernel.kernel_id for change in changed] == [change.kernel.kernel_id for change in wanted]
    third = ENOUGH // 3
    moved = {manifest.kernel_id for manifest in everyone[third:]}
    assert {record.manifest.kernel_id for _, record, _ in told} == moved
    trust = TrustList.load(bare.endpoints.keys_dir / "trust.json")
    for rank, manifest in enumerate(everyone):
        record = await bare.record(manifest.kernel_id)
        tier = "low" if rank < third else "medium" if rank < 2 * ENOUGH // 3 else "high"
        assert f"latency:{tier}" in record.tags
        assert record.measurement == before[manifest.kernel_id].measurement
        assert (record.attestations == before[manifest.kernel_id].attestations) == (manifest.kernel_id not in moved)
        verify_kernel(manifest, record.attestations, trust)
        said = verify_statement(manifest, record.attestations[1], trust, "validation").predicate
        assert tuple(said["tags"]) == record.tags
    assert await bare.record(elsewhere.kernel_id) == before[elsewhere.kernel_id]
    assert await retag.once() == (ENOUGH + 1, [])


async def test_what_is_withdrawn_or_judged_anew_is_left_alone(bare: Innovation) -> None:
    everyone = [await standing(bare, 1e-7 * 64 * (n + 1)) for n in range(ENOUGH)]
    withdrawn, again = everyone[-1].kernel_id, everyone[-2].kernel_id
    retire = urza_pb2.UpdateKernelStatusRequest(kernel_id=withdrawn, status=4, reason="superseded")
    await bare.urza().UpdateKernelStatus(retire)
    told: list[Any] = []
    retag = Retag(bare.database, Bell(bare.database, asyncio.Event()), library(bare, "retag", told))
    await bare.database.execute("UPDATE urabrask.evaluations SET phase = 1 WHERE kernel_id = $1", again)
    _, changed = await retag.once()
    assert changed == []  # one too few to compare with
    await bare.database.execute("UPDATE urabrask.evaluations SET phase = 5 WHERE kernel_id = $1", again)
    await retag.once()
    assert withdrawn not in {record.manifest.kernel_id for _, record, _ in told}
    found = await evaluations.get(bare.database, withdrawn)
    assert (found.verdict, found.reason) == (KernelStatus.RETIRED, "superseded")
    assert (await bare.record(withdrawn)).status is KernelStatus.RETIRED


async def test_reports_from_the_field_become_a_risk_of_every_kernel(bare: Innovation) -> None:
    """Here, slow kernels fail: 90 of 100 times, fast ones 10."""
    kernels = [await standing(bare, 64e-6 * (100 if slow else 1)) for slow in (False, True) for _ in range(8)]
    learner = Experience(bare.database, Bell(bare.database, asyncio.Event()))
    draw = random.Random(0)
    for number in range(risk.ENOUGH + 40):
        index = number % len(kernels)
        fails = draw.random() < (0.9 if index >= 8 else 0.1)
        event = report(kernels[index].kernel_id, State.CULLED if fails else State.FOSSILIZED)
        async with bare.database.acquire() as connection, connection.transaction():
            for _ in range(2):
                await learner.on_report(connection, event)
        if number == risk.ENOUGH - 2:
            assert await learner.learn() is None
    assert (await evaluations.get(bare.database, kernels[0].kernel_id)).risk == risk.UNKNOWN
    model = await learner.learn()
    assert model is not None
    assert model.reports == risk.ENOUGH + 40
    assert await experience.current(bare.database) == model
    fast, slow = [await evaluations.get(bare.database, kernels[index].kernel_id) for index in (0, -1)]
    assert (fast.risk_model, slow.risk_model) == (model.version, model.version)
    assert fast.risk is not None
    assert slow.risk is not None
    assert fast.risk < 1 / 3 < 2 / 3 < slow.risk
    assert await learner.learn() is None  # nothing new since
    retag = Retag(bare.database, Bell(bare.database, asyncio.Event()), library(bare, "retag", []))
    await retag.once()
    assert "risk:low" in (await bare.record(kernels[0].kernel_id)).tags
    assert "risk:high" in (await bare.record(kernels[-1].kernel_id)).tags


def report(kernel_id: str, outcome: State) -> Event:
    message = decision_pb2.FieldReport(
        report_id=new_id(),
        run_id="run-1",
        seed_id="run-1/fc1:fc2/0",
        slot="fc1:fc2",
        kernel_id=kernel_id,
        outcome=outcome,
    )
    return Event(wrap(message, producer="tolaria"), message)
