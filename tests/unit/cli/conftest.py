"""`esperctl` as a function, and a platform that answers by script over the real gRPC edge with real certificates."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pool import Default
from typer.testing import CliRunner, Result

from esper_core.cli.app import app
from esper_core.config import Endpoints
from esper_core.local import certs
from esper_core.local.layout import Layout, write_private
from esper_core.pb.esper.emrakul.v1 import emrakul_pb2_grpc
from esper_core.pb.esper.karn.v1 import karn_pb2_grpc
from esper_core.pb.esper.kasmina.v1 import kasmina_pb2_grpc
from esper_core.pb.esper.nissa.v1 import nissa_pb2_grpc
from esper_core.pb.esper.tamiyo.v1 import tamiyo_pb2_grpc
from esper_core.pb.esper.tezzeret.v1 import tezzeret_pb2_grpc
from esper_core.pb.esper.tolaria.v1 import tolaria_pb2_grpc
from esper_core.pb.esper.urabrask.v1 import urabrask_pb2_grpc
from esper_core.pb.esper.urza.v1 import urza_pb2_grpc
from esper_core.rpc.server import ServedService, serve
from esper_core.rpc.tls import ServerTls

Esperctl = Callable[..., Result]
Answer = Callable[[Any], Any]

_REGISTER = {
    "esper.urza.v1.UrzaService": urza_pb2_grpc.add_UrzaServiceServicer_to_server,
    "esper.tezzeret.v1.TezzeretService": tezzeret_pb2_grpc.add_TezzeretServiceServicer_to_server,
    "esper.urabrask.v1.UrabraskService": urabrask_pb2_grpc.add_UrabraskServiceServicer_to_server,
    "esper.tamiyo.v1.TamiyoService": tamiyo_pb2_grpc.add_TamiyoServiceServicer_to_server,
    "esper.karn.v1.KarnService": karn_pb2_grpc.add_KarnServiceServicer_to_server,
    "esper.kasmina.v1.KasminaService": kasmina_pb2_grpc.add_KasminaServiceServicer_to_server,
    "esper.tolaria.v1.TolariaService": tolaria_pb2_grpc.add_TolariaServiceServicer_to_server,
    "esper.emrakul.v1.EmrakulService": emrakul_pb2_grpc.add_EmrakulServiceServicer_to_server,
    "esper.nissa.v1.NissaService": nissa_pb2_grpc.add_NissaServiceServicer_to_server,
}


class Scripted:
    """Answers by method name; remembers what it was asked.

    An answer is a function of the request that returns a message (for streams: an iterable of messages) or raises.
    """

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.answers: dict[str, Answer] = {}
        self.asked: list[Any] = []

    def on(self, method: str, answer: Answer) -> None:
        self.answers[method] = answer

    def servicer(self, name: str) -> Any:
        methods = {
            method.name: self._stream(method.name) if method.server_streaming else self._unary(method.name)
            for method in Default().FindServiceByName(name).methods
        }
        return type("Servicer", (), methods)()

    def _unary(self, method: str) -> Any:
        async def call(_self: Any, request: Any, _context: Any) -> Any:
            self.asked.append(request)
            return self.answers[method](request)

        return call

    def _stream(self, method: str) -> Any:
        async def call(_self: Any, request: Any, _context: Any) -> AsyncIterator[Any]:
            self.asked.append(request)
            for message in self.answers[method](request):
                yield message

        return call


@pytest.fixture(scope="session")
def platform_thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    """The server, on a loop and a thread of its own, for the whole session."""
    folder = tmp_path_factory.mktemp("platform")
    layout = Layout(folder)
    layout.create()
    certs.provision(layout, "127.0.0.1")
    scripted = Scripted(folder)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def wait(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(20)

    served = [ServedService(name, register, scripted.servicer(name)) for name, register in _REGISTER.items()]
    server = wait(serve(served, host="127.0.0.1", port=0, tls=ServerTls.read(layout.tls)))
    endpoints = Endpoints.model_validate(
        {
            "data_dir": folder, "grpc_address": f"127.0.0.1:{server.port}", "grpc_listen": "127.0.0.1:0",
            "metrics_port": 1, "metrics_url": "http://127.0.0.1:1", "nats_url": "nats://127.0.0.1:1",
            "postgres_dsn": "postgresql://x", "s3_endpoint": "http://127.0.0.1:1", "s3_region": "x", "s3_bucket": "x",
            "s3_access_key": "x", "s3_secret_key": "x", "tls_dir": layout.tls, "keys_dir": layout.keys,
        }
    )  # fmt: skip
    shown = endpoints.model_dump(mode="json") | {"postgres_dsn": "postgresql://x", "s3_secret_key": "x"}
    write_private(layout.endpoints, Endpoints.model_validate(shown).model_dump_json().encode())
    yield scripted
    wait(server.stop(0))
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@pytest.fixture
def platform(platform_thread: Scripted, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    """The scripted platform, with nothing in its script, as the one that `esperctl` finds."""
    platform_thread.answers.clear()
    platform_thread.asked.clear()
    monkeypatch.setenv("ESPER_DATA_DIR", str(platform_thread.data_dir))
    return platform_thread


@pytest.fixture
def esperctl() -> Esperctl:
    """Runs the command line in this process."""

    def call(*arguments: str) -> Result:
        return CliRunner().invoke(app, list(arguments))

    return call


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Arguments that the process would have been replaced with."""
    monkeypatch.delenv("ESPER_DATA_DIR", raising=False)
    calls: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda path, arguments, environment: calls.append([path, *arguments]))
    return calls
