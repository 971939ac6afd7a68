"""A stand-in program for `python -m services` in tests of the stack: real mutual TLS, real gRPC health, nothing else.

It starts a sleeping child of its own, as a forge would, and notes both process ids.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from esper_core.config import read_endpoints


async def main() -> None:
    endpoints = read_endpoints(Path(os.environ["ESPER_DATA_DIR"]))
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # noqa: ASYNC220 - at start only
    (endpoints.data_dir / "helper.pid").write_text(str(helper.pid))
    tls = endpoints.tls_dir
    server = grpc.aio.server()
    servicer = health.aio.HealthServicer()
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    credentials = grpc.ssl_server_credentials(
        [((tls / "server.key").read_bytes(), (tls / "server.pem").read_bytes())],
        (tls / "ca.pem").read_bytes(),
        require_client_auth=True,
    )
    server.add_secure_port(endpoints.grpc_listen, credentials)
    await server.start()
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    await told.wait()
    await server.stop(1)


asyncio.run(main())
