"""Tamiyo's wire edge: packets in, decisions out."""

from __future__ import annotations

import grpc
from google.protobuf import json_format

from esper_core.bus.database import Pool
from esper_core.control.packet import AdaptationSignal, SystemStatePacket
from esper_core.pb.esper.core.v1 import decision_pb2
from esper_core.pb.esper.tamiyo.v1 import tamiyo_pb2, tamiyo_pb2_grpc
from esper_core.rpc.convert import from_proto, to_proto
from services import page
from services.tamiyo.controller import Controller
from services.tamiyo.decisions import Decisions, Experience
from services.tamiyo.policies import Policies, Policy, describe

Context = grpc.aio.ServicerContext[object, object]


class TamiyoServicer(tamiyo_pb2_grpc.TamiyoServiceServicer):
    """See ``protos/esper/tamiyo/v1/tamiyo.proto`` for what each call promises.

    Args:
        since: ordinal of the last decision before this process; status figures count from there.
    """

    def __init__(
        self,
        controller: Controller,
        policies: Policies,
        decisions: Decisions,
        experience: Experience,
        database: Pool,
        since: int,
    ) -> None:
        self._controller = controller
        self._policies = policies
        self._decisions = decisions
        self._experience = experience
        self._database = database
        self._since = since

    async def Step(self, request: tamiyo_pb2.StepRequest, _: Context) -> tamiyo_pb2.StepResponse:
        packet = from_proto(request.packet, SystemStatePacket)
        return tamiyo_pb2.StepResponse(signal=_signal(await self._controller.step(packet)))

    async def Analyze(self, request: tamiyo_pb2.AnalyzeRequest, _: Context) -> tamiyo_pb2.AnalyzeResponse:
        packet = from_proto(request.packet, SystemStatePacket)
        return tamiyo_pb2.AnalyzeResponse(signal=_signal(await self._controller.analyze(packet)))

    async def GetPolicyStatus(
        self, _request: tamiyo_pb2.GetPolicyStatusRequest, _: Context
    ) -> tamiyo_pb2.GetPolicyStatusResponse:
        decisions, median = await self._decisions.since(self._since)
        force = self._policies.force
        return tamiyo_pb2.GetPolicyStatusResponse(
            policy=_policy(force.stored, active=True),
            decisions=decisions,
            median_seconds=median,
            conservative=force.conservative,
        )

    async def LoadPolicy(self, request: tamiyo_pb2.LoadPolicyRequest, _: Context) -> tamiyo_pb2.LoadPolicyResponse:
        force = await self._policies.activate(request.version)
        return tamiyo_pb2.LoadPolicyResponse(policy=_policy(force.stored, active=True))

    async def UpdatePolicy(
        self, request: tamiyo_pb2.UpdatePolicyRequest, _: Context
    ) -> tamiyo_pb2.UpdatePolicyResponse:
        policy = describe(request.kind, request.parameters)
        await self._policies.store(policy)
        active = policy.version == self._policies.force.stored.version
        return tamiyo_pb2.UpdatePolicyResponse(policy=_policy(policy, active=active))

    async def ListDecisions(
        self, request: tamiyo_pb2.ListDecisionsRequest, _: Context
    ) -> tamiyo_pb2.ListDecisionsResponse:
        signals, token = await self._decisions.newest(
            run_id=request.run_id,
            actions_only=request.actions_only,
            size=page.wanted(request.page_size),
            token=request.page_token,
        )
        return tamiyo_pb2.ListDecisionsResponse(decisions=map(_signal, signals), next_page_token=token)

    async def AddExperience(
        self, request: tamiyo_pb2.AddExperienceRequest, _: Context
    ) -> tamiyo_pb2.AddExperienceResponse:
        report = json_format.MessageToDict(request.report, preserving_proto_field_name=True)
        async with self._database.acquire() as connection:
            await self._experience.add(connection, request.report.report_id, request.report.run_id, report)
        return tamiyo_pb2.AddExperienceResponse(reports=await self._experience.count())


def _signal(signal: AdaptationSignal) -> decision_pb2.AdaptationSignal:
    return to_proto(signal, decision_pb2.AdaptationSignal)


def _policy(policy: Policy, *, active: bool) -> tamiyo_pb2.Policy:
    return tamiyo_pb2.Policy(
        version=policy.version, kind=policy.kind, parameters=dict(policy.parameters), active=active
    )
