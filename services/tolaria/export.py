"""``python -m services.tolaria.export RUN``: a finished run's network as files that need no Esper.

Standard output carries the figures and nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from esper_core.errors import NotFound, nearest
from services.tolaria.config import ServicesConfig
from services.tolaria.edge import writing

FORMATS = ("safetensors", "torch", "onnx")


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    out = argparse.ArgumentParser(
        prog="python -m services.tolaria.export",
        description="Write a finished run's network as plain PyTorch, torch.export and ONNX, each compared with it.",
    )
    out.add_argument("run", metavar="RUN", help="name of a finished run")
    out.add_argument("--format", choices=(*FORMATS, "all"), default="all", help="what to write; default: all")
    out.add_argument("--out", type=Path, help="directory to make; default: export/ of the run's own")
    out.add_argument("--data-dir", type=Path, help="the platform's data directory; runs are kept under it")
    out.add_argument("-o", "--output", choices=("text", "json"), default="text", help="form of the result on stdout")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    arguments = parser().parse_args(argv)
    return writing(lambda: export(arguments))


def export(arguments: argparse.Namespace) -> int:
    """Recall the network, write it, print the figures.

    Raises:
        EsperError: there is no such run, it cannot be recalled, or it cannot be exported.
    """
    from esper_core.nn.export import bundle
    from services.tolaria import keepsake

    directory = run_directory(arguments.data_dir or ServicesConfig().data_dir, arguments.run)
    recalled = keepsake.recall(directory)
    standardised = recalled.morphology.standardisation
    done = bundle.export(
        recalled.model,
        recalled.inputs,
        arguments.out or directory / "export",
        FORMATS if arguments.format == "all" else (arguments.format,),
        facts={"run": directory.name, "standardisation": standardised.model_dump() if standardised else None},
    )
    if arguments.output == "json":
        print(json.dumps([entry.as_json() for entry in done]))  # noqa: T201 - the result
        return 0
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for column in ("format", "path", "max abs diff", "tolerance", "bytes"):
        table.add_column(column, justify="left" if column in ("format", "path") else "right", overflow="fold")
    for entry in done:
        table.add_row(
            entry.format, str(entry.path), f"{entry.max_abs_diff:.2g}", f"{entry.tolerance:.2g}", str(entry.bytes)
        )
    out = Console()
    (out if out.is_terminal else Console(width=160)).print(table)
    return 0


def run_directory(data_dir: Path, run: str) -> Path:
    """Where a run's files are.

    Raises:
        NotFound: there is no such run; the hint names the nearest.
    """
    folder = data_dir.expanduser() / "runs"
    known = [path.parent.name for path in folder.glob("*/config.json")]
    if run not in known:
        raise NotFound(f"there is no run {run!r} under {folder}", hint=nearest(run, known) or "train one first")
    return folder / run


if __name__ == "__main__":
    sys.exit(main())
