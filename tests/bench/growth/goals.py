"""What growing shall achieve, and whether it does: one figure per goal, from the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from services.tolaria.arena.figures import auroc, mean
from services.tolaria.arena.trial import Row
from tests.bench.growth.contest import Contest


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
    value: Callable[[Contest], float | None]
    met: Callable[[float], bool]


def _localised(contest: Contest) -> float | None:
    found = [_right(row) for row in contest.rows("esper", "narrow")]
    return sum(found) / len(found) if found else None


def _right(row: Row) -> bool:
    return bool(row.slots) and row.slots[0] in (row.planted or ())


def _recovered(contest: Contest, group: str) -> float | None:
    """Σ (esper − random) / Σ (planted − random): pooled, since single tasks may have no gap at all."""
    ours, best = contest.gaps("esper", "random", group), contest.gaps("planted", "random", group)
    return sum(ours) / sum(best) if best and sum(best) > 0 else None


def _superior(contest: Contest) -> float | None:
    gaps = [contest.table.gap(name, "esper", "static-flops") for name in contest.names("narrow", "decoy")]
    known = [gap for gap in gaps if gap]
    return float(sum(gap.lower > 0 for gap in known)) if known else None


def _auroc(contest: Contest) -> float | None:
    needy, healthy = contest.rows("esper", "narrow", "decoy"), contest.rows("esper", "healthy")
    return auroc([row.evidence or 0.0 for row in needy], [row.evidence or 0.0 for row in healthy])


def _grew(contest: Contest, group: str) -> float | None:
    rows = contest.rows("esper", group)
    return sum(bool(row.kept) for row in rows) / len(rows) if rows else None


def _worst(values: Sequence[float]) -> float | None:
    return min(values, default=None)


def _uneven(contest: Contest) -> float | None:
    gaps = [contest.table.gap(name, "esper", "uniform") for name in contest.names("uneven")]
    return _worst([gap.value / gap.error for gap in gaps if gap and gap.n > 1 and gap.error > 0])


def _largest(contest: Contest, of: Callable[[Row], float | None]) -> float | None:
    return max((value for row in contest.rows("esper") if (value := of(row)) is not None), default=None)


def _scoring(contest: Contest) -> float | None:
    rows = contest.rows("esper")
    return mean(row.scoring_flops / row.flops for row in rows).value if rows else None


GOALS: Mapping[str, Goal] = {
    "localise": Goal("first graft at the planted layer", ">= 0.97", _localised, lambda v: v >= 0.97),
    "decoy": Goal(
        "gain over chance where narrowness misleads, of the best place's",
        ">= 0.85",
        lambda c: _recovered(c, "decoy"),
        lambda v: v >= 0.85,
    ),
    "gain": Goal(
        "gain over chance, of the best place's", ">= 0.95", lambda c: _recovered(c, "narrow"), lambda v: v >= 0.95
    ),
    "parity": Goal(
        "points above the static final shape at equal training FLOPs, worst task",
        ">= -0.3",
        lambda c: _worst(c.gaps("esper", "static-flops", "narrow", "decoy")),
        lambda v: v >= -0.3,
    ),
    "superior": Goal("tasks surely above that static network", ">= 2", _superior, lambda v: v >= 2),
    "abstain": Goal("AUROC of the evidence for 'needs growth'", ">= 0.95", _auroc, lambda v: v >= 0.95),
    "false growth": Goal(
        "healthy networks that kept a graft", "<= 0.05", lambda c: _grew(c, "healthy"), lambda v: v <= 0.05
    ),
    "rightly narrow": Goal(
        "rightly narrow networks that kept a graft",
        "<= 0.2",
        lambda c: _grew(c, "rightly narrow"),
        lambda v: v <= 0.2,
    ),
    "do no harm": Goal(
        "points above no growth on healthy networks, worst task",
        ">= -0.2",
        lambda c: _worst(c.gaps("esper", "none", "healthy")),
        lambda v: v >= -0.2,
    ),
    "uneven rounds": Goal(
        "standard errors above uniform growth where layers differ", ">= 2", _uneven, lambda v: v >= 2
    ),
    "even rounds": Goal(
        "points above uniform growth where they do not",
        ">= -0.3",
        lambda c: _worst(c.gaps("esper", "uniform", "even")),
        lambda v: v >= -0.3,
    ),
    "price": Goal("FLOPs of scoring, of training's", "<= 0.01", _scoring, lambda v: v <= 0.01),
    "insertion": Goal(
        "largest change of the loss at insertion",
        "<= 1e-6",
        lambda c: _largest(c, lambda row: row.insertion_change),
        lambda v: v <= 1e-6,
    ),
    "fold": Goal(
        "largest change of an output by folding",
        "<= 1e-5",
        lambda c: _largest(c, lambda row: row.fold_change),
        lambda v: v <= 1e-5,
    ),
}


def judged(contest: Contest) -> dict[str, dict[str, float | str | bool | None]]:
    """Value, target and verdict by goal."""
    found: dict[str, dict[str, float | str | bool | None]] = {}
    for name, goal in GOALS.items():
        value = goal.value(contest)
        met = goal.met(value) if value is not None else None
        found[name] = {"value": value, "target": goal.target, "met": met, "about": goal.about}
    return found
