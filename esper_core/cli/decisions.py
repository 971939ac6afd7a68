"""``esperctl decisions``: what the controller did and left undone, with its reasons."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType

from esper_core.cli.command import Invocation, command, noun
from esper_core.cli.output import cell, enum_name, fields, number, plain, short, table
from esper_core.cli.resolve import LATEST, one, run_of
from esper_core.pb.esper.core.v1.decision_pb2 import AdaptationAction, AdaptationSignal, Reason, ReasonCode
from esper_core.pb.esper.core.v1.lifecycle_pb2 import SeedState
from esper_core.pb.esper.tamiyo.v1 import tamiyo_pb2

if TYPE_CHECKING:
    from esper_core.cli.platform import Platform

app = noun("decisions", "Decisions: what the controller did or left undone, and why.")

ANY = "any"
_PAGE = 500
RunOption = Annotated[str, typer.Option("--run", "-r", help="The run: a name, a prefix, latest, or any.")]


@command(app, "list")
async def list_decisions(
    call: Invocation,
    run: RunOption = LATEST,
    actions: Annotated[bool, typer.Option("--actions", "-a", help="Leave out those that did nothing.")] = False,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="At most this many.")] = 50,
) -> None:
    """List decisions with their reasons, newest first.

    Example:  esperctl decisions list --run digits-1 --actions
    """
    async with call.platform() as platform:
        run_id = "" if run == ANY else (await run_of(platform, run)).run_id
        request = tamiyo_pb2.ListDecisionsRequest(run_id=run_id, actions_only=actions, page_size=limit)
        answer: tamiyo_pb2.ListDecisionsResponse = await platform.tamiyo.ListDecisions(request)
    rows = [
        (
            signal.decision_id[:18], signal.run_id, signal.epoch,
            "; ".join(map(_deed, signal.actions)) or "wait", _because(signal),
        )
        for signal in answer.decisions
    ]  # fmt: skip
    columns = ("DECISION", "RUN", ">EPOCH", "*DID", "*BECAUSE")
    documents = [plain(signal) for signal in answer.decisions]
    call.output.document(documents, table(columns, rows, empty="no decisions yet"))


@command(app, "show")
async def show_decision(
    call: Invocation,
    decision: Annotated[str, typer.Argument(help="The decision's id or a prefix of it.")],
    run: RunOption = ANY,
) -> None:
    """Show one decision: each action and each abstention with the figures compared.

    Example:  esperctl decisions show 0198c0de-1234
    """
    async with call.platform() as platform:
        run_id = "" if run == ANY else (await run_of(platform, run)).run_id
        found = {s.decision_id: s async for s in _all(platform, run_id) if s.decision_id.startswith(decision)}
    signal = found[one(decision, found, "decision")]
    summary = fields(
        [
            ("decision", signal.decision_id), ("run", signal.run_id), ("epoch", signal.epoch),
            ("policy", signal.policy_version), ("conservative", signal.conservative),
            ("took", f"{signal.seconds * 1000:.2f} ms"),
        ]
    )  # fmt: skip
    views: list[RenderableType] = [summary]
    for action in signal.actions:
        views += [cell(" "), _action(action), _reasons(action.reasons)]
    if signal.abstentions:
        views += [cell(" "), cell("left undone because"), _reasons(signal.abstentions)]
    call.output.document(plain(signal), *views)


async def _all(platform: Platform, run_id: str) -> AsyncIterator[AdaptationSignal]:
    token = ""
    while True:
        request = tamiyo_pb2.ListDecisionsRequest(run_id=run_id, page_size=_PAGE, page_token=token)
        answer: tamiyo_pb2.ListDecisionsResponse = await platform.tamiyo.ListDecisions(request)
        for signal in answer.decisions:
            yield signal
        token = answer.next_page_token
        if not token:
            return


def _deed(action: AdaptationAction) -> str:
    target = enum_name(SeedState.DESCRIPTOR, action.command.target)
    kernel = f" with {short(action.command.kernel_id)}" if action.command.kernel_id else ""
    return f"{action.command.slot} to {target}{kernel}"


def _because(signal: AdaptationSignal) -> str:
    reasons = [reason for action in signal.actions for reason in action.reasons] or list(signal.abstentions)
    return "; ".join(dict.fromkeys(reason.detail or _code(reason) for reason in reasons))


def _action(action: AdaptationAction) -> RenderableType:
    return fields(
        [
            ("did", _deed(action)),
            ("confidence", action.confidence),
            ("expected gain", action.expected_gain),
            ("command", action.command.command_id),
        ]
    )


def _reasons(reasons: Iterable[Reason]) -> RenderableType:
    rows = [
        (
            _code(reason),
            number(reason.value) if reason.HasField("value") else None,
            number(reason.threshold) if reason.HasField("threshold") else None,
            reason.detail,
        )
        for reason in reasons
    ]
    return table(("REASON", ">VALUE", ">THRESHOLD", "*DETAIL"), rows, empty="no reason was given")


def _code(reason: Reason) -> str:
    return enum_name(ReasonCode.DESCRIPTOR, reason.code)
