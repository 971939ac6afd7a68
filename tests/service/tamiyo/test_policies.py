"""Policies: named by content, swapped without dropping a call, replaced by the heuristic when they mean nothing."""

from __future__ import annotations

import asyncio

import pytest

from esper_core.errors import InvalidInput, NotFound
from esper_core.pb.esper.core.v1 import telemetry_pb2
from esper_core.pb.esper.tamiyo.v1 import tamiyo_pb2
from esper_core.rpc.convert import to_proto
from services.tamiyo.policies import Policies, describe
from tests.service.platform import Stage
from tests.service.tamiyo.test_decisions import packet


async def update(stage: Stage, **parameters: float) -> tamiyo_pb2.Policy:
    request = tamiyo_pb2.UpdatePolicyRequest(kind="heuristic", parameters=parameters)
    return (await stage.stub("tamiyo").UpdatePolicy(request)).policy


async def load(stage: Stage, version: str) -> tamiyo_pb2.Policy:
    return (await stage.stub("tamiyo").LoadPolicy(tamiyo_pb2.LoadPolicyRequest(version=version))).policy


async def status(stage: Stage) -> tamiyo_pb2.GetPolicyStatusResponse:
    return await stage.stub("tamiyo").GetPolicyStatus(tamiyo_pb2.GetPolicyStatusRequest())


async def test_the_default_heuristic_is_in_force_at_first(stage: Stage) -> None:
    answer = await status(stage)
    assert (answer.policy.kind, answer.policy.active, answer.conservative) == ("heuristic", True, False)
    assert answer.policy.parameters["health_threshold"] == 0.3
    assert answer.policy.parameters["confidence_threshold"] == 0.7
    assert answer.policy.parameters["adaptations_per_epoch"] == 2


async def test_storing_is_not_loading_and_equal_policies_are_one(stage: Stage) -> None:
    before = (await status(stage)).policy.version
    policy = await update(stage, health_threshold=0.2)
    assert not policy.active
    assert (await status(stage)).policy.version == before
    assert policy.version == (await update(stage, health_threshold=0.2, confidence_threshold=0.7)).version
    assert policy.version != (await update(stage, health_threshold=0.25)).version


async def test_unknown_parameters_and_versions_get_a_hint(stage: Stage) -> None:
    with pytest.raises(InvalidInput) as name:
        await update(stage, health_treshold=0.2)
    assert "health_threshold" in name.value.hint
    with pytest.raises(InvalidInput, match="coverage"):
        await update(stage, coverage=7.0)
    with pytest.raises(InvalidInput):
        await update(stage, adaptations_per_epoch=1.5)
    with pytest.raises(NotFound):
        await load(stage, "policy-unknown")


async def test_a_policy_is_swapped_under_load_and_remembered(stage: Stage, run_id: str) -> None:
    default = (await status(stage)).policy.version
    strict = await update(stage, health_threshold=0.05)
    tamiyo = stage.stub("tamiyo", "tolaria")

    async def decide(epoch: int) -> str:
        told = to_proto(packet(run_id, epoch), telemetry_pb2.SystemStatePacket)
        return str((await tamiyo.Step(tamiyo_pb2.StepRequest(packet=told))).signal.policy_version)

    first = [asyncio.create_task(decide(epoch)) for epoch in range(20)]
    assert (await load(stage, strict.version)).active
    second = [asyncio.create_task(decide(epoch)) for epoch in range(20, 40)]
    assert set(await asyncio.gather(*first)) <= {default, strict.version}
    assert set(await asyncio.gather(*second)) == {strict.version}
    elsewhere = Policies(stage.database)
    assert (await elsewhere.load()).stored.version == strict.version
    answer = await status(stage)
    assert answer.decisions >= 40
    assert 0 < answer.median_seconds < 1
    await load(stage, default)


async def test_a_policy_that_means_nothing_here_is_replaced_by_the_heuristic(stage: Stage) -> None:
    """As after a return to an older release: the stored policy is of a kind that it does not know."""
    await stage.database.execute("INSERT INTO tamiyo.policies VALUES ('policy-of-tomorrow', 'oracle', '{}')")
    try:
        policy = await load(stage, "policy-of-tomorrow")
        assert policy.kind == "oracle"
        answer = await status(stage)
        assert (answer.policy.version, answer.conservative) == ("policy-of-tomorrow", True)
    finally:
        await load(stage, describe("heuristic", {}).version)
    assert not (await status(stage)).conservative
