"""The command line of the training process: arguments in, one line per mistake, figures out.

Standard output carries the result and nothing else; everything a person watches goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from esper_core import log, presets
from esper_core.errors import InvalidInput, NotFound
from esper_core.ids import check_name
from services.tolaria.config import TolariaConfig, read_run
from services.tolaria.edge import answered

EPILOG = """\
examples:
  python -m services.tolaria digits-narrow --offline          a narrow network finds its bottleneck and grows past it
  python -m services.tolaria RUN.yaml --check                 is the file right, and where could this network grow?
  python -m services.tolaria digits --set optimization.epochs=20 --set model.widths='[64, 4]'
  python -m services.tolaria digits-narrow --repeat 5 -o json five seeds, grown and ungrown, figures as JSON
  python -m services.tolaria digits-narrow --resume           go on with the newest interrupted run of that name

A run is trained twice from the same seed on the same batches: once plain (the twin), once growing. Ctrl-C stops at the
next epoch boundary with a checkpoint; a second one stops at once. Environment variables ESPER_SECTION__KEY override the
file and --set.

exit codes: 0 done, 2 bad input, 3 not found, 4 name taken, 5 other settings, 7 disk full, 10 damaged, 130/143 stopped
"""


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    known = "\n".join(f"  {name:<16}{text}" for name, text in presets.available().items())
    out = argparse.ArgumentParser(
        prog="python -m services.tolaria",
        description=f"Train a network that finds its own bottlenecks and grows past them.\n\npresets:\n{known}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("run", metavar="RUN.yaml|PRESET", help="settings of the run: a file, or the name of a preset")
    out.add_argument("--baseline", action="store_true", help="plain training: no growth, no twin")
    out.add_argument("--twin", action=argparse.BooleanOptionalAction, default=True, help="also train the ungrown twin")
    out.add_argument(
        "--resume", action="store_true", help="go on with --name, or with the newest run of this configuration"
    )
    out.add_argument("--name", help="what the run is called; default: the configuration's name and four random letters")
    out.add_argument("--seed", type=int, help="seed of weights, data order and split")
    out.add_argument(
        "--repeat", type=int, default=1, metavar="N", help="train N seeds, SEED … SEED+N-1, and report the spread"
    )
    out.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", help="override one setting; may be repeated"
    )
    out.add_argument("--data-dir", type=Path, help="the platform's data directory; runs are kept under it")
    out.add_argument(
        "--offline", action="store_true", help="no platform: decide in process, with the built-in blueprints"
    )
    out.add_argument("--check", action="store_true", help="check the settings, show the slots, train nothing")
    out.add_argument("-o", "--output", choices=("text", "json"), default="text", help="form of the result on stdout")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    arguments = parser().parse_args(argv)
    console = Console(stderr=True)

    def work() -> int:
        config = settings(arguments)
        log.configure("tolaria", json=not console.is_terminal, level=config.logging.level)
        if arguments.check:
            return check(config, arguments, Console())
        return train(config, arguments, console)

    return answered(console, work, interrupted="stopped at once; go on from the last checkpoint with --resume")


def settings(arguments: argparse.Namespace) -> TolariaConfig:
    """The configuration with the flags laid over it.

    Raises:
        EsperError: see ``read_run``; or a flag that cannot be.
    """
    if arguments.repeat < 1:
        raise InvalidInput(f"--repeat {arguments.repeat} trains nothing", hint="1 or more")
    if arguments.seed is not None and not 0 <= arguments.seed < 2**63:
        raise InvalidInput(f"--seed {arguments.seed} is out of range", hint="0 to 2^63-1")
    config = read_run(arguments.run, arguments.set)
    services: dict[str, Any] = {}
    if arguments.data_dir is not None:
        services["data_dir"] = arguments.data_dir
    if arguments.offline:
        services["offline"] = True
    update: dict[str, Any] = {"services": config.services.model_copy(update=services)}
    if arguments.seed is not None:
        update["seed"] = arguments.seed
    return config.model_copy(update=update)


def check(config: TolariaConfig, arguments: argparse.Namespace, out: Console) -> int:
    """Build everything, train nothing, say what was found."""
    from services.tolaria import experiment

    experiment.set_up(config)
    data = experiment.load_data(config)
    host = experiment.build_host(config, data)
    rows = [
        {
            "slot": slot.name,
            "layout": slot.interface.layout.name,
            "in": slot.interface.in_width,
            "hidden": slot.interface.hidden_width,
            "out": slot.interface.out_width,
            "foldable": slot.interface.foldable,
            "obstacle": slot.obstacle,
        }
        for slot in host.slots.values()
    ]
    facts = {
        "rows": {"train": len(data.train), "validation": len(data.validation), "test": len(data.test)},
        "sample_shape": list(data.sample_shape),
        "outputs": data.outputs,
        "parameters": sum(parameter.numel() for parameter in host.parameters()),
        "slots": rows,
    }
    if arguments.output == "json":
        print(json.dumps(facts))  # noqa: T201 - the result
        return 0
    out.print(
        f"{config.name}: {config.model.host} with {facts['parameters']} parameters on {config.dataset.name} "
        f"({len(data.train)} training, {len(data.validation)} validation, {len(data.test)} test rows)",
        highlight=False,
    )
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for column in ("slot", "layout", "in", "hidden", "out", "foldable", "obstacle"):
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    out.print(table if rows else "no slots: this network has no span that could grow")
    return 0


def train(config: TolariaConfig, arguments: argparse.Namespace, console: Console) -> int:
    """Train every seed, write the report, print the figures."""
    from services.tolaria import experiment, report, result
    from services.tolaria.live import view_for
    from services.tolaria.trainer import Stop

    grow = config.morphogenetic.enabled and not arguments.baseline
    name = run_name(config, arguments)
    names = [name] if arguments.repeat == 1 else [f"{name}-{number}" for number in range(1, arguments.repeat + 1)]
    view = view_for(console, config.logging.every_epochs)
    runs: list[report.SeedRun] = []
    with Stop().on_signals() as stop:
        try:
            for number, run_id in enumerate(names):
                check_name(run_id, "run")
                seeded = config.model_copy(update={"seed": config.seed + number})
                again = arguments.resume and (number == 0 or experiment.run_directory(seeded, run_id).exists())
                one = experiment.Experiment(seeded, run_id, grow, arguments.twin, again, view, stop)
                runs.append(one.run())
        except experiment.Stopped as stopped:
            view.close()
            console.print(
                f"{stopped.run_id} stopped after epoch {stopped.epoch}; go on with: --resume --name {name}",
                markup=False,
                highlight=False,
            )
            return 128 + stopped.signal
        finally:
            view.close()
    directory = experiment.run_directory(config, name)
    directory.mkdir(parents=True, exist_ok=True)
    figures = result.combined([run.result for run in runs], str(directory / "report.html"))
    report.write(directory / "report.html", name, config, runs, figures)
    experiment.write_json(directory / "figures.json", figures)
    if arguments.output == "json":
        print(json.dumps(figures))  # noqa: T201 - the result
    else:
        out = Console()
        (out if out.is_terminal else Console(width=160)).print(summary(figures, runs))
        console.print(f"report: {figures['report']}", markup=False, highlight=False, soft_wrap=True)
    return 0


def run_name(config: TolariaConfig, arguments: argparse.Namespace) -> str:
    """The name asked for, the newest of this configuration to resume, or a fresh one."""
    if arguments.name:
        return check_name(arguments.name, "run")
    if not arguments.resume:
        return f"{config.name}-{''.join(secrets.choice('abcdefghjkmnpqrstuvwxyz23456789') for _ in range(4))}"
    folder = config.services.data_dir.expanduser() / "runs"
    found = [path.parent for path in folder.glob(f"{config.name}-*/config.json")]
    if not found:
        raise NotFound(f"no run of {config.name} under {folder}", hint="start one without --resume")
    newest = max(found, key=lambda path: path.joinpath("config.json").stat().st_mtime).name
    return newest.rsplit("-", 1)[0] if arguments.repeat > 1 else newest


def summary(figures: dict[str, Any], runs: Sequence[Any]) -> Table:
    """The figures as a table, a row per seed and one for all."""
    from services.tolaria.report import gain_text, number_text, percent_text, points_text

    table = Table(title=None, header_style="bold")
    for column in (
        "run",
        "seed",
        "ungrown",
        "grown",
        "gain",
        "kept",
        "culled",
        "parameters added",
        "fold diff",
        "seconds",
    ):
        table.add_column(column, justify="left" if column == "run" else "right")
    for run in runs:
        found = run.result
        accuracy = found.ungrown_accuracy is not None or found.grown_accuracy is not None
        shown = percent_text if accuracy else number_text
        table.add_row(
            found.run,
            str(found.seed),
            shown(found.ungrown_accuracy if accuracy else found.ungrown_loss),
            shown(found.grown_accuracy if accuracy else found.grown_loss),
            points_text(found),
            str(found.fossilized),
            str(found.culled + found.rolled_back),
            str(found.added_parameters),
            number_text(found.folded_max_abs_diff),
            f"{found.wall_seconds:.0f}",
        )
    if len(runs) > 1:
        table.add_section()
        table.add_row(
            "mean",
            "",
            percent_text(figures["ungrown_accuracy"]),
            percent_text(figures["grown_accuracy"]),
            gain_text(figures),
            str(figures["fossilized"]),
            str(figures["culled"] + figures["rolled_back"]),
            number_text(figures["added_parameters"]),
            number_text(figures["folded_max_abs_diff"]),
            f"{figures['wall_seconds']:.0f}",
        )
    return table
