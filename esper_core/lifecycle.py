"""The seed lifecycle as data: eleven states, the legal edges, and what each edge must have measured.

    DORMANT ─► GERMINATED ─► LOADING ─► TRAINING ─► GRAFTING ─► STABILIZATION ─► EVALUATING ─► FINE_TUNING ─► FOSSILIZED
       ▲            └───────────┴──────────┴──► CULLED ◄──────────────────────────────┴────────────┘
       └── CULLED, ROLLED_BACK (after the embargo)      GRAFTING … FINE_TUNING ──► ROLLED_BACK

Pure: knows no tensors, clocks or services. A guard that lacks its measurement fails: unmeasured is not healthy.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from esper_core.errors import IllegalTransition


class State(enum.IntEnum):
    """Where a seed stands; the numbers are frozen and equal those of ``esper.core.v1.SeedState``."""

    DORMANT = 1
    """Watches its slot; the host runs as if it were not there."""
    GERMINATED = 2
    """Has been given a kernel by name and waits for resources."""
    LOADING = 3
    """The kernel is being fetched and verified."""
    TRAINING = 4
    """The kernel learns, isolated, what the host cannot express; the host is untouched."""
    GRAFTING = 5
    """Alpha rises from 0 to 1 and the kernel learns on the task."""
    STABILIZATION = 6
    """Alpha rests at 1 while the loss settles."""
    EVALUATING = 7
    """What would the loss be without it? Same batches, alpha 0 against alpha 1."""
    FINE_TUNING = 8
    """Kernel and host learn together on the task."""
    FOSSILIZED = 9
    """Kept for good; folded into the host's own weights where the algebra allows."""
    CULLED = 10
    """Discarded; the slot is embargoed for a while."""
    ROLLED_BACK = 11
    """Thrown out in an emergency; the run went back to its last good state."""


@dataclass(frozen=True)
class Edge:
    """A legal transition and the named measurements that must hold for it, all of them ``True``."""

    source: State
    target: State
    guards: tuple[str, ...]


_S = State
EDGES: tuple[Edge, ...] = (
    Edge(
        _S.DORMANT, _S.GERMINATED, ("kernel_validated", "kernel_fits", "not_embargoed", "within_budget", "graft_free")
    ),
    Edge(_S.GERMINATED, _S.LOADING, ("memory_granted",)),
    Edge(_S.GERMINATED, _S.CULLED, ()),
    Edge(_S.LOADING, _S.TRAINING, ("kernel_verified",)),
    Edge(_S.LOADING, _S.GRAFTING, ("kernel_verified", "parameterless")),
    Edge(_S.LOADING, _S.CULLED, ()),
    Edge(_S.TRAINING, _S.GRAFTING, ("isolated", "reconstructs", "finite", "trained_long_enough")),
    Edge(_S.TRAINING, _S.CULLED, ()),
    Edge(_S.GRAFTING, _S.STABILIZATION, ("alpha_at_rest",)),
    Edge(_S.GRAFTING, _S.ROLLED_BACK, ()),
    Edge(_S.STABILIZATION, _S.EVALUATING, ("settled",)),
    Edge(_S.STABILIZATION, _S.ROLLED_BACK, ()),
    Edge(_S.EVALUATING, _S.FINE_TUNING, ("contributes",)),
    Edge(_S.EVALUATING, _S.FOSSILIZED, ("contributes", "parameterless")),
    Edge(_S.EVALUATING, _S.CULLED, ()),
    Edge(_S.EVALUATING, _S.ROLLED_BACK, ()),
    Edge(_S.FINE_TUNING, _S.FOSSILIZED, ("contributes", "pays_rent")),
    Edge(_S.FINE_TUNING, _S.CULLED, ()),
    Edge(_S.FINE_TUNING, _S.ROLLED_BACK, ()),
    Edge(_S.CULLED, _S.DORMANT, ("embargo_over",)),
    Edge(_S.ROLLED_BACK, _S.DORMANT, ("embargo_over",)),
)
TABLE: Mapping[tuple[State, State], Edge] = {(edge.source, edge.target): edge for edge in EDGES}

IN_FLIGHT = frozenset(
    {_S.GERMINATED, _S.LOADING, _S.TRAINING, _S.GRAFTING, _S.STABILIZATION, _S.EVALUATING, _S.FINE_TUNING}
)
"""States in which a seed holds the one place for a graft."""
BLENDED = frozenset({_S.GRAFTING, _S.STABILIZATION, _S.EVALUATING, _S.FINE_TUNING})
"""States in which the kernel's output reaches the host."""


def targets(state: State) -> tuple[State, ...]:
    """The states that can follow ``state``, in table order."""
    return tuple(edge.target for edge in EDGES if edge.source is state)


def check(source: State, target: State, facts: Mapping[str, bool] | None = None) -> Edge:
    """Return the edge when it exists and every guard is a measured ``True``.

    Args:
        source: the present state.
        target: the wished state.
        facts: measurements by guard name; a missing name counts as unmeasured and fails.

    Raises:
        IllegalTransition: naming the missing edge, or the guards that are false or unmeasured.
    """
    edge = TABLE.get((source, target))
    if edge is None:
        allowed = ", ".join(state.name for state in targets(source)) or "nothing: it is final"
        raise IllegalTransition(f"a seed cannot go from {source.name} to {target.name}", hint=f"next: {allowed}")
    known = facts or {}
    failed = [f"{name} ({'false' if name in known else 'not measured'})" for name in edge.guards if not known.get(name)]
    if failed:
        raise IllegalTransition(f"{source.name} to {target.name} is barred by {', '.join(failed)}")
    return edge
