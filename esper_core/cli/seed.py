"""``esperctl seed``: the seeds in a run's slots, what happened to them, and orders to them.

An order is durable when the command returns; the run applies it once, at its next epoch boundary, and what came of it
stands in the seed's history.
"""

from __future__ import annotations

import enum
from typing import Annotated

import typer
from rich.console import RenderableType
from rich.text import Text

from esper_core.cli.command import Invocation, command, noun
from esper_core.cli.output import cell, enum_name, enum_value, fields, number, plain, short, table, words
from esper_core.cli.resolve import LATEST, kernel_of, run_of, slot_of, split_seed_id
from esper_core.ids import new_id
from esper_core.lifecycle import State
from esper_core.pb.esper.core.v1.lifecycle_pb2 import Command, RampStyle, Seed, SeedEvent, SeedState
from esper_core.pb.esper.kasmina.v1 import kasmina_pb2

app = noun("seed", "Seeds: where they stand, what happened to them, orders to them.")

ANY = "any"
COUNTED = {
    "native_passes": "passes forward",
    "native_gradients": "backward by compiled code",
    "eager_passes": "without it",
}
RunOption = Annotated[str, typer.Option("--run", "-r", help="The run: a name, a prefix, or latest.")]
SlotArgument = Annotated[
    str | None,
    typer.Argument(metavar="[SLOT]", help="A slot (fc1:fc2), a prefix, or a seed id; may be left out if there is one."),
]
ReasonOption = Annotated[str, typer.Option(help="Why, for the record.")]

StateName = enum.StrEnum("StateName", {state.name: state.name.lower() for state in State})  # type: ignore[misc]


class Ending(enum.StrEnum):
    """Where an operator may send a seed."""

    CULLED = "culled"
    ROLLED_BACK = "rolled_back"


class Style(enum.StrEnum):
    """How alpha may rise."""

    LINEAR = "linear"
    COSINE = "cosine"
    SIGMOID = "sigmoid"


@command(app, "list")
async def list_seeds(
    call: Invocation,
    run: Annotated[str, typer.Option("--run", "-r", help="The run: a name, a prefix, latest, or any.")] = LATEST,
    state: Annotated[list[StateName] | None, typer.Option(help="Only in this state; may be repeated.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="At most this many.")] = 100,
) -> None:
    """List seeds, most recently changed first.

    Example:  esperctl seed list --run any --state training --state grafting
    """
    wanted = [int(State[name.name]) for name in state or []]
    async with call.platform() as platform:
        run_id = "" if run == ANY else (await run_of(platform, run)).run_id
        request = kasmina_pb2.ListSeedsRequest(run_id=run_id, states=wanted, page_size=limit)  # type: ignore[arg-type]
        answer: kasmina_pb2.ListSeedsResponse = await platform.kasmina.ListSeeds(request)
    rows = [
        (
            seed.run_id, seed.slot, seed.generation, _state(seed.state), seed.epoch, seed.alpha, _health(seed),
            seed.blueprint_name, short(seed.kernel_id),
        )
        for seed in answer.seeds
    ]  # fmt: skip
    columns = ("RUN", "SLOT", ">GEN", "STATE", ">EPOCH", ">ALPHA", ">HEALTH", "BLUEPRINT", "KERNEL")
    call.output.document([plain(seed) for seed in answer.seeds], table(columns, rows, empty="no seeds"))


@command(app, "show")
async def show_seed(
    call: Invocation,
    slot: SlotArgument = None,
    run: RunOption = LATEST,
    generation: Annotated[
        int | None, typer.Option(min=0, help="Which of the slot's seeds.", show_default="the last that grew")
    ] = None,
) -> None:
    """Show a seed and its whole history: each state change with its epoch, its reason and what was measured for it.

    Where the run trusts compiled code, `runs` says whether the kernel has run natively, and how many passes did.

    Example:  esperctl seed show fc1:fc2 --run digits-1
    """
    if slot is not None and (parts := split_seed_id(slot)) is not None:
        run, slot, generation = parts
    async with call.platform() as platform:
        found = await run_of(platform, run)
        request = kasmina_pb2.GetSeedRequest(run_id=found.run_id, slot=slot_of(found, slot), generation=generation)
        answer: kasmina_pb2.GetSeedResponse = await platform.kasmina.GetSeed(request)
    seed = answer.seed
    summary = fields(
        [
            ("seed", seed.seed_id), ("state", _state(seed.state)), ("alpha", number(seed.alpha)),
            ("health", _health(seed)), ("blueprint", seed.blueprint_name), ("kernel", seed.kernel_id),
            ("runs", _execution(list(seed.history))), ("last change", f"epoch {seed.epoch}"),
        ]
    )  # fmt: skip
    call.output.document(plain(seed), summary, cell(" "), _history(list(seed.history)))


@command(app, "watch")
async def watch_seeds(
    call: Invocation,
    run: Annotated[str, typer.Option("--run", "-r", help="The run: a name, a prefix, latest, or any.")] = LATEST,
) -> None:
    """Follow state changes as they happen, from the first one, until the run ends.

    Example:  esperctl seed watch -o json | jq 'select(.target == "FOSSILIZED")'
    """
    async with call.platform() as platform:
        run_id = "" if run == ANY else (await run_of(platform, run)).run_id
        request = kasmina_pb2.WatchSeedsRequest(run_id=run_id, until_run_ends=run != ANY)
        async for news in platform.kasmina.WatchSeeds(request):
            call.output.line(plain(news.event), _event_line(news.event))


@command(app, "germinate")
async def germinate(
    call: Invocation,
    slot: Annotated[str, typer.Argument(help="The slot, e.g. fc1:fc2, or a prefix of it.")],
    kernel: Annotated[str, typer.Argument(help="The kernel's id or a prefix; see `esperctl kernel list`.")],
    run: RunOption = LATEST,
    style: Annotated[Style | None, typer.Option(help="How alpha rises.", show_default="the run's own")] = None,
    reason: ReasonOption = "asked for by an operator",
) -> None:
    """Order a dormant seed to grow a validated kernel at the run's next epoch boundary.

    Example:  esperctl seed germinate fc1:fc2 kernel-3f0c1ab2
    """
    async with call.platform() as platform:
        found = await run_of(platform, run)
        record = await kernel_of(platform, kernel)
        request = kasmina_pb2.GerminateRequest(
            command_id=new_id(),
            run_id=found.run_id,
            slot=slot_of(found, slot),
            kernel_id=record.manifest.kernel_id,
            style=enum_value(RampStyle.DESCRIPTOR, style.name if style else "UNSPECIFIED"),
            reason=reason,
        )
        answer: kasmina_pb2.GerminateResponse = await platform.kasmina.Germinate(request)
    ordered(call, answer.command)


@command(app, "transition")
async def transition(
    call: Invocation,
    slot: Annotated[str, typer.Argument(help="The slot, e.g. fc1:fc2, or a prefix of it.")],
    target: Annotated[Ending, typer.Argument(help="Where the seed shall go.", case_sensitive=False)],
    run: RunOption = LATEST,
    reason: ReasonOption = "asked for by an operator",
) -> None:
    """Order a seed out of its slot: culled (given up) or rolled_back (emergency, back to the last good state).

    Example:  esperctl seed transition fc1:fc2 culled --reason "loss is stuck"
    """
    async with call.platform() as platform:
        found = await run_of(platform, run)
        request = kasmina_pb2.TransitionRequest(
            command_id=new_id(),
            run_id=found.run_id,
            slot=slot_of(found, slot),
            target=enum_value(SeedState.DESCRIPTOR, target.name),
            reason=reason,
        )
        answer: kasmina_pb2.TransitionResponse = await platform.kasmina.Transition(request)
    ordered(call, answer.command)


def ordered(call: Invocation, order: Command) -> None:
    """Answer with a durable order, and tell where its outcome will be seen."""
    pairs = [
        ("ordered", f"{order.slot} of run {order.run_id} to {_state(order.target)}"),
        ("kernel", order.kernel_id),
        ("command", order.command_id),
    ]
    call.output.document(plain(order), fields(pairs))
    call.output.note(
        f"applied at the run's next epoch boundary; see `esperctl seed show {order.slot} --run {order.run_id}`"
    )


def _state(value: int) -> str:
    return enum_name(SeedState.DESCRIPTOR, value)


def _health(seed: Seed) -> float | None:
    return seed.health if seed.health >= 0 else None


def _history(history: list[SeedEvent]) -> RenderableType:
    rows = [
        (event.epoch, _change(event), event.alpha, event.reason, _measurements(event), event.command_id[:18])
        for event in history
    ]
    columns = (">EPOCH", "FROM → TO", ">ALPHA", "*REASON", "*MEASURED", "COMMAND")
    return table(columns, rows, empty="nothing has happened to it yet")


def _execution(history: list[SeedEvent]) -> str | None:
    """How the kernel has run up to the last change that tells; None where its run trusts no compiled code."""
    told = next((event for event in reversed(history) if event.execution), None)
    if told is None:
        return None
    counts = {name: int(told.measurements[name]) for name in COUNTED if name in told.measurements}
    figures = ", ".join(f"{count:,} {COUNTED[name]}" for name, count in counts.items())
    return f"{told.execution} ({figures})" if figures else told.execution


def _change(event: SeedEvent) -> Text:
    return words(cell(_state(event.source)), " → ", cell(_state(event.target)))


def _measurements(event: SeedEvent) -> Text:
    return words(" ".join(f"{name}={number(event.measurements[name])}" for name in sorted(event.measurements)))


def _event_line(event: SeedEvent) -> Text:
    start = f"epoch {event.epoch:>4}  {event.run_id}  {event.slot}  "
    return words(start, _change(event), f"  {event.reason}  ", _measurements(event))
