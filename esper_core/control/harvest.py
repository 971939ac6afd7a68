"""The end of growing: what has proven itself stays, what has not goes, and the network is plain again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from esper_core.control.ledger import Ledger
from esper_core.control.packet import FieldReport
from esper_core.control.plot import Plot
from esper_core.lifecycle import BLENDED, State
from esper_core.nn.counterfactual import contribution
from esper_core.nn.host import Slot


@dataclass(frozen=True)
class GrowthReport:
    """What growing did and what it brought.

    Attributes:
        fossilized, culled, rolled_back: grafts by how they ended.
        unfinished: slots whose graft was still under way and had proven itself, so it stayed.
        dropped: slots whose graft was under way and had not, or whose kernel broke after it had been kept.
        added_parameters: host and remaining kernels against the host at the start.
        folded_max_abs_diff: largest change of a held-back output by folding; None when nothing was folded.
        beside: slots whose kernel could not be folded and runs beside the host.
        reports: of every graft that ended.
    """

    fossilized: int
    culled: int
    rolled_back: int
    unfinished: tuple[str, ...]
    dropped: tuple[str, ...]
    added_parameters: int
    folded_max_abs_diff: float | None
    beside: tuple[str, ...]
    reports: tuple[FieldReport, ...]


def harvest(plot: Plot, ledger: Ledger) -> tuple[nn.Module, GrowthReport]:
    """Settle every slot and hand back the wrapped module itself.

    A kernel that cannot be folded stays as a submodule ``graft`` of its sink, its hooks in place, so that the module's
    ``state_dict`` is whole.
    """
    differences = list(ledger.fold_differences)
    unfinished, dropped, beside = [], [], []
    for name, slot in plot.host.slots.items():
        if slot.graft is None:
            continue
        state = ledger.seeds[name].state
        if slot.graft.broken or (state is not State.FOSSILIZED and not _proven(plot, slot, state)):
            plot.uproot(slot)
            dropped.append(name)
            continue
        if state is not State.FOSSILIZED:
            unfinished.append(name)
            plot.let_go(slot)
        difference = plot.fold(slot)
        if difference is None:
            slot.sink.add_module("graft", slot.graft)
            beside.append(name)
        else:
            differences.append(difference)
    ended = Counter(report.outcome for report in ledger.reports)
    report = GrowthReport(
        fossilized=ended[State.FOSSILIZED],
        culled=ended[State.CULLED],
        rolled_back=ended[State.ROLLED_BACK],
        unfinished=tuple(unfinished),
        dropped=tuple(dropped),
        added_parameters=sum(p.numel() for p in plot.host.model.parameters()) - ledger.initial_parameters,
        folded_max_abs_diff=max(differences) if differences else None,
        beside=tuple(beside),
        reports=tuple(ledger.reports),
    )
    return plot.host.model, report


def _proven(plot: Plot, slot: Slot, state: State) -> bool:
    """Whether a graft still under way surely contributes at its present alpha."""
    if state not in BLENDED or slot.graft is None:
        return False
    return contribution(plot.host, slot.graft, plot.validation, plot.loss_fn).lower > 0
