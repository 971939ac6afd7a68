"""``esperctl karn``: the architect that invents blueprints; its searches, its archive, its proposals."""

from __future__ import annotations

import contextlib
import enum
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from esper_core.cli.command import Invocation, command, noun
from esper_core.cli.output import (
    cell,
    clean,
    console,
    enum_name,
    enum_value,
    fields,
    moment,
    number,
    plain,
    short,
    table,
    words,
)  # fmt: skip
from esper_core.cli.resolve import LATEST, run_of, slot_of
from esper_core.errors import Conflict, DeadlineExceeded, InvalidInput
from esper_core.pb.esper.core.v1 import blueprint_pb2
from esper_core.pb.esper.karn.v1 import karn_pb2

if TYPE_CHECKING:
    from esper_core.cli.platform import Platform

app = noun("karn", "Karn: invents blueprints, has them built and measured, keeps the best of every kind.")

NOTHING = "train a run first, for example `esperctl train digits`: its slots tell Karn what to design for"
SearchArgument = Annotated[str, typer.Argument(help="A search's id, or latest.", show_default="latest")]
InterfaceOption = Annotated[str | None, typer.Option("--interface", "-i", help="An interface's id or a prefix of it.")]
LimitOption = Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="At most this many.")]


class StateName(enum.StrEnum):
    """Proposal states to ask for."""

    PROPOSED = "proposed"
    BUILDING = "building"
    MEASURED = "measured"
    FAILED = "failed"
    REJECTED = "rejected"
    UNJUDGED = "unjudged"


@command(app, "run")
async def run_search(
    call: Invocation,
    generations: Annotated[int, typer.Option("--generations", "-g", min=1, max=10000)] = 20,
    population: Annotated[
        int, typer.Option("--population", "-p", min=1, max=256, help="Proposals per generation.")
    ] = 8,
    run: Annotated[
        str | None, typer.Option("--run", help="For this run's slots as they are now, or the latest's.")
    ] = None,
    slot: Annotated[list[str] | None, typer.Option("--slot", help="Only for this slot of it; may be repeated.")] = None,
    interface: InterfaceOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Of its chance; 0 draws one.")] = 0,
    detach: Annotated[bool, typer.Option("--detach", help="Only start it; see `esperctl karn watch`.")] = False,
) -> None:
    """Breed designs generation after generation: propose, build, measure, keep the best of every kind.

    Without --run or --interface for every slot interface known. The search belongs to the platform: it goes on when this
    command ends, and after a restart. It gives up, exit code 9, when Urabrask judges nothing for upkeep.verdict_seconds.
    With -o json one line per news.

    Example:  esperctl karn run --generations 20 --run latest --slot fc2:fc3

    Example:  esperctl karn run -g 5 -p 4 --interface interface-3f0c1ab2
    """
    async with call.platform() as platform:
        wanted = await _wanted(platform, run, slot or [], interface)
        begin = karn_pb2.StartSearchRequest(
            interface_ids=wanted, generations=generations, population=population, seed=seed
        )
        answer: karn_pb2.StartSearchResponse = await platform.karn.StartSearch(begin)
        if detach:
            call.output.document(plain(answer.search), _summary(answer.search))
            return
        await _follow(call, platform, answer.search.search_id)


@command(app, "watch")
async def watch_search(call: Invocation, search: SearchArgument = LATEST) -> None:
    """Follow a search until it ends.

    Example:  esperctl karn watch
    """
    async with call.platform() as platform:
        await _follow(call, platform, search)


@command(app, "stop")
async def stop_search(call: Invocation, search: SearchArgument = LATEST) -> None:
    """End a search; what is being built is still built.

    Example:  esperctl karn stop
    """
    async with call.platform() as platform:
        answer: karn_pb2.StopSearchResponse = await platform.karn.StopSearch(
            karn_pb2.StopSearchRequest(search_id=search)
        )
    call.output.document(plain(answer.search), _summary(answer.search))


@command(app, "searches")
async def list_searches(call: Invocation, limit: LimitOption = 20) -> None:
    """List searches, newest first.

    Example:  esperctl karn searches
    """
    async with call.platform() as platform:
        request = karn_pb2.ListSearchesRequest(page_size=limit)
        answer: karn_pb2.ListSearchesResponse = await platform.karn.ListSearches(request)
    rows = [
        (
            found.search_id, _state(found), f"{found.generation}/{found.generations}", len(found.interface_ids),
            found.proposed, found.waiting, found.unfit, _best(found), moment(found.created),
        )
        for found in answer.searches
    ]  # fmt: skip
    columns = ("SEARCH", "STATE", ">GENERATION", ">SLOTS", ">PROPOSED", ">WAITING", ">UNFIT", ">BEST", "STARTED")
    empty = "no searches yet: `esperctl karn run`"
    call.output.document([plain(found) for found in answer.searches], table(columns, rows, empty=empty))


@command(app, "interfaces")
async def list_interfaces(call: Invocation, limit: LimitOption = 100) -> None:
    """List the slot interfaces that Karn designs for, newest first.

    Example:  esperctl karn interfaces
    """
    async with call.platform() as platform:
        request = karn_pb2.ListInterfacesRequest(page_size=limit)
        answer: karn_pb2.ListInterfacesResponse = await platform.karn.ListInterfaces(request)
    rows = [
        (
            short(found.interface_id), enum_name(blueprint_pb2.Layout.DESCRIPTOR, found.interface.layout),
            f"{found.interface.in_width} → {found.interface.hidden_width} → {found.interface.out_width}",
            found.interface.activation, found.level, found.measured, found.run_id,
        )
        for found in answer.interfaces
    ]  # fmt: skip
    columns = ("INTERFACE", "LAYOUT", "WIDTHS", "ACTIVATION", ">LEVEL", ">MEASURED", "RUN")
    call.output.document(
        [plain(found) for found in answer.interfaces],
        table(columns, rows, empty=f"no interface is known yet: {NOTHING}"),
    )


@command(app, "archive")
async def show_archive(
    call: Invocation,
    interface: InterfaceOption = None,
    svg: Annotated[
        Path | None,
        typer.Option("--svg", help="Draw it there; a page with a table when it ends in .html.", dir_okay=False),
    ] = None,
    limit: LimitOption = 20,
) -> None:
    """Show the best design of every kind for an interface; without --interface, for the one with most designs.

    Worth is the share of the exercises learned, less rent for cost, plus what runs reported. Cost is in units of the host's own
    spanned layer. Leaning is how much of it lies beyond what one bent layer learns.

    Example:  esperctl karn archive

    Example:  esperctl karn archive --svg archive.html
    """
    async with call.platform() as platform:
        request = karn_pb2.GetArchiveRequest(interface_id=interface or "")
        answer: karn_pb2.GetArchiveResponse = await platform.karn.GetArchive(request)
    if svg is not None:
        from esper_core.cli.heatmap import save

        try:
            save(answer, svg)
        except OSError as error:
            raise InvalidInput(f"{svg} cannot be written: {error.strerror}", hint="choose another file") from None
        call.output.note(f"drawn: {svg}")
    rows = [
        (
            _named(elite.proposal), elite.proposal.worth, elite.proposal.learned, elite.units, elite.leaning,
            elite.proposal.forward_seconds * 1e6, elite.proposal.operator, f"{elite.kept}/{elite.grafts}",
            short(elite.proposal.kernel_id),
        )
        for elite in answer.elites[:limit]
    ]  # fmt: skip
    columns = ("DESIGN", ">WORTH", ">LEARNED", ">UNITS", ">LEANING", ">µS", "BY", ">KEPT", "KERNEL")
    call.output.document(
        plain(answer),
        _standing(answer),
        cell(" "),
        table(columns, rows, empty="nothing measured yet: `esperctl karn run`"),
    )


@command(app, "proposals")
async def list_proposals(
    call: Invocation,
    search: Annotated[str | None, typer.Option("--search", help="Of this search, or latest.")] = None,
    interface: InterfaceOption = None,
    state: Annotated[StateName | None, typer.Option(help="Only proposals in this state.")] = None,
    limit: LimitOption = 50,
) -> None:
    """List what was proposed, newest first: what was expected of it, what came of it, and why it was chosen.

    Example:  esperctl karn proposals --search latest

    Example:  esperctl karn proposals --state rejected
    """
    request = karn_pb2.ListProposalsRequest(search_id=search or "", interface_id=interface or "", page_size=limit)
    if state is not None:
        request.state = enum_value(karn_pb2.ProposalState.DESCRIPTOR, state.name)
    async with call.platform() as platform:
        answer: karn_pb2.ListProposalsResponse = await platform.karn.ListProposals(request)
    call.output.document(
        [plain(proposal) for proposal in answer.proposals], proposals_table(answer.proposals, "no proposals yet")
    )


def proposals_table(proposals: Any, empty: str) -> RenderableType:
    """Proposals, one a line."""
    rows = [
        (
            _named(proposal), enum_name(karn_pb2.ProposalState.DESCRIPTOR, proposal.state), proposal.operator,
            _expected(proposal), proposal.worth if proposal.HasField("worth") else None, proposal.units,
            proposal.reason or proposal.why,
        )
        for proposal in proposals
    ]  # fmt: skip
    return table(("DESIGN", "STATE", "BY", ">EXPECTED", ">WORTH", ">UNITS", "*WHY"), rows, empty=empty)


async def _wanted(platform: Platform, run: str | None, slots: list[str], interface: str | None) -> list[str]:
    """Ids of the interfaces to search for; none means all."""
    if interface is not None and (run is not None or slots):
        raise InvalidInput("--interface stands alone", hint="leave --run and --slot out")
    if interface is not None:
        return [interface]
    if run is None and not slots:
        return []
    from esper_core.blueprint.interface import SlotInterface
    from esper_core.rpc.convert import from_proto

    found = await run_of(platform, run or LATEST)
    if not found.slots:
        raise Conflict(f"run {found.run_id} offers no slots", hint=NOTHING)
    chosen = {slot_of(found, slot) for slot in slots} or {slot.slot for slot in found.slots}
    ids = [from_proto(slot.interface, SlotInterface).id for slot in found.slots if slot.slot in chosen]
    return list(dict.fromkeys(ids))


async def _follow(call: Invocation, platform: Platform, search_id: str) -> None:
    """Show a search's news as a bar, or as lines where nobody looks or a program reads."""
    seen = karn_pb2.Search()
    bar = not call.output.json and sys.stderr.isatty()
    with contextlib.ExitStack() as stack:
        shown = stack.enter_context(_bar()) if bar else None
        task = shown.add_task("", total=None) if shown else None
        async for news in _news(platform, search_id):
            over = news.generation > seen.generation or not seen.search_id
            seen = news
            if shown is not None and task is not None:
                shown.update(task, total=news.generations, completed=news.generation, description=_told(news))
            elif call.output.json:
                call.output.line(plain(news), "")
            elif over:
                call.output.line({}, words(f"generation {news.generation}/{news.generations}  ", _told(news)))
    if not call.output.json:
        call.output.document({}, _summary(seen))
    if seen.state == karn_pb2.SEARCH_STATE_GAVE_UP:
        raise DeadlineExceeded(
            f"search {seen.search_id} gave up: {seen.reason}",
            hint="`esperctl status` says whether Urabrask is there; what it judges later still enters the archive",
        )
    if not call.output.json:
        call.output.note("`esperctl karn archive` shows what was found")


async def _news(platform: Platform, search_id: str) -> AsyncIterator[karn_pb2.Search]:
    async for news in platform.karn.WatchSearch(karn_pb2.WatchSearchRequest(search_id=search_id)):
        yield news.search


def _bar() -> Progress:
    columns = ("generation", BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    return Progress(*columns, console=console(sys.stderr))


def _told(search: karn_pb2.Search) -> str:
    coverage = [each.coverage for each in search.progress]
    filled = f"  coverage {100 * sum(coverage) / len(coverage):.0f} %" if coverage else ""
    return f"best {_best(search) or '–'}{filled}  {search.proposed} proposed, {search.waiting} waiting, {search.unfit} unfit"


def _best(search: karn_pb2.Search) -> str:
    return number(max(each.best for each in search.progress)) if search.progress else ""


def _state(search: karn_pb2.Search) -> str:
    return enum_name(karn_pb2.SearchState.DESCRIPTOR, search.state)


def _summary(search: karn_pb2.Search) -> RenderableType:
    return fields(
        [
            ("search", search.search_id), ("state", _state(search)), ("because", search.reason or None),
            ("generation", f"{search.generation}/{search.generations}"), ("population", str(search.population)),
            ("interfaces", ", ".join(map(short, search.interface_ids))), ("proposed", str(search.proposed)),
            ("waiting", str(search.waiting)), ("unfit", str(search.unfit)),
            ("unjudged", str(search.unjudged) if search.unjudged else None), ("best", _best(search)),
            ("seed", str(search.seed)), ("started", moment(search.created)),
        ]
    )  # fmt: skip


def _standing(answer: karn_pb2.GetArchiveResponse) -> RenderableType:
    cells = answer.cost_cells * answer.leaning_cells
    return fields(
        [
            ("interface", short(answer.interface.interface_id)), ("run", answer.interface.run_id),
            ("level", str(answer.interface.level)), ("measured", str(answer.interface.measured)),
            ("cells filled", f"{len(answer.elites)} of {cells}"), ("QD-score", answer.progress.score),
        ]
    )  # fmt: skip


def _named(proposal: karn_pb2.Proposal) -> str:
    """Its name; with its widths where the name alone, as in the catalogue, stands for several designs."""
    symbols = proposal.blueprint.symbols
    own = "-g" in proposal.blueprint_name or not symbols
    widths = "" if own else " " + ",".join(f"{name}={symbols[name]}" for name in sorted(symbols))
    return proposal.blueprint_name + widths


def _expected(proposal: karn_pb2.Proposal) -> str:
    if not proposal.HasField("expected"):
        return ""
    return clean(f"{proposal.expected.mean:.3f} ± {proposal.expected.half_width:.3f}")
