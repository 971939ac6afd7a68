"""Karn's nouns as messages."""

from __future__ import annotations

from collections.abc import Sequence

from esper_core.kernel.record import Lesson
from esper_core.pb.esper.core.v1 import blueprint_pb2, kernel_pb2
from esper_core.pb.esper.karn.v1 import karn_pb2
from esper_core.rpc.convert import to_proto
from services.karn.nursery import Known, Row, State
from services.karn.searches import Progress, Search


def search(found: Search) -> karn_pb2.Search:
    """A search as it stands."""
    wish = found.wish
    return karn_pb2.Search(
        search_id=wish.search_id,
        interface_ids=wish.interface_ids,
        generations=wish.generations,
        population=wish.population,
        seed=wish.seed,
        generation=found.generation,
        state=karn_pb2.SearchState.Name(found.state),
        proposed=found.proposed,
        waiting=found.waiting,
        unfit=found.unfit,
        unjudged=found.unjudged,
        reason=found.reason,
        progress=[progress(each) for each in found.progress],
        created=found.created.isoformat(),
    )


def progress(found: Progress) -> karn_pb2.Progress:
    """How an archive stood."""
    return karn_pb2.Progress(
        interface_id=found.interface_id,
        level=found.level,
        best=found.best,
        coverage=found.coverage,
        score=found.score,
        measured=found.measured,
    )


def interface(known: Known) -> karn_pb2.KnownInterface:
    """An interface."""
    return karn_pb2.KnownInterface(
        interface_id=known.interface.id,
        interface=to_proto(known.interface, blueprint_pb2.SlotInterface),
        run_id=known.run_id,
        level=known.level,
        measured=known.measured,
    )


def proposal(row: Row, level: int) -> karn_pb2.Proposal:
    """A design with its story; worth and share at ``level``."""
    design, tale, specimen = row.design, row.tale, row.specimen
    message = karn_pb2.Proposal(
        blueprint_id=design.blueprint_id,
        blueprint_name=design.ir.name,
        interface_id=design.interface.id,
        search_id=tale.search_id,
        generation=tale.generation,
        operator=tale.operator,
        parent_ids=design.ir.parent_ids,
        why=tale.why,
        state=karn_pb2.ProposalState.Name(row.state),
        reason=row.reason if row.state in (State.FAILED, State.REJECTED, State.UNJUDGED) else "",
        units=design.units,
        kernel_id=row.kernel_id,
        blueprint=to_proto(design.ir, blueprint_pb2.BlueprintIR),
        created=row.created.isoformat() if row.created else "",
    )
    for name, place in (("worth", message.expected), ("learned", message.expected_learned)):
        if name in tale.expected:
            place.mean, place.half_width = tale.expected[name]
    if specimen is not None:
        message.worth, message.learned = specimen.worth(level), specimen.learned(level)
    if row.forward_seconds is not None:
        message.forward_seconds = row.forward_seconds
    return message


def archive(known: Known, rows: Sequence[Row]) -> karn_pb2.GetArchiveResponse:
    """The archive that these designs make."""
    from services.karn import archive as grid  # ribs costs seconds to import: not paid when the platform starts
    from services.karn.gardener import standing

    by_form = {row.design.form: row for row in rows}
    specimens = [specimen for row in rows if (specimen := row.specimen)]
    elites = []
    for elite in grid.Archive(specimens, known.level).elites:
        specimen = elite.specimen
        elites.append(
            karn_pb2.Elite(
                cost_cell=elite.cell[0],
                leaning_cell=elite.cell[1],
                units=specimen.design.units,
                leaning=specimen.leaning(known.level),
                proposal=proposal(by_form[specimen.design.form], known.level),
                grafts=specimen.field.grafts,
                kept=specimen.field.kept,
                lessons=[_lesson(lesson) for lesson in specimen.lessons],
            )
        )
    return karn_pb2.GetArchiveResponse(
        interface=interface(known),
        cost_cells=grid.COSTS,
        leaning_cells=grid.LEANINGS,
        cost_low=grid.COST_RANGE[0],
        cost_high=grid.COST_RANGE[1],
        progress=progress(standing(known.interface.id, specimens, known.level)),
        elites=elites,
    )


def _lesson(lesson: Lesson) -> kernel_pb2.Lesson:
    return to_proto(lesson, kernel_pb2.Lesson)
