"""Urabrask's judgement: what it rejects and for which reason, how far its figures repeat, and what a verdict takes."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from esper_core.kernel.record import Measurement, RejectionReason
from services.sandbox import Limits
from services.urabrask.judge import LIMITS as JUDGE
from services.urabrask.judge import MODULE
from tests.bench.bench import Pace, Table
from tests.bench.figures import Row, Sample
from tests.bench.ground import folder
from tests.corpus.kernels import LIMITS, STUBBORN, Kernel, bad, good
from tests.corpus.slots import SLOTS
from tests.corpus.trial import CHILD, Trial, trial

PATIENCE = replace(LIMITS, wall_seconds=30.0, cpu_seconds=5.0)
"""For adversaries."""
WARM = 3
"""Verdicts that are not timed after a child's start."""
FIGURES = (
    "forward_seconds",
    "forward_seconds_p99",
    "backward_seconds",
    "backward_seconds_p99",
    "rows_per_second",
    "peak_memory_bytes",
    "precision_drift",
    "gradient_norm",
    "input_gradient_norm",
    "gradient_ratio",
    "counted_flops",
    "learned",
)


@dataclass(frozen=True)
class Heard:
    """A verdict on a kernel and how long it took."""

    kernel: Kernel
    reason: RejectionReason | None
    words: str
    measurement: Measurement | None
    seconds: float


def run(pace: Pace) -> list[Table]:
    async def everything(path: Path) -> tuple[list[list[Heard]], list[list[Heard]]]:
        pace.say("the catalogue, over and over")
        kernels = list(good(SLOTS[::4] if pace.quick else SLOTS, widths=(8,)))
        honest = await _rounds(kernels, pace.rounds(3, 2), JUDGE, MODULE, path / "good")
        pace.say("the adversaries, twice")
        return honest, await _rounds(list(bad()), 2, PATIENCE, CHILD, path / "bad")

    with folder("judge") as path:
        for part in ("good", "bad"):
            (path / part).mkdir()
        honest, adversaries = asyncio.run(everything(path))
    return [
        _rejections(adversaries, honest),
        Table("Every adversary", [_row(heard) for heard in adversaries[0]]),
        Table(
            "Run-to-run spread over the catalogue",
            _spread(honest),
            (
                f"{len(honest[0])} kernels, each measured {len(honest)} times, once per pass over all of them: standard deviation over "
                "mean, per kernel. 0 is the same figure every time. Nothing that is timed enters a verdict.",
            ),
        ),
        Table(
            "Seconds per verdict, child warm",
            [
                Sample(tuple(h.seconds for passed in honest for h in passed[WARM:])).row("accepted, lessons included", "ms", 1e3),
                Sample(_quick(adversaries)).row("rejected, child survives", "ms", 1e3),
                Sample(_slow(adversaries)).row("rejected, child killed or ended", "s"),
            ],
            (f"Adversaries have {PATIENCE.cpu_seconds:g} processor seconds and {PATIENCE.wall_seconds:g} s of wall clock; the "
             "platform's judge gives a kernel 60 and 240, three times.",),
        ),
    ]  # fmt: skip


async def _rounds(kernels: Sequence[Kernel], rounds: int, limits: Limits, module: str, path: Path) -> list[list[Heard]]:
    async with trial(path, limits, module) as bench:
        return [[await _heard(bench, kernel) for kernel in kernels] for _ in range(rounds)]


async def _heard(bench: Trial, kernel: Kernel) -> Heard:
    began = time.perf_counter()
    reason, words, measurement = await bench.of(kernel)
    return Heard(kernel, reason, words, measurement, time.perf_counter() - began)


def _rejections(adversaries: list[list[Heard]], honest: list[list[Heard]]) -> Table:
    rows: list[Row] = []
    wanted = Counter(heard.kernel.reason for heard in adversaries[0])
    for reason, kernels in sorted((reason, n) for reason, n in wanted.items() if reason is not None):
        mine = [heard for heard in adversaries[0] if heard.kernel.reason is reason]
        rows.append(_counts(reason.name, kernels, mine))
    rows.append(_counts("all adversaries", len(adversaries[0]), adversaries[0]))
    rows.append(_counts("honest kernels", len(honest[0]), honest[0]))
    equal = sum(_same(pair) for pair in zip(*adversaries, strict=True)) + sum(
        _same(p) for p in zip(*honest, strict=True)
    )
    total = len(adversaries[0]) + len(honest[0])
    return Table(
        "Rejected, and for the right reason",
        rows,
        (f"Judged again, {equal} of {total} kernels got the same verdict and reason every time.",),
    )


def _counts(what: str, kernels: int, heard: Sequence[Heard]) -> Row:
    return {
        "what": what,
        "kernels": kernels,
        "rejected": sum(h.reason is not None for h in heard),
        "rightly called": sum(h.reason is h.kernel.reason for h in heard),
    }


def _same(heard: Sequence[Heard]) -> bool:
    return len({h.reason for h in heard}) == 1


def _row(heard: Heard) -> Row:
    wanted, said = heard.kernel.reason, heard.reason
    return {
        "what": heard.kernel.name,
        "wanted": wanted.name if wanted else None,
        "said": said.name if said else "accepted",
        "s": heard.seconds,
    }


def _spread(rounds: list[list[Heard]]) -> list[Row]:
    rows: list[Row] = []
    for name in FIGURES:
        spreads = []
        for heard in zip(*rounds, strict=True):
            values = [value for h in heard if h.measurement and (value := getattr(h.measurement, name)) is not None]
            mean = statistics.fmean(values) if len(values) == len(rounds) else 0.0
            if mean:
                spreads.append(statistics.stdev(values) / mean)
        if spreads:
            found = Sample(tuple(spreads))
            rows.append(
                {
                    "what": name,
                    "kernels": len(spreads),
                    "runs": len(rounds),
                    "median CV": found.median,
                    "q3 CV": found.quantile(0.75),
                    "max CV": max(spreads),
                }
            )
    return rows


def _quick(adversaries: list[list[Heard]]) -> tuple[float, ...]:
    return tuple(
        heard.seconds for passed in adversaries for heard in passed[WARM:] if heard.kernel.reason not in STUBBORN
    )


def _slow(adversaries: list[list[Heard]]) -> tuple[float, ...]:
    return tuple(heard.seconds for passed in adversaries for heard in passed if heard.kernel.reason in STUBBORN)
