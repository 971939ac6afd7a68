"""``esperctl carve``: what a network no longer needs: planned, tried and taken out while it trains, or from a copy afterwards."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType

from esper_core.cli.command import Invocation, command, noun
from esper_core.cli.export import finished_run
from esper_core.cli.output import cell, enum_name, fields, number, plain, table, words
from esper_core.cli.resolve import LATEST, one, run_of
from esper_core.cli.train import become
from esper_core.ids import check_name
from esper_core.pb.esper.core.v1.carve_pb2 import CarveEvent, CarveOrder, Cut, PlanState, Standing
from esper_core.pb.esper.emrakul.v1 import emrakul_pb2

if TYPE_CHECKING:
    from esper_core.cli.platform import Platform

app = noun("carve", "Carving: what a network no longer needs is silenced on trial, then taken out.")

ANY = "any"
CARVER = "services.tolaria.carve"
_PAGE = 500
RunArgument = Annotated[str, typer.Argument(metavar="[RUN]", help="The run: a name, a prefix, or latest.")]
PlanArgument = Annotated[str, typer.Argument(metavar="PLAN", help="The plan's id or a prefix of it.")]
ReasonOption = Annotated[str, typer.Option(help="Why, for the record.")]


@command(app, "plan")
async def plan(
    call: Invocation,
    run: RunArgument = LATEST,
    parameters: Annotated[
        int | None,
        typer.Option("--max-parameters", min=1, help="Free this many at most.", show_default="the run's own"),
    ] = None,
    loss: Annotated[
        float | None, typer.Option("--max-loss", min=0, help="Loss it may cost at first.", show_default="the run's own")
    ] = None,
    reason: ReasonOption = "",
) -> None:
    """Plan which units a running network could do without; nothing is ordered.

    The run must measure its units: set morphogenetic.carve.enabled. Set autonomous to false there, too, if it shall wait for
    `carve apply`; otherwise it is planned and ordered for by the rules. For a finished run: `esperctl carve copy`.

    Example:  esperctl carve plan digits-1 --max-parameters 500
    """
    async with call.platform() as platform:
        found = await run_of(platform, run)
        request = emrakul_pb2.PlanCarvingRequest(
            run_id=found.run_id, max_parameters=parameters, max_loss=loss, reason=reason
        )
        answer: emrakul_pb2.PlanCarvingResponse = await platform.emrakul.PlanCarving(request)
    call.output.document(plain(answer.plan), *_views(answer.plan))
    call.output.note(cell(f"nothing is ordered yet: esperctl carve apply {answer.plan.plan_id}"))


@command(app, "apply")
async def apply(call: Invocation, plan: PlanArgument, reason: ReasonOption = "") -> None:
    """Order a run to carry a plan out.

    At its next checkpoint boundary without a graft in flight the run silences the units, watches for observe_epochs, then takes
    them out, or wakes them where they are missed. Ordering twice is ordering once.

    Example:  esperctl carve apply 0198c0de
    """
    async with call.platform() as platform:
        plan_id = await _plan_id(platform, plan)
        request = emrakul_pb2.ApplyPlanRequest(plan_id=plan_id, reason=reason)
        answer: emrakul_pb2.ApplyPlanResponse = await platform.emrakul.ApplyPlan(request)
    call.output.document(plain(answer.order), _ordered(answer.order))


@command(app, "undo")
async def undo(call: Invocation, plan: PlanArgument, reason: ReasonOption = "") -> None:
    """Order a run to wake the units of a plan, as they were when they were silenced.

    Only while they are on trial: units that were taken out are gone for good. `carve copy` never touches its run, so there is
    nothing to undo about it.

    Example:  esperctl carve undo 0198c0de
    """
    async with call.platform() as platform:
        plan_id = await _plan_id(platform, plan)
        request = emrakul_pb2.UndoPlanRequest(plan_id=plan_id, reason=reason)
        answer: emrakul_pb2.UndoPlanResponse = await platform.emrakul.UndoPlan(request)
    call.output.document(plain(answer.order), _ordered(answer.order))


@command(app, "show")
async def show(call: Invocation, plan: PlanArgument) -> None:
    """Show a plan: its units, how far it has come, and what the run measured on the way.

    Example:  esperctl carve show 0198c0de -o json
    """
    async with call.platform() as platform:
        plan_id = await _plan_id(platform, plan)
        answer: emrakul_pb2.GetPlanResponse = await platform.emrakul.GetPlan(
            emrakul_pb2.GetPlanRequest(plan_id=plan_id)
        )
    call.output.document(plain(answer.plan), *_views(answer.plan), cell(" "), _events(list(answer.plan.events)))


@command(app, "list")
async def list_plans(
    call: Invocation,
    run: Annotated[str, typer.Option("--run", "-r", help="The run: a name, a prefix, latest, or any.")] = ANY,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="At most this many.")] = 50,
) -> None:
    """List plans, newest first.

    Example:  esperctl carve list --run digits-1
    """
    async with call.platform() as platform:
        run_id = "" if run == ANY else (await run_of(platform, run)).run_id
        request = emrakul_pb2.ListPlansRequest(run_id=run_id, page_size=limit)
        answer: emrakul_pb2.ListPlansResponse = await platform.emrakul.ListPlans(request)
    rows = [
        (
            found.plan_id[:23], found.run_id, _state(found.state), found.epoch, _units(found), found.proposal.parameters,
            found.issued_by, found.reason,
        )
        for found in answer.plans
    ]  # fmt: skip
    columns = ("PLAN", "RUN", "STATE", ">EPOCH", ">UNITS", ">PARAMETERS", "BY", "*WHY")
    call.output.document([plain(found) for found in answer.plans], table(columns, rows, empty="no plans yet"))


@command(app, "survey")
async def survey(call: Invocation, run: RunArgument = LATEST) -> None:
    """Show what a run last told of its units: which stand together, what the least of them is worth, what keeps others.

    Example:  esperctl carve survey digits-1
    """
    async with call.platform() as platform:
        run_id = (await run_of(platform, run)).run_id
        answer: emrakul_pb2.GetSurveyResponse = await platform.emrakul.GetSurvey(
            emrakul_pb2.GetSurveyRequest(run_id=run_id)
        )
    found = answer.survey
    summary = fields(
        [
            ("run", found.run_id), ("epoch", found.epoch), ("parameters", found.parameters), ("flops", found.flops),
            ("one plan may free", found.room_parameters), ("and cost", number(found.room_loss)),
            ("autonomous", found.autonomous), ("obstacle", found.obstacle),
        ]
    )  # fmt: skip
    columns = ("CLUSTER", ">UNITS", ">GROWN", ">PARAMETERS EACH", ">LEAST WORTH", "*OBSTACLE")
    rows = [_standing(standing) for standing in found.clusters]
    call.output.document(plain(found), summary, cell(" "), table(columns, rows, empty="no units"))


@command(app, "copy")
def copy(
    call: Invocation,
    run: Annotated[str, typer.Argument(metavar="[RUN]", help="A finished run's name or a prefix of it.")] = LATEST,
    share: Annotated[float, typer.Option(min=0, max=0.99, help="Take out this share of the parameters at most.")] = 0.5,
    drop: Annotated[float, typer.Option("--max-drop", min=0, max=0.99, help="Accuracy it may cost, absolute.")] = 0.02,
    tune: Annotated[int, typer.Option("--fine-tune", min=0, max=1000, help="Epochs to train on after each cut.")] = 0,
    dry: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and write nothing.")] = False,
    name: Annotated[str | None, typer.Option(help="Of the copy.", show_default="RUN-carved")] = None,
) -> None:
    """Carve a copy of a finished run's network, with or without the platform.

    The run is only read: the copy is a run's directory of its own beside it, which `esperctl export` takes like any other, and
    carving is undone by deleting it. Its carve.json tells what went and what it cost.

    Example:  esperctl carve copy digits-1 --share 0.3

    Example:  esperctl carve copy latest --fine-tune 3 --name small
    """
    arguments = [finished_run(call.data_dir / "runs", run), "--share", str(share), "--max-drop", str(drop)]
    arguments += ["--fine-tune", str(tune), *(["--dry-run"] if dry else [])]
    if name is not None:
        arguments += ["--name", check_name(name, "run name")]
    arguments += ["--data-dir", str(call.data_dir), "-o", "json" if call.output.json else "text"]
    become(CARVER, arguments)


async def _plan_id(platform: Platform, given: str) -> str:
    return one(given, [plan.plan_id async for plan in _all(platform)], "plan")


async def _all(platform: Platform) -> AsyncIterator[emrakul_pb2.Plan]:
    token = ""
    while True:
        request = emrakul_pb2.ListPlansRequest(page_size=_PAGE, page_token=token)
        answer: emrakul_pb2.ListPlansResponse = await platform.emrakul.ListPlans(request)
        for plan in answer.plans:
            yield plan
        token = answer.next_page_token
        if not token:
            return


def _views(plan: emrakul_pb2.Plan) -> list[RenderableType]:
    summary = fields(
        [
            ("plan", plan.plan_id), ("run", plan.run_id), ("state", _state(plan.state)), ("measured at", f"epoch {plan.epoch}"),
            ("by", plan.issued_by), ("reason", plan.reason), ("units", _units(plan)),
            ("frees", words(f"{plan.proposal.parameters} parameters,", f"{plan.proposal.flops} FLOPs per sample")),
            ("expected change of loss", number(plan.proposal.expected_change)),
        ]
    )  # fmt: skip
    return [summary, cell(" "), _cuts(list(plan.proposal.cuts))]


def _cuts(cuts: list[Cut]) -> RenderableType:
    rows = [(cut.cluster, len(cut.units), " ".join(map(str, cut.units))) for cut in cuts]
    return table(("CLUSTER", ">UNITS", "*WHICH"), rows, empty="no units")


def _events(events: list[CarveEvent]) -> RenderableType:
    rows = [
        (
            event.epoch, _state(event.state), sum(len(cut.units) for cut in event.cuts),
            event.parameters or None, event.flops or None,
            number(event.accuracy_before) if event.HasField("accuracy_before") else None,
            number(event.accuracy) if event.HasField("accuracy") else None,
            event.reason,
        )
        for event in events
    ]  # fmt: skip
    columns = (">EPOCH", "STATE", ">UNITS", ">FREED", ">FLOPS", ">BEFORE", ">ACCURACY", "*WHY")
    return table(columns, rows, empty="the run has not answered yet")


def _ordered(order: CarveOrder) -> RenderableType:
    return words("ordered", order.order_id, "of run", order.run_id + ";", "it answers at its next checkpoint boundary")


def _standing(standing: Standing) -> tuple[object, ...]:
    least = number(min(standing.importance)) if standing.importance else None
    return standing.cluster, standing.units, standing.grown, standing.unit_parameters, least, standing.obstacle


def _units(plan: emrakul_pb2.Plan) -> int:
    return sum(len(cut.units) for cut in plan.proposal.cuts)


def _state(state: int) -> str:
    return enum_name(PlanState.DESCRIPTOR, state)
