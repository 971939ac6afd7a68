"""``python -m services.tolaria.carve RUN``: a smaller copy of a finished run's network, as a run's directory of its own.

The run itself is only read. Standard output carries the figures and nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from esper_core.errors import AlreadyExists, Conflict
from esper_core.ids import check_name
from services.tolaria.config import ServicesConfig
from services.tolaria.edge import writing
from services.tolaria.export import run_directory

if TYPE_CHECKING:
    from services.tolaria.carving import Carved

DOCUMENT = "carve.json"


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    out = argparse.ArgumentParser(
        prog="python -m services.tolaria.carve",
        description="Write a smaller copy of a finished run's network; the run itself stays as it is.",
    )
    out.add_argument("run", metavar="RUN", help="name of a finished run")
    out.add_argument(
        "--share", type=_share, default=0.5, help="share of the parameters to take out at most; default 0.5"
    )
    out.add_argument(
        "--max-drop", type=_share, default=0.02, help="held-back accuracy, absolute, that it may cost; default 0.02"
    )
    out.add_argument(
        "--fine-tune",
        type=_epochs,
        default=0,
        help="epochs to train on after each cut, at the run's own rate; default 0",
    )
    out.add_argument("--dry-run", action="store_true", help="say what would go, and write nothing")
    out.add_argument("--name", help="of the copy; default: RUN-carved")
    out.add_argument("--data-dir", type=Path, help="the platform's data directory; runs are kept under it")
    out.add_argument("-o", "--output", choices=("text", "json"), default="text", help="form of the result on stdout")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    arguments = parser().parse_args(argv)
    return writing(lambda: carve(arguments))


def carve(arguments: argparse.Namespace) -> int:
    """Recall the network, carve a copy, write it, print the figures.

    Raises:
        EsperError: there is no such run, it cannot be recalled, nothing of it can go, or the copy's name is taken.
    """
    from services.tolaria import carving

    directory = run_directory(arguments.data_dir or ServicesConfig().data_dir, arguments.run)
    name = check_name(arguments.name or f"{directory.name}-carved"[:63], "run")
    target = directory.parent / name
    if target.exists() and not arguments.dry_run:
        raise AlreadyExists(f"there is a run {name} already", hint="choose another --name")
    done = carving.carve(directory, arguments.share, arguments.max_drop, arguments.fine_tune)
    if not done.carver.freed:
        raise Conflict(
            f"nothing of {directory.name} can go without costing more than {arguments.max_drop:g} of accuracy",
            hint="allow more with --max-drop, or let it learn between cuts: --fine-tune 3",
        )
    document = figures(done) | {"run": directory.name, "carved": None if arguments.dry_run else name}
    if not arguments.dry_run:
        carving.write(done, directory, target, document, DOCUMENT)
    if arguments.output == "json":
        print(json.dumps(document))  # noqa: T201 - the result
        return 0
    _show(document)
    return 0


def figures(done: Carved) -> dict[str, Any]:
    """What came of it, for programs."""
    return {
        "before": done.before,
        "after": done.after,
        "freed_parameters": done.before["parameters"] - done.after["parameters"],
        "freed_flops": done.before["flops"] - done.after["flops"],
        "events": [event.model_dump(mode="json") for event in done.events],
        "ended": done.carver.ended,
    }


def _show(document: dict[str, Any]) -> None:
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    for key in ("parameters", "flops", "validation_accuracy", "test_accuracy", "validation_loss", "test_loss"):
        before, after = document["before"][key], document["after"][key]
        if before is not None:
            form = "{}" if isinstance(before, int) else "{:.4f}"
            table.add_row(key.replace("_", " "), form.format(before), form.format(after))
    table.add_row("written", "", document["carved"] or "nothing: --dry-run")
    out = Console()
    (out if out.is_terminal else Console(width=160)).print(table)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError("must be at least 0 and below 1")
    return value


def _epochs(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 1000:
        raise argparse.ArgumentTypeError("must be between 0 and 1000")
    return value


if __name__ == "__main__":
    sys.exit(main())
