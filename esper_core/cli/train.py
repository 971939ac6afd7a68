"""``esperctl train``: hands the terminal over to a training process.

The process replaces this one, so that signals, exit code and terminal are its own. It is started without the present
folder on its import path: a stray ``services/`` there is not what anyone means to run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from esper_core import presets
from esper_core.cli.command import Invocation, command
from esper_core.cli.output import table
from esper_core.errors import InvalidInput, NotFound, nearest
from esper_core.ids import check_name

TRAINER = "services.tolaria"


def register(app: typer.Typer) -> None:
    """Put the command into ``app``."""
    command(app, "train", rich_help_panel="Training")(train)


def train(
    call: Invocation,
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN.yaml|PRESET]", help="A configuration file, or a preset's name.")
    ] = None,
    list_presets: Annotated[bool, typer.Option("--list", help="List the presets and leave.")] = False,
    name: Annotated[str | None, typer.Option(help="Name of the run.", show_default="made from the preset")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Random seed.", show_default="the configuration's")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one setting; repeatable.")
    ] = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Train without growth.")] = False,
    twin: Annotated[bool, typer.Option("--twin/--no-twin", help="Also train the ungrown twin, to compare.")] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Use the built-in controller and no platform.")] = False,
    repeat: Annotated[
        int | None, typer.Option(min=1, help="Train this often, with one seed after the other.", show_default="1")
    ] = None,
) -> None:
    """Train a network and let it grow, in the foreground.

    Ctrl-C stops it at a point from which --resume goes on.

    Example:  esperctl train --list

    Example:  esperctl train digits --seed 3 --set optimization.epochs=40

    Example:  esperctl train run.yaml --resume
    """
    if list_presets:
        known = presets.available()
        documents = [{"name": name, "summary": summary} for name, summary in known.items()]
        call.output.document(documents, table(("PRESET", "*WHAT IT IS"), known.items(), empty="no presets"))
        return
    arguments = [source_of(run)]
    flags = (("--baseline", baseline), ("--no-twin", not twin), ("--resume", resume), ("--offline", offline))
    for option, given in flags:
        arguments += [option] if given else []
    if name is not None:
        arguments += ["--name", check_name(name, "run name")]
    if seed is not None:
        arguments += ["--seed", str(seed)]
    if repeat is not None:
        arguments += ["--repeat", str(repeat)]
    for setting in settings or []:
        arguments += ["--set", setting_of(setting)]
    if call.given_data_dir is not None or "ESPER_DATA_DIR" in os.environ:  # otherwise the configuration may say where
        arguments += ["--data-dir", str(call.data_dir)]
    arguments += ["-o", "json" if call.output.json else "text"]
    become(TRAINER, arguments)


def become(module: str, arguments: Sequence[str]) -> None:
    """Replace this process by ``python -m module``; does not return."""
    from esper_core.local.services import import_path

    sys.stdout.flush()
    sys.stderr.flush()
    environment = {**os.environ, "PYTHONPATH": import_path()}
    os.execve(  # noqa: S606 - no shell is wanted
        sys.executable, [sys.executable, "-P", "-m", module, *arguments], environment
    )


def source_of(given: str | None) -> str:
    """A file or a preset, checked before a heavy process starts.

    Raises:
        InvalidInput: nothing was named.
        NotFound: it is neither.
    """
    names = list(presets.available())
    if given is None:
        raise InvalidInput("what to train?", hint=f"name a file or a preset: {', '.join(names)}")
    if given in names:
        return given
    if Path(given).is_file():
        return str(given)
    if Path(given).suffix in (".yaml", ".yml") or os.sep in given:
        raise NotFound(f"no file {given}", hint=f"check the path, or name a preset: {', '.join(names)}")
    raise NotFound(f"no preset {given!r} and no such file", hint=nearest(given, names))


def setting_of(given: str) -> str:
    key, equals, _ = given.partition("=")
    if not equals or "." not in key.strip("."):
        raise InvalidInput(
            f"--set {given!r} is no setting", hint="write SECTION.KEY=VALUE, e.g. optimization.epochs=40"
        )
    return given
