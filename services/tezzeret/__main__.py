"""``python -m services.tezzeret``: one more forge beside those of the platform, on this machine or another.

It listens on nothing: it takes builds from the platform's database, reads and stores by way of Urza over mutual TLS, and
signs with the forge's key. Any number may run; no two of them work on one build. It gives way to whatever else computes on
its machine (``services.pace``) unless ``ESPER_FORGE_POLITE=0``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from esper_core import log
from esper_core.config import Endpoints, default_data_dir, read_endpoints
from esper_core.errors import EsperError
from esper_core.pb.esper.urza.v1 import urza_pb2_grpc
from esper_core.rpc.client import open_channel
from esper_core.store.postgres import open_pool
from services.bell import Bell
from services.composition import supervise
from services.tezzeret import builds
from services.tezzeret.designs import Designs
from services.tezzeret.worker import POLITE, PRINCIPAL, Worker

POOL_SIZE = 4


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m services.tezzeret", description="One more forge for a platform.")
    made.add_argument(
        "--data-dir",
        type=Path,
        default=Path(os.environ.get("ESPER_DATA_DIR") or default_data_dir()),
        help="the platform's directory (default: $ESPER_DATA_DIR or ~/.esper)",
    )
    made.add_argument(
        "--lease-seconds",
        type=float,
        default=builds.LEASE_SECONDS,
        help="how long others wait for a silent forge before they take up its build (default: %(default)g)",
    )
    made.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    return made


async def forge(endpoints: Endpoints, lease_seconds: float) -> None:
    """Work until SIGTERM or SIGINT.

    Raises:
        EsperError: it cannot start.
    """
    draining = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, draining.set)
    database = await open_pool(endpoints.postgres_dsn.get_secret_value(), size=POOL_SIZE)
    channel = open_channel(endpoints.grpc_address, tls_dir=endpoints.tls_dir, principal=PRINCIPAL)
    bell = Bell(database, draining)
    urza = urza_pb2_grpc.UrzaServiceStub(channel)  # type: ignore[no-untyped-call]
    key = endpoints.keys_dir / f"{PRINCIPAL}.key"
    worker = Worker(
        database, bell, urza, Designs(urza), key, lease_seconds=lease_seconds, polite=os.environ.get(POLITE) != "0"
    )
    tasks = [asyncio.create_task(supervise(*each, draining)) for each in (("bell", bell.listen), ("forge", worker.run))]
    await draining.wait()
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await channel.close()
    await database.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Forge until told to stop; returns the exit code."""
    options = parser().parse_args(arguments)
    log.configure("tezzeret", json=not sys.stderr.isatty(), level=options.log_level)
    try:
        asyncio.run(forge(read_endpoints(options.data_dir), options.lease_seconds))
    except EsperError as error:
        print(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)  # noqa: T201
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
