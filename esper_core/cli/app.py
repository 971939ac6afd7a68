"""``esperctl``: the root of the command line, where every noun is hung in and global options are read."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from esper_core.cli import (
    bench,
    blueprint,
    build,
    bus,
    carve,
    decisions,
    evaluation,
    export,
    forge,
    karn,
    kernel,
    library,
    policy,
    runs,
    seed,
    stack,
    train,
)
from esper_core.cli.command import DataDirOption, DebugOption, Globals, OutputOption, edge

app = typer.Typer(
    name="esperctl",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

stack.register(app)
train.register(app)
export.register(app)
evaluation.register(kernel.app)
for group in (runs, seed, decisions, carve, bench):
    app.add_typer(group.app, rich_help_panel="Training")
for group in (kernel, blueprint, library, build, forge, karn, policy, bus):
    app.add_typer(group.app, rich_help_panel="Platform parts")


def _show_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(version("esper"))
        except PackageNotFoundError:
            typer.echo("not installed: running from a checkout")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    output: OutputOption = None,
    data_dir: DataDirOption = None,
    debug: DebugOption = False,
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version and leave.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Networks that find their own bottlenecks and grow past them while they train.

    A first walk:

    Example:  esperctl up

    Example:  esperctl train --list

    Example:  esperctl train digits

    Example:  esperctl seed list

    Every command takes -o json. Ids may be shortened as long as they stay unambiguous; a run may be called latest.
    Exit codes: 0 done, 2 bad input, 3 not found, 5 not now, 6 not allowed, 8 something is away, 130 Ctrl-C.
    """
    context.obj = Globals(output=output, data_dir=data_dir, debug=debug)


def main() -> None:
    """Run ``esperctl`` with the process's arguments."""
    with edge(debug=False):
        app()
