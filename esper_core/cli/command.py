"""How a function becomes a command: the options every command has, and the edge where errors become exit codes.

A command is a function, async or not, whose first parameter is the ``Invocation``; the others are its arguments and
options. The edge catches everything: people get one line and a hint, programs an exit code, nobody a traceback unless
``--debug`` asks for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from esper_core.cli.output import Format, Output, error
from esper_core.errors import EsperError

if TYPE_CHECKING:
    from esper_core.cli.platform import Platform

F = TypeVar("F", bound=Callable[..., Any])

OutputOption = Annotated[
    Format | None, typer.Option("--output", "-o", help="table for people, json for programs.", show_default="table")
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(help="Where the platform lives; also ESPER_DATA_DIR.", show_default="~/.esper", file_okay=False),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

_EXIT_INTERRUPTED = 130
_EXIT_BROKEN_PIPE = 141
_EXIT_UNEXPECTED = 70


@dataclass(frozen=True)
class Globals:
    """What stood before the command's name."""

    output: Format | None = None
    data_dir: Path | None = None
    debug: bool = False


@dataclass(frozen=True)
class Invocation:
    """One call of one command."""

    output: Output
    given_data_dir: Path | None
    debug: bool

    @property
    def data_dir(self) -> Path:
        """Where the platform lives: the option, else ``ESPER_DATA_DIR``, else ``~/.esper``; absolute.

        Raises:
            InvalidInput: when an ``ESPER_*`` variable is wrong.
        """
        from esper_core.config import PlatformConfig, load

        if self.given_data_dir is not None:
            return Path(os.path.abspath(self.given_data_dir.expanduser()))
        return load(PlatformConfig).data_dir

    @contextlib.asynccontextmanager
    async def platform(self) -> AsyncIterator[Platform]:
        """The running platform, dialled as principal ``operator``; closed on the way out.

        Raises:
            NotFound: nothing was ever started in the data directory.
        """
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its own words on stderr are for its makers; ours say it all
        from esper_core.cli.platform import dial  # grpc costs 0.1 s: paid only by who dials

        async with dial(self.data_dir) as platform:
            yield platform


def noun(name: str, summary: str) -> typer.Typer:
    """A group of commands about one kind of thing."""
    return typer.Typer(name=name, help=summary, no_args_is_help=True, rich_markup_mode="rich")


def command(app: typer.Typer, name: str, **settings: Any) -> Callable[[F], F]:
    """Register the decorated function as command ``name`` of ``app``; it is returned unchanged."""

    def register(function: F) -> F:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        extra = [
            _keyword("ctx", typer.Context, inspect.Parameter.empty),
            _keyword("output", OutputOption, None),
            _keyword("data_dir", DataDirOption, None),
        ]
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own] + extra

        def invoke(**arguments: Any) -> None:
            above = arguments.pop("ctx").find_root().obj or Globals()
            call = Invocation(
                output=Output(arguments.pop("output") or above.output or Format.TABLE),
                given_data_dir=arguments.pop("data_dir") or above.data_dir,
                debug=above.debug,
            )
            with edge(debug=call.debug):
                result = function(call, **arguments)
                if isinstance(result, Coroutine):
                    asyncio.run(result)

        invoke.__doc__ = function.__doc__
        invoke.__name__ = function.__name__
        invoke.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        invoke.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.command(name, **settings)(invoke)
        return function

    return register


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


@contextlib.contextmanager
def edge(*, debug: bool) -> Iterator[None]:
    """Turn what escapes into words on stderr and an exit code."""
    try:
        yield
    except EsperError as failure:
        if debug:
            raise
        error(failure.message, failure.hint)
        raise typer.Exit(failure.exit_code) from None
    except KeyboardInterrupt:
        raise typer.Exit(_EXIT_INTERRUPTED) from None
    except BrokenPipeError:  # the reader left (`| head`); stdout must not be flushed into it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(_EXIT_BROKEN_PIPE) from None
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception as failure:  # the outermost edge: people get a message, --debug the traceback
        if debug:
            raise
        error(f"{type(failure).__name__}: {failure}", "this is a defect; `esperctl --debug …` shows where")
        raise typer.Exit(_EXIT_UNEXPECTED) from None
