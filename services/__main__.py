"""``python -m services [NAME ...]``: the platform's services in one process, or some of them."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Coroutine, Sequence
from pathlib import Path

from esper_core import log
from esper_core.config import default_data_dir, read_endpoints
from esper_core.errors import EsperError
from services.composition import NAMES, chosen, run

_EPILOG = """\
examples:
  python -m services                       every service on one port, as `esperctl up` runs them
  python -m services urza --data-dir /srv  one service, as in a container of its own

Addresses, credentials and certificates are read from the data directory, which `esperctl up` fills.
SIGTERM stops within 10 seconds: calls in flight are finished, nothing acknowledged is lost.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m services",
        description="Serve Esper's services over gRPC with mutual TLS, and do their background work.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("names", nargs="*", metavar="NAME", help=f"which services: {', '.join(NAMES)} (default: all)")
    made.add_argument(
        "--data-dir",
        type=Path,
        default=Path(os.environ.get("ESPER_DATA_DIR") or default_data_dir()),
        help="the platform's directory (default: $ESPER_DATA_DIR or ~/.esper)",
    )
    made.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    made.add_argument("--log-format", choices=("text", "json"), default="text" if sys.stderr.isatty() else "json")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT; returns the exit code."""
    options = parser().parse_args(arguments)
    log.configure("services", json=options.log_format == "json", level=options.log_level)
    try:
        names = chosen(options.names)
        endpoints = read_endpoints(options.data_dir)
        asyncio.run(_until_signal(run(endpoints, names)))
    except EsperError as error:
        print(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)  # noqa: T201
        return error.exit_code
    return 0


async def _until_signal(work: Coroutine[None, None, None]) -> None:
    """Await ``work``; the first SIGTERM or SIGINT cancels it, and it unwinds."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()

    def stop() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    try:
        await task
    except asyncio.CancelledError:
        if not task.cancelled():
            raise


if __name__ == "__main__":
    sys.exit(main())
