"""What growing shall achieve, and whether it does: one figure per goal, from the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from services.tolaria.arena.figures import Table, auroc, mean
from services.tolaria.arena.trial import Row
from tests.bench.growth.tasks import TASKS

SEEN = ("teacher", "digits", "spirals", "dead", "sums", "digits-conv")
"""Where the planted layer is the right place."""
HEALTHY = tuple(task.name for task in TASKS if task.group == "healthy")


@dataclass(frozen=True)
class Goal:
    """A figure that is wanted.

    Attributes:
        about: what the figure is.
        target: in words.
        value: from the rows; None when they do not tell.
        met: whether a value is good enough.
    """

    about: str
    target: str
    value: Callable[[Table], float | None]
    met: Callable[[float], bool]


def _localised(table: Table) -> float | None:
    found = [_right(row) for task in SEEN for row in table.of(task, "esper")]
    return sum(found) / len(found) if found else None


def _right(row: Row) -> bool:
    return bool(row.slots) and row.slots[0] in (row.planted or ())


def _recovered(table: Table, tasks: Sequence[str]) -> float | None:
    """Σ (esper − random) / Σ (planted − random): pooled, since single tasks may have no gap at all."""
    ours = [gap.value for task in tasks if (gap := table.gap(task, "esper", "random"))]
    best = [gap.value for task in tasks if (gap := table.gap(task, "planted", "random"))]
    return sum(ours) / sum(best) if best and sum(best) > 0 else None


def _gaps(table: Table, arm: str, other: str, tasks: Sequence[str]) -> list[float]:
    return [gap.value for task in tasks if (gap := table.gap(task, arm, other))]


def _superior(table: Table) -> float | None:
    gaps = [table.gap(task, "esper", "static-flops") for task in (*SEEN, "decoy")]
    known = [gap for gap in gaps if gap]
    return float(sum(gap.lower > 0 for gap in known)) if known else None


def _auroc(table: Table) -> float | None:
    def evidence(tasks: Sequence[str]) -> list[float]:
        return [row.evidence or 0.0 for task in tasks for row in table.of(task, "esper")]

    return auroc(evidence((*SEEN, "decoy")), evidence(HEALTHY))


def _grew(table: Table, tasks: Sequence[str]) -> float | None:
    rows = [row for task in tasks for row in table.of(task, "esper")]
    return sum(bool(row.kept) for row in rows) / len(rows) if rows else None


def _worst(values: Sequence[float]) -> float | None:
    return min(values) if values else None


def _uneven(table: Table) -> float | None:
    gap = table.gap("uneven", "esper", "uniform")
    return gap.value / gap.error if gap and gap.n > 1 and gap.error > 0 else None


def _largest(table: Table, of: Callable[[Row], float | None]) -> float | None:
    values = [v for task in table.tasks for row in table.of(task, "esper") if (v := of(row)) is not None]
    return max(values) if values else None


def _scoring(table: Table) -> float | None:
    rows = [row for task in table.tasks for row in table.of(task, "esper")]
    return mean(row.scoring_flops / row.flops for row in rows).value if rows else None


GOALS: Mapping[str, Goal] = {
    "localise": Goal("first graft at the planted layer", ">= 0.97", _localised, lambda v: v >= 0.97),
    "decoy": Goal(
        "gain over chance where narrowness misleads, of the best place's",
        ">= 0.85",
        lambda t: _recovered(t, ["decoy"]),
        lambda v: v >= 0.85,
    ),
    "gain": Goal(
        "gain over chance, of the best place's", ">= 0.95", lambda t: _recovered(t, SEEN), lambda v: v >= 0.95
    ),
    "parity": Goal(
        "points above the static final shape at equal training FLOPs, worst task",
        ">= -0.3",
        lambda t: _worst(_gaps(t, "esper", "static-flops", (*SEEN, "decoy"))),
        lambda v: v >= -0.3,
    ),
    "superior": Goal("tasks surely above that static network", ">= 2", _superior, lambda v: v >= 2),
    "abstain": Goal("AUROC of the evidence for 'needs growth'", ">= 0.95", _auroc, lambda v: v >= 0.95),
    "false growth": Goal(
        "healthy networks that kept a graft", "<= 0.05", lambda t: _grew(t, HEALTHY), lambda v: v <= 0.05
    ),
    "rightly narrow": Goal(
        "rightly narrow networks that kept a graft",
        "<= 0.2",
        lambda t: _grew(t, ["rightly-narrow"]),
        lambda v: v <= 0.2,
    ),
    "do no harm": Goal(
        "points above no growth on healthy networks, worst task",
        ">= -0.2",
        lambda t: _worst(_gaps(t, "esper", "none", HEALTHY)),
        lambda v: v >= -0.2,
    ),
    "uneven rounds": Goal(
        "standard errors above uniform growth where layers differ", ">= 2", _uneven, lambda v: v >= 2
    ),
    "even rounds": Goal(
        "points above uniform growth where they do not",
        ">= -0.3",
        lambda t: _worst(_gaps(t, "esper", "uniform", ["even"])),
        lambda v: v >= -0.3,
    ),
    "price": Goal("FLOPs of scoring, of training's", "<= 0.01", _scoring, lambda v: v <= 0.01),
    "insertion": Goal(
        "largest change of the loss at insertion",
        "<= 1e-6",
        lambda t: _largest(t, lambda row: row.insertion_change),
        lambda v: v <= 1e-6,
    ),
    "fold": Goal(
        "largest change of an output by folding",
        "<= 1e-5",
        lambda t: _largest(t, lambda row: row.fold_change),
        lambda v: v <= 1e-5,
    ),
}


def judged(table: Table) -> dict[str, dict[str, float | str | bool | None]]:
    """Value, target and verdict by goal."""
    found: dict[str, dict[str, float | str | bool | None]] = {}
    for name, goal in GOALS.items():
        value = goal.value(table)
        met = goal.met(value) if value is not None else None
        found[name] = {"value": value, "target": goal.target, "met": met, "about": goal.about}
    return found
