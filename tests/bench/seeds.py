"""What growing brings in the demo: over many seeds, beside its healthy twin and a static network of the grown shape."""

from __future__ import annotations

from services.tolaria.result import RunResult
from tests.bench.bench import Pace, Table
from tests.bench.figures import Row, mean_row
from tests.bench.trials import Trial, seed_row, summary_row, train, train_at

PRESET = "digits-narrow"
NARROW = 2
UNIT = 64 + 1 + 64
"""Parameters of one unit in the narrow layer of 64-2-64."""


def run(pace: Pace) -> list[Table]:
    seeds = tuple(range(min(pace.seeds, 2) if pace.quick else pace.seeds))
    trials = [Trial("the demo: 64-64-2-64-10", PRESET, seeds)]
    if not pace.quick:
        trials.append(Trial("its healthy twin: 64-64-64-64-10", PRESET, seeds, ("model.widths=[64,64,64]",)))
    pace.say(f"{len(seeds)} seeds of the demo, grown and ungrown" + ("" if pace.quick else ", and of its healthy twin"))
    found = train(trials, per_process=1 if pace.quick else max(1, len(seeds) // 2))
    demo = found[trials[0].name]
    tables = [
        Table("Test accuracy of the demo, grown in library mode / ungrown", [seed_row(result) for result in demo]),
        Table(
            "Over seeds: paired, the same split, weights and batches",
            [summary_row(name, results) for name, results in found.items()],
            (
                "gain: accuracy points of the grown network above its ungrown twin; sd and 95 % t-interval of that paired "
                "difference. grew: seeds that kept at least one graft; for the healthy twin that is false growth.",
            ),
        ),
    ]
    if not pace.quick:
        tables.append(_static(pace, seeds, demo))
    if pace.platform:
        tables += _platform(pace, seeds, demo)
    return tables


def _static(pace: Pace, seeds: tuple[int, ...], demo: list[RunResult]) -> Table:
    units = round(sum(result.added_parameters for result in demo) / len(demo) / UNIT)
    pace.say(f"a static network with {NARROW + units} units there")
    width = (f"model.widths=[64,{NARROW + units},64]",)
    static = train([Trial("static", PRESET, seeds, width, ("--offline", "--baseline"))], max(1, len(seeds) // 2))
    wide = [100 * (result.ungrown_accuracy or 0.0) for result in static["static"]]
    grown = [100 * (result.grown_accuracy or 0.0) for result in demo]
    rows: list[Row] = [
        mean_row(f"static 64-{NARROW + units}-64 from the start, %", wide),
        mean_row("grown - static, points", [a - b for a, b in zip(grown, wide, strict=True)]),
    ]
    return Table("A network built as wide as the grown one became", rows, ("The same seeds and epochs.",))


def _platform(pace: Pace, seeds: tuple[int, ...], demo: list[RunResult]) -> list[Table]:
    pace.say(f"{len(seeds)} seeds through the platform")
    data_dir = pace.ground.platform().data_dir
    results = train_at(Trial("the demo", PRESET, seeds, flags=()), data_dir)
    both = zip(results, demo, strict=True)
    difference = [100 * ((a.grown_accuracy or 0.0) - (b.grown_accuracy or 0.0)) for a, b in both]
    note = (
        "Tezzeret draws a kernel's initial weights from other seeds than the library, so the runs are alike, not equal."
    )
    return [
        Table(
            "Test accuracy of the demo, grown through the platform / ungrown", [seed_row(found) for found in results]
        ),
        Table("Over seeds, through the platform", [summary_row("the demo: 64-64-2-64-10", results)]),
        Table("Platform / library", [mean_row("grown there - grown here, points", difference)], (note,)),
    ]
