"""``esperctl export``: hands the terminal over to a process that writes a finished run's network for use without Esper."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from esper_core.cli.command import Invocation, command
from esper_core.cli.resolve import LATEST, one
from esper_core.cli.train import become
from esper_core.errors import NotFound

EXPORTER = "services.tolaria.export"


class FormatName(enum.StrEnum):
    """What to write."""

    SAFETENSORS = "safetensors"
    TORCH = "torch"
    ONNX = "onnx"
    ALL = "all"


def register(app: typer.Typer) -> None:
    """Put the command into ``app``."""
    command(app, "export", rich_help_panel="Training")(export)


def export(
    call: Invocation,
    run: Annotated[str, typer.Argument(metavar="[RUN]", help="A finished run's name or a prefix of it.")] = LATEST,
    wanted: Annotated[FormatName, typer.Option("--format", help="What to write.")] = FormatName.ALL,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Directory to make.", show_default="export/ of the run's own", file_okay=False),
    ] = None,
) -> None:
    """Write a finished run's network as plain PyTorch weights, torch.export and ONNX.

    Nothing that is written needs Esper. Every file is read back and compared with the network on held-out rows; one that
    differs is an error, and nothing is left behind. ONNX needs the extra: pip install 'esper[export]'.

    Example:  esperctl export latest

    Example:  esperctl export digits-1 --format onnx --out digits-onnx
    """
    arguments = [finished_run(call.data_dir / "runs", run), "--format", wanted.value]
    if out is not None:
        arguments += ["--out", str(out)]
    arguments += ["--data-dir", str(call.data_dir), "-o", "json" if call.output.json else "text"]
    become(EXPORTER, arguments)


def finished_run(folder: Path, given: str) -> str:
    """A run's whole name, checked before a heavy process starts; ``latest`` is the one that finished last.

    Raises:
        NotFound: there is none.
        InvalidInput: several begin like that.
    """
    known = {path.parent.name for path in folder.glob("*/config.json")}
    if not known:
        raise NotFound(f"there are no runs under {folder}", hint="train one first: esperctl train digits-narrow")
    if given != LATEST or given in known:
        return one(given, known, "run")
    finished = list(folder.glob("*/model.safetensors"))
    if not finished:
        raise NotFound("no run has finished yet", hint="esperctl train digits-narrow")
    return max(finished, key=lambda path: path.stat().st_mtime).parent.name
