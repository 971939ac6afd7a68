"""The services' own process: ``python -m services`` with everything it needs to find the rest."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import esper_core
from esper_core.config import Endpoints
from esper_core.errors import Unavailable
from esper_core.local.child import Child

COMMAND = (sys.executable, "-m", "services")


def child(command: tuple[str, ...], endpoints: Endpoints) -> Child:
    """The process that serves gRPC; it learns where everything is from ``ESPER_DATA_DIR``'s ``endpoints.json``."""
    environment = dict(os.environ)
    environment["ESPER_DATA_DIR"] = str(endpoints.data_dir)
    environment["PYTHONPATH"] = import_path()
    port = endpoints.grpc_address.rpartition(":")[2]
    return Child(
        "services",
        ready=lambda: serving(endpoints),
        command=command,
        environment=environment,
        needs=("nats", "postgres", "s3"),
        port=int(port),
        stop_seconds=12,
    )


def import_path() -> str:
    """``PYTHONPATH`` for a child, with the tree that this package was imported from, installed or not."""
    root = str(Path(esper_core.__file__).resolve().parent.parent)
    return os.pathsep.join(dict.fromkeys((root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))))


async def serving(endpoints: Endpoints) -> None:
    """Ask the gRPC health service, over mutual TLS, as the operator.

    Raises:
        Unavailable: it does not answer, or answers that it does not serve.
    """
    import grpc  # here, so that whoever only wants endpoints does not wait for it
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    stub: Any = health_pb2_grpc.HealthStub  # its wheel carries no types
    tls = endpoints.tls_dir
    ca, key, cert = await asyncio.to_thread(
        lambda: [(tls / name).read_bytes() for name in ("ca.pem", "operator.key", "operator.pem")]
    )
    credentials = grpc.ssl_channel_credentials(ca, key, cert)
    async with grpc.aio.secure_channel(endpoints.grpc_address, credentials) as channel:
        try:
            answer = await stub(channel).Check(health_pb2.HealthCheckRequest(), timeout=3)
        except grpc.aio.AioRpcError as error:
            raise Unavailable(f"the services do not answer: {error.code().name} {error.details()}") from None
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise Unavailable("the services say that they do not serve")
