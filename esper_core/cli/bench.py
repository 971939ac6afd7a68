"""``esperctl bench``: does growing pay, on one's own network and data?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from esper_core.cli.command import Invocation, command
from esper_core.cli.train import become, setting_of, source_of

ARENA = "services.tolaria.arena"

app = typer.Typer(name="bench", no_args_is_help=True, help="Measure whether growing pays.")


def growth(
    call: Invocation,
    run: Annotated[
        str,
        typer.Option("--run", metavar="RUN.yaml|PRESET", help="Network, data and training; one's own may be named."),
    ],
    arms: Annotated[
        str | None, typer.Option(help="Ways to train, separated by commas.", show_default="all that apply")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Paired seeds.")] = 10,
    out: Annotated[Path, typer.Option(help="Folder for rows and reports.", file_okay=False)] = Path("growth"),
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one setting; repeatable.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget the rows of an earlier comparison.")] = False,
) -> None:
    """Train every arm on the same seeds and data, in the real lifecycle, and compare.

    Arms: esper, none, static, static-flops, random, uniform, schedule, gradmax, firefly, tiny, senn, narrowest, rank. Broken
    off, the same command goes on. One's own network is model.host: python with model.factory: FILE.py:FUNCTION, one's own
    data dataset.name: arrays with dataset.path: FILE.npz.

    Example:  esperctl bench growth --run digits-narrow --arms esper,none,static,random --seeds 5

    Example:  esperctl bench growth --run mine.yaml
    """
    arguments = [source_of(run), "--seeds", str(seeds), "--out", str(out)]
    arguments += ["--arms", arms] if arms is not None else []
    arguments += ["--fresh"] if fresh else []
    for setting in settings or []:
        arguments += ["--set", setting_of(setting)]
    become(ARENA, [*arguments, "-o", "json" if call.output.json else "text"])


command(app, "growth")(growth)
