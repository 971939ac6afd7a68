"""``esperctl blueprint propose``: ask Karn for designs."""

from __future__ import annotations

from typing import Annotated

import typer

from esper_core.cli.command import Invocation, command
from esper_core.cli.karn import proposals_table
from esper_core.cli.output import plain
from esper_core.pb.esper.karn.v1 import karn_pb2


def register(app: typer.Typer) -> None:
    """Put the command into ``app``."""
    command(app, "propose")(propose)


async def propose(
    call: Invocation,
    interface: Annotated[str, typer.Argument(help="An interface's id or a prefix; see `esperctl karn interfaces`.")],
    count: Annotated[int, typer.Option("--count", "-c", min=1, max=64, help="How many.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of its chance; 0 draws one.")] = 0,
    only_say: Annotated[bool, typer.Option("--only-say", help="Keep and build nothing.")] = False,
) -> None:
    """Have Karn propose designs for a slot interface, and have them built and measured.

    Example:  esperctl blueprint propose interface-3f0c1ab2 --count 4

    Example:  esperctl blueprint propose 3f0c1ab2 --only-say -o json
    """
    request = karn_pb2.ProposeRequest(interface_id=interface, count=count, seed=seed, only_say=only_say)
    async with call.platform() as platform:
        answer: karn_pb2.ProposeResponse = await platform.karn.Propose(request)
    call.output.document(
        [plain(proposal) for proposal in answer.proposals],
        proposals_table(answer.proposals, "nothing new could be bred for this interface"),
    )
