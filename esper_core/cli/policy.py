"""``esperctl policy``: the controller's policy in force."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import RenderableType

from esper_core.cli.command import Invocation, command, noun
from esper_core.cli.output import fields, number, plain
from esper_core.pb.esper.tamiyo.v1 import tamiyo_pb2

app = noun("policy", "The policy the controller decides by.")


@command(app, "status")
async def policy_status(call: Invocation) -> None:
    """Show the policy in force, its parameters, and how it has decided so far.

    Example:  esperctl policy status
    """
    async with call.platform() as platform:
        answer: tamiyo_pb2.GetPolicyStatusResponse = await platform.tamiyo.GetPolicyStatus(
            tamiyo_pb2.GetPolicyStatusRequest()
        )
    decided = f"{answer.decisions}, median {answer.median_seconds * 1000:.2f} ms"
    pairs = [("decisions", decided), ("conservative", answer.conservative)]
    call.output.document(plain(answer), _policy(answer.policy), fields(pairs))


@command(app, "load")
async def load_policy(
    call: Invocation, version: Annotated[str, typer.Argument(help="A stored policy's version, a content id.")]
) -> None:
    """Put a stored policy in force; no call is dropped.

    Example:  esperctl policy load policy-3f0c…
    """
    async with call.platform() as platform:
        request = tamiyo_pb2.LoadPolicyRequest(version=version)
        answer: tamiyo_pb2.LoadPolicyResponse = await platform.tamiyo.LoadPolicy(request)
    call.output.document(plain(answer.policy), _policy(answer.policy))


def _policy(policy: tamiyo_pb2.Policy) -> RenderableType:
    parameters = ", ".join(f"{name} {number(policy.parameters[name])}" for name in sorted(policy.parameters))
    pairs = [("policy", policy.version), ("kind", policy.kind), ("in force", policy.active), ("parameters", parameters)]
    return fields(pairs)
