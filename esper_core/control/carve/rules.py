"""Which units to propose: the least worth per parameter first, as far as the room goes. Pure."""

from __future__ import annotations

from collections import defaultdict

from esper_core.control.carve.papers import CarveSurvey, Cut, Proposal, Standing


def propose(survey: CarveSurvey, max_parameters: int | None = None, max_loss: float | None = None) -> Proposal | None:
    """Units that the rules would take out; None when there are none.

    The sum of their importances stays within the room for loss. That is more careful than the sum of the expected changes, in
    which first-order terms of either sign cancel.

    Args:
        survey: what is known.
        max_parameters, max_loss: room, instead of the survey's own.
    """
    if survey.obstacle:
        return None
    room = survey.room_parameters if max_parameters is None else max_parameters
    loss = survey.room_loss if max_loss is None else max_loss
    ranked = sorted(
        (importance / max(standing.unit_parameters, 1), standing.cluster, unit, importance, change, standing)
        for standing in survey.clusters
        if not standing.obstacle
        for unit, importance, change in zip(standing.candidates, standing.importance, standing.change, strict=True)
    )
    chosen: dict[str, list[int]] = defaultdict(list)
    expected, parameters, flops = 0.0, 0, 0
    for _, cluster, unit, importance, change, standing in ranked:
        if importance > loss:
            continue
        if standing.unit_parameters > room or len(chosen[cluster]) >= most(standing, survey.room_share):
            continue
        chosen[cluster].append(unit)
        loss -= importance
        room -= standing.unit_parameters
        expected += change
        parameters += standing.unit_parameters
        flops += standing.unit_flops
    cuts = tuple(Cut(cluster=name, units=tuple(sorted(units))) for name, units in sorted(chosen.items()) if units)
    return Proposal(cuts=cuts, expected_change=expected, parameters=parameters, flops=flops) if cuts else None


def most(standing: Standing, share: float) -> int:
    """Units of a cluster that one plan may take: the share, one at least, and never what must stay."""
    return min(max(1, int(share * standing.units)), standing.units - standing.least)
