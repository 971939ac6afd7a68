"""What is said about carving: a survey of the units, a plan, an order, an event. Field names equal those on the wire."""

from __future__ import annotations

import enum
from typing import Literal

from pydantic import Field

from esper_core.control.packet import Noun


class PlanState(enum.IntEnum):
    """How far a plan has come; numbers as in ``esper.core.v1.PlanState``."""

    PROPOSED = 1
    ORDERED = 2
    SEDATED = 3
    REMOVED = 4
    WOKEN = 5
    REFUSED = 6


class Act(enum.IntEnum):
    """What an order asks for; numbers as in ``esper.core.v1.CarveAct``."""

    SEDATE = 1
    WAKE = 2


class Cut(Noun):
    """Units of one cluster.

    Attributes:
        cluster: path of the first layer that writes them, or ``kernel <slot>`` for a fossil beside the host.
        units: their numbers, ascending.
    """

    cluster: str = Field(min_length=1, max_length=300)
    units: tuple[int, ...] = Field(min_length=1)


class Standing(Noun):
    """A cluster and what its least worthy units are worth.

    Attributes:
        cluster: its name.
        units: how many it has.
        least: how many must stay.
        grown: how many of them growing added, as far as is known.
        unit_parameters, unit_flops: what one costs.
        obstacle: why none can be taken out; empty when they can.
        candidates: numbers of the least worthy units.
        importance: of each candidate; see ``esper_core.nn.carve.importance``.
        change: expected of the mean loss without each candidate.
    """

    cluster: str
    units: int
    least: int = 1
    grown: int = 0
    unit_parameters: int = 0
    unit_flops: int = 0
    obstacle: str = ""
    candidates: tuple[int, ...] = ()
    importance: tuple[float, ...] = ()
    change: tuple[float, ...] = ()


class CarveSurvey(Noun):
    """What a run's units are worth at an epoch boundary, and what may be done about it.

    Attributes:
        run_id, epoch: whose, and when.
        loss: held-back.
        accuracy: held-back; None for a regression.
        parameters, flops: of the network as it stands.
        room_parameters: how many one plan may free.
        room_loss: how much loss one plan may cost.
        room_share: share of a cluster that one plan may take.
        autonomous: whether the run wants to be carved without being asked.
        obstacle: why nothing can be carved now; empty when it can.
        clusters: all of them.
    """

    run_id: str
    epoch: int
    loss: float
    accuracy: float | None = None
    parameters: int
    flops: int
    room_parameters: int
    room_loss: float
    room_share: float
    autonomous: bool = True
    obstacle: str = ""
    clusters: tuple[Standing, ...] = ()


class Proposal(Noun):
    """Units that no longer pay.

    Attributes:
        cuts: which.
        expected_change: of the loss without them.
        parameters, flops: freed; where two clusters cross, what lies on the crossing counts twice.
    """

    cuts: tuple[Cut, ...]
    expected_change: float
    parameters: int
    flops: int


class CarveOrder(Noun):
    """An order to a run, obeyed once, at an epoch boundary.

    Attributes:
        order_id: names it.
        run_id, plan_id: the run, and the plan it is about.
        act: what to do.
        cuts: what to sedate; empty for WAKE.
        expected_change: as in the plan.
        issued_by: who wants it; a run obeys nobody else.
        reason: in words for people.
    """

    order_id: str = Field(min_length=1, max_length=64)
    run_id: str = Field(min_length=1, max_length=63)
    plan_id: str = Field(min_length=1, max_length=100)
    act: Act
    cuts: tuple[Cut, ...] = ()
    expected_change: float = 0.0
    issued_by: Literal["emrakul", "operator"] = "operator"
    reason: str = Field(default="", max_length=500)


class CarveEvent(Noun):
    """A plan has come further, or an order could not be obeyed.

    Attributes:
        run_id, plan_id, order_id: whose; the order is empty when the run decided itself.
        epoch: of the boundary.
        state: the plan's new one; REFUSED changes nothing about a plan that is under way.
        cuts: what is silenced, gone, or awake again.
        reason: why.
        expected_change: of the loss; None where nothing was measured.
        upper_change: upper bound of the counterfactual; None likewise.
        accuracy_before, accuracy: held-back, before the units were silenced and now; None for a regression or where nothing was measured.
        loss_before, loss: likewise.
        parameters, flops: freed for good.
        difference: largest change of an output against the silenced network; None unless REMOVED.
        left_parameters: of the network.
    """

    run_id: str
    plan_id: str
    order_id: str = ""
    epoch: int
    state: PlanState
    cuts: tuple[Cut, ...] = ()
    reason: str = Field(default="", max_length=500)
    expected_change: float | None = None
    upper_change: float | None = None
    accuracy_before: float | None = None
    accuracy: float | None = None
    loss_before: float | None = None
    loss: float | None = None
    parameters: int = 0
    flops: int = 0
    difference: float | None = None
    left_parameters: int = 0


class CarveReport(Noun):
    """What an epoch boundary brought.

    Attributes:
        events: in order.
        survey: what was measured; None when nothing was.
    """

    events: tuple[CarveEvent, ...] = ()
    survey: CarveSurvey | None = None


def count(cuts: tuple[Cut, ...]) -> int:
    """Units in all."""
    return sum(len(cut.units) for cut in cuts)
