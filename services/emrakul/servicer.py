"""Emrakul's wire edge: plans and orders in, plans with their events out."""

from __future__ import annotations

import grpc

from esper_core.control.carve.papers import CarveEvent, CarveOrder, CarveSurvey, Proposal
from esper_core.pb.esper.core.v1 import carve_pb2
from esper_core.pb.esper.emrakul.v1 import emrakul_pb2, emrakul_pb2_grpc
from esper_core.rpc.auth import principal
from esper_core.rpc.convert import to_proto
from services import page
from services.emrakul.plans import PlanRow, Plans, Wish

Context = grpc.aio.ServicerContext[object, object]


class EmrakulServicer(emrakul_pb2_grpc.EmrakulServiceServicer):
    """See ``protos/esper/emrakul/v1/emrakul.proto`` for what each call promises."""

    def __init__(self, plans: Plans) -> None:
        self._plans = plans

    async def PlanCarving(self, request: emrakul_pb2.PlanCarvingRequest, _: Context) -> emrakul_pb2.PlanCarvingResponse:
        wish = Wish(
            run_id=request.run_id,
            plan_id=request.plan_id,
            max_parameters=request.max_parameters if request.HasField("max_parameters") else None,
            max_loss=request.max_loss if request.HasField("max_loss") else None,
            issued_by=principal(),
            reason=request.reason,
        )
        return emrakul_pb2.PlanCarvingResponse(plan=_plan(await self._plans.plan(wish)))

    async def GetPlan(self, request: emrakul_pb2.GetPlanRequest, _: Context) -> emrakul_pb2.GetPlanResponse:
        row, events = await self._plans.get(request.plan_id)
        return emrakul_pb2.GetPlanResponse(plan=_plan(row, events))

    async def ListPlans(self, request: emrakul_pb2.ListPlansRequest, _: Context) -> emrakul_pb2.ListPlansResponse:
        size, before = page.wanted(request.page_size), page.before(request.page_token)
        rows, token = await self._plans.page(request.run_id, size, before)
        return emrakul_pb2.ListPlansResponse(plans=[_plan(row) for row in rows], next_page_token=token)

    async def ApplyPlan(self, request: emrakul_pb2.ApplyPlanRequest, _: Context) -> emrakul_pb2.ApplyPlanResponse:
        order = await self._plans.apply(request.plan_id, principal(), request.reason)
        return emrakul_pb2.ApplyPlanResponse(order=_order(order))

    async def UndoPlan(self, request: emrakul_pb2.UndoPlanRequest, _: Context) -> emrakul_pb2.UndoPlanResponse:
        order = await self._plans.undo(request.plan_id, principal(), request.reason)
        return emrakul_pb2.UndoPlanResponse(order=_order(order))

    async def GetSurvey(self, request: emrakul_pb2.GetSurveyRequest, _: Context) -> emrakul_pb2.GetSurveyResponse:
        survey: CarveSurvey = await self._plans.survey(request.run_id)
        return emrakul_pb2.GetSurveyResponse(survey=to_proto(survey, carve_pb2.CarveSurvey))


def _order(order: CarveOrder) -> carve_pb2.CarveOrder:
    return to_proto(order, carve_pb2.CarveOrder)


def _plan(row: PlanRow, events: list[CarveEvent] | None = None) -> emrakul_pb2.Plan:
    proposal: Proposal = row.proposal
    return emrakul_pb2.Plan(
        plan_id=row.plan_id,
        run_id=row.run_id,
        state=carve_pb2.PlanState.Name(row.state),
        proposal=to_proto(proposal, carve_pb2.Proposal),
        epoch=row.epoch,
        issued_by=row.issued_by,
        reason=row.reason,
        events=[to_proto(event, carve_pb2.CarveEvent) for event in events or ()],
    )
