"""Karn against random search: as many designs measured, what is found? In process, with the service's own breeding and Urabrask's checks.

Three arms over equal seeds: Karn as it is, Karn without its surrogate, and random designs from the same grammar. A design is measured by
the exercises of one level; Karn's first generation is the catalogue. Urabrask's safety phase costs more than that and so comes at the
end, for what one search would leave behind.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist

import numpy as np

from esper_core.blueprint.build import build
from esper_core.blueprint.interface import Layout, SlotInterface
from esper_core.blueprint.ir import BlueprintIR
from esper_core.kernel.record import Lesson
from esper_core.nn.lessons import study
from services.karn.archive import Archive
from services.karn.breed import Breeder, Habits, Proposal
from services.karn.design import Design, Specimen
from services.karn.dice import Dice
from services.karn.grammar import sprout
from services.tolaria.result import interval
from services.urabrask.finding import Unfit
from services.urabrask.safety import check
from tests.bench.bench import Pace, Table
from tests.bench.figures import Row, mean_row
from tests.bench.machine import cores

SLOT = SlotInterface(
    layout=Layout.FEATURES, in_width=16, out_width=16, hidden_width=2, activation="relu", foldable=True
)
"""As in the preset digits-narrow: sixteen features through two units."""
ARMS = ("karn", "no surrogate", "random")
LEVEL = 2
POPULATION = 6
PLOT = Path("build/bench/karn.svg")
COLOURS = {"karn": "#1a7f37", "no surrogate": "#d4a72c", "random": "#8c959f"}


@dataclass
class Trial:
    """One arm with one seed: figures after each generation, and how the surrogate's guesses turned out."""

    arm: str
    seed: int
    best: list[float] = field(default_factory=list)
    coverage: list[float] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    elites: list[BlueprintIR] = field(default_factory=list)
    guessed: list[tuple[float, float, float]] = field(default_factory=list)
    """(mean, half width, what came of it) of the share learned, for every design the surrogate was asked about."""
    beaten: list[tuple[int, bool]] = field(default_factory=list)
    """(generation, whether it is worth more than every parent of its own)."""


def run(pace: Pace) -> list[Table]:
    generations, seeds = pace.rounds(20, 4), pace.rounds(5, 2)
    jobs = [(arm, seed, generations) for seed in range(seeds) for arm in ARMS]
    context = multiprocessing.get_context("spawn")
    trials: list[Trial] = []
    with ProcessPoolExecutor(cores(), mp_context=context, initializer=_one_thread) as pool:
        for trial in pool.map(_trial, *zip(*jobs, strict=True)):
            pace.say(f"{trial.arm}, seed {trial.seed}: best {trial.best[-1]:.3f}, coverage {trial.coverage[-1]:.3f}")
            trials.append(trial)
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    PLOT.write_text(_plot(trials), encoding="utf-8")
    budget = (
        f"{generations} generations of {POPULATION}, {generations * POPULATION} designs measured each, {seeds} seeds"
    )
    return [
        Table(f"What is found: {budget}", _found(trials), (f"Slot 16 → 2 → 16, exercises of level {LEVEL}; {PLOT} has the curves.",)),
        Table(
            "Karn less the others, seed by seed",
            _paired(trials),
            ("An interval that holds 0 shows no difference. 'won' counts seeds.",),
        ),
        Table(
            "The surrogate's word, given before each design was measured",
            _calibration(trials),
            ("Intervals shall hold 90 %. 'constant' guesses the mean of all that came before, so the error of knowing nothing.",),
        ),
        Table("Children worth more than every parent of theirs", _children(trials, generations), ()),
        Table("Urabrask's safety phase on the elites of seed 0", [_safe(trial) for trial in trials if trial.seed == 0], ()),
    ]  # fmt: skip


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _trial(arm: str, seed: int, generations: int) -> Trial:
    trial, known, barred = Trial(arm, seed), list[Specimen](), set[str]()
    for generation in range(generations):
        dice = Dice(seed, arm, generation)
        proposals = [] if arm == "random" else _proposed(arm, known, barred, dice, generation)
        designs = [each.design for each in proposals] or _random(barred, dice)
        barred |= {design.form for design in designs}
        worths = {each.design.form: each.worth(1) for each in known}
        found = [_measured(design) for design in designs]
        for proposal, specimen in zip(proposals, found, strict=False):
            _note(trial, proposal, specimen, worths, generation)
        known += found
        archive = Archive(known, 1)
        trial.best.append(archive.best)
        trial.coverage.append(archive.coverage)
        trial.score.append(archive.score)
    trial.elites = [elite.specimen.design.ir for elite in archive.elites]
    return trial


def _proposed(arm: str, known: list[Specimen], barred: set[str], dice: Dice, generation: int) -> list[Proposal]:
    breeder = Breeder(SLOT, known, barred=barred, level=1, habits=Habits(surrogate=arm == "karn"))
    return breeder.propose(POPULATION, dice, generation)


def _random(barred: set[str], dice: Dice) -> list[Design]:
    found: dict[str, Design] = {}
    while len(found) < POPULATION:
        design = Design(sprout(SLOT, dice), SLOT)
        if design.form not in barred:
            found.setdefault(design.form, design)
    return list(found.values())


def _measured(design: Design) -> Specimen:
    """The design with its marks."""
    marks = study(lambda: build(design.ir, SLOT), (LEVEL,))
    return Specimen(design, tuple(Lesson(**(asdict(mark) | {"level": 1})) for mark in marks))


def _note(trial: Trial, proposal: Proposal, specimen: Specimen, worths: dict[str, float], generation: int) -> None:
    if proposal.expected is not None:
        guess = proposal.expected.learned
        trial.guessed.append((guess.mean, guess.half_width, specimen.learned(1)))
    if proposal.parents:
        parents = [worths[parent.form] for parent in proposal.parents]
        trial.beaten.append((generation, specimen.worth(1) > max(parents)))


def _of(trials: Sequence[Trial], arm: str) -> list[Trial]:
    return sorted((trial for trial in trials if trial.arm == arm), key=lambda trial: trial.seed)


FIGURES = {"best worth": "best", "coverage": "coverage", "QD-score": "score"}


def _found(trials: Sequence[Trial]) -> list[Row]:
    return [
        mean_row(f"{arm}: {name}", [getattr(trial, figure)[-1] for trial in _of(trials, arm)])
        for name, figure in FIGURES.items()
        for arm in ARMS
    ]


def _paired(trials: Sequence[Trial]) -> list[Row]:
    rows: list[Row] = []
    for other in ARMS[1:]:
        for name, figure in FIGURES.items():
            pairs = zip(_of(trials, ARMS[0]), _of(trials, other), strict=True)
            differences = [getattr(ours, figure)[-1] - getattr(theirs, figure)[-1] for ours, theirs in pairs]
            rows.append(
                {
                    "what": f"karn - {other}: {name}",
                    "n": len(differences),
                    "mean": statistics.fmean(differences),
                    "± 95 %": interval(differences),
                    "won": sum(difference > 0 for difference in differences),
                }
            )
    return rows


def _calibration(trials: Sequence[Trial]) -> list[Row]:
    each = [trial.guessed for trial in _of(trials, ARMS[0]) if trial.guessed]
    inside = [statistics.fmean(abs(mean - came) <= half for mean, half, came in guessed) for guessed in each]
    errors = [statistics.fmean(abs(mean - came) for mean, _, came in guessed) for guessed in each]
    blank = [_constant([came for *_, came in guessed]) for guessed in each]
    return [
        mean_row("share of outcomes inside the 90 % interval", inside),
        mean_row("half width of the interval", [statistics.fmean(half for _, half, _ in guessed) for guessed in each]),
        mean_row("mean absolute error", errors),
        mean_row("mean absolute error of a constant", blank),
        mean_row("rank correlation of guess and outcome", [_ranked(guessed) for guessed in each]),
        mean_row("calibration error of the intervals (ECE)", [_ece(guessed) for guessed in each]),
    ]


def _constant(came: Sequence[float]) -> float:
    """Mean absolute error of guessing the mean of all that came before."""
    return statistics.fmean(abs(statistics.fmean(came[:index]) - came[index]) for index in range(1, len(came)))


def _ranked(guessed: Sequence[tuple[float, float, float]]) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr([mean for mean, *_ in guessed], [came for *_, came in guessed]).statistic)


def _ece(guessed: Sequence[tuple[float, float, float]]) -> float:
    """Mean distance between the share of outcomes that central intervals of a normal guess shall hold, and do hold."""
    normal = NormalDist()
    nominal = np.arange(0.1, 1.0, 0.1)
    scaled = np.array([abs(mean - came) / half for mean, half, came in guessed]) * normal.inv_cdf(0.95)
    held = [(scaled <= normal.inv_cdf(0.5 + share / 2)).mean() for share in nominal]
    return float(np.abs(np.array(held) - nominal).mean())


def _children(trials: Sequence[Trial], generations: int) -> list[Row]:
    rows = []
    for arm in ARMS[:2]:
        for begin in range(0, generations, max(1, generations // 4)):
            end = min(generations, begin + max(1, generations // 4))
            shares = [
                statistics.fmean(won)
                for trial in _of(trials, arm)
                if (won := [beat for generation, beat in trial.beaten if begin <= generation < end])
            ]
            if shares:
                rows.append(mean_row(f"{arm}: generations {begin + 1} to {end}", shares))
    return rows


def _safe(trial: Trial) -> Row:
    """How many of the elites are fit for use."""
    fit, reasons = 0, list[str]()
    for ir in trial.elites:
        try:
            check(lambda ir=ir: build(ir, SLOT), SLOT)
            fit += 1
        except Unfit as finding:
            reasons.append(str(finding))
    return {"what": trial.arm, "n": len(trial.elites), "fit": fit, "first reason": (reasons or ["–"])[0][:80]}


def _plot(trials: Sequence[Trial]) -> str:
    """Best, coverage and QD-score over generations: means and, paler, their 95 % intervals."""
    width, height, gap = 300, 220, 60
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {3 * (width + gap)} {height + 90}" '
        'font-family="system-ui, sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for index, (name, figure) in enumerate(FIGURES.items()):
        left = index * (width + gap) + gap - 10
        curves = {arm: np.array([getattr(trial, figure) for trial in _of(trials, arm)]) for arm in ARMS}
        low, high = min(curve.min() for curve in curves.values()), max(curve.max() for curve in curves.values())
        parts.append(f'<text x="{left}" y="20" font-size="14">{name}</text>')
        parts += [
            f'<text x="{left - 5}" y="{y + 4}" text-anchor="end">{value:.2f}</text>'
            for y, value in ((40, high), (40 + height, low))
        ]
        parts.append(f'<rect x="{left}" y="40" width="{width}" height="{height}" fill="none" stroke="#d0d7de"/>')
        for arm, curve in curves.items():
            parts += _curve(arm, curve, left, width, height, low, high)
        parts.append(f'<text x="{left + width / 2}" y="{height + 58}" text-anchor="middle">generation</text>')
    for index, arm in enumerate(ARMS):
        parts.append(f'<text x="{50 + 130 * index}" y="{height + 80}" fill="{COLOURS[arm]}">● {arm}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _curve(arm: str, curve: np.ndarray, left: int, width: int, height: int, low: float, high: float) -> list[str]:
    def at(generation: int, value: float) -> str:
        x = left + width * generation / max(1, curve.shape[1] - 1)
        return f"{x:.1f},{40 + height * (1 - (value - low) / max(1e-9, high - low)):.1f}"

    middle = curve.mean(0)
    spread = np.array([interval(list(column)) or 0.0 for column in curve.T])
    steps = range(curve.shape[1])
    up = [at(step, min(high, middle[step] + spread[step])) for step in steps]
    down = [at(step, max(low, middle[step] - spread[step])) for step in reversed(steps)]
    line = " ".join(at(step, middle[step]) for step in steps)
    return [
        f'<polygon points="{" ".join(up + down)}" fill="{COLOURS[arm]}" fill-opacity="0.15"/>',
        f'<polyline points="{line}" fill="none" stroke="{COLOURS[arm]}" stroke-width="2"/>',
    ]
