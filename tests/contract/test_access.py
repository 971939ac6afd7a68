"""The policy table against the contracts and against a server: principal × method, generated from both."""

from __future__ import annotations

import importlib
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import MethodOptions
from google.protobuf.descriptor_pool import Default

from esper_core.errors import EsperError, Forbidden, Internal, Unauthenticated, Unavailable
from esper_core.local.certs import provision
from esper_core.local.layout import Layout
from esper_core.rpc.client import open_channel
from esper_core.rpc.contract import Method, methods
from esper_core.rpc.policy import POLICY, PRINCIPALS
from esper_core.rpc.server import ServedService, serve
from esper_core.rpc.tls import ServerTls

METHODS = list(methods().values())
SERVICES = sorted({method.service for method in METHODS})


def _module(service: str, kind: str) -> Any:
    package = service.rpartition(".")[0]
    name = package.split(".")[1]
    return importlib.import_module(f"esper_core.pb.{package}.{name}_{kind}")


def _served(service: str) -> ServedService:
    """The service with every method written, each answering nothing."""
    name = service.rpartition(".")[2]
    stubs = _module(service, "pb2_grpc")
    messages = _module(service, "pb2")

    def unary(method: Method) -> Any:
        async def answer(self: Any, request: Any, context: Any) -> Any:
            if method.streams_in:
                async for _ in request:
                    pass
            return getattr(messages, f"{method.name}Response")()

        return answer

    async def streaming(self: Any, request: Any, context: Any) -> Any:
        for nothing in ():
            yield nothing

    body = {
        method.name: streaming if method.streams_out else unary(method)
        for method in METHODS
        if method.service == service
    }
    servicer = type(name, (getattr(stubs, f"{name}Servicer"),), body)()
    return ServedService(service, getattr(stubs, f"add_{name}Servicer_to_server"), servicer)


@pytest.fixture(scope="module")
async def platform(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[str, Path]]:
    """Address and certificates of a server with every service."""
    layout = Layout(tmp_path_factory.mktemp("platform"))
    layout.create()
    provision(layout, "127.0.0.1")
    served = [_served(service) for service in SERVICES]
    server = await serve(served, host="127.0.0.1", port=0, tls=ServerTls.read(layout.tls))
    yield f"127.0.0.1:{server.port}", layout.tls
    await server.stop(0)


async def _outcome(channel: Any, method: Method, data: bytes) -> EsperError | None:
    """What a call with ``data`` as its request ends with."""

    async def requests() -> AsyncIterator[bytes]:
        yield data

    kind = f"{'stream' if method.streams_in else 'unary'}_{'stream' if method.streams_out else 'unary'}"
    call = getattr(channel, kind)(method.path)(requests() if method.streams_in else data, timeout=10)
    try:
        if method.streams_out:
            async for _ in call:
                pass
        else:
            await call
    except EsperError as error:
        return error
    return None


def test_the_table_lists_exactly_the_methods_of_the_contracts() -> None:
    assert {path for path in POLICY if path.startswith("/esper.")} == set(methods())


def test_every_method_of_the_contracts_belongs_to_a_service_with_stubs() -> None:
    for service in SERVICES:
        _module(service, "pb2_grpc")
        described = {method.name for method in Default().FindServiceByName(service).methods}
        assert described == {method.name for method in METHODS if method.service == service}


def test_whatever_changes_something_is_not_open_to_all() -> None:
    for method in METHODS:
        options = Default().FindMethodByName(method.path.strip("/").replace("/", ".")).GetOptions()
        if options.idempotency_level != MethodOptions.NO_SIDE_EFFECTS:
            assert POLICY[method.path] < PRINCIPALS, method.path


def test_the_write_authority_is_as_designed() -> None:
    def callers(end: str) -> frozenset[str]:
        return next(who for path, who in POLICY.items() if path.endswith(end))

    assert callers("/UploadBlueprint") == {"karn", "operator"}
    assert callers("/UploadKernel") == {"tezzeret"}
    assert callers("/UpdateKernelStatus") == {"urabrask", "operator"}
    assert callers("/Step") == {"tolaria"}
    for command in ("/Germinate", "/Transition", "/LoadKernel", "/UnloadKernel"):
        assert callers(f"KasminaService{command}") == {"tamiyo", "operator"}
    for publish in ("/LoadPolicy", "/UpdatePolicy"):
        assert callers(publish) == {"simic", "operator"}


@pytest.mark.parametrize("principal", sorted(PRINCIPALS))
async def test_each_principal_gets_exactly_what_the_table_says(platform: tuple[str, Path], principal: str) -> None:
    address, tls_dir = platform
    async with open_channel(address, tls_dir=tls_dir, principal=principal) as channel:
        for method in METHODS:
            outcome = await _outcome(channel, method, b"")
            if principal in POLICY[method.path]:
                assert not isinstance(outcome, Forbidden | Unauthenticated | Unavailable), (method.path, outcome)
            else:
                assert isinstance(outcome, Forbidden), (method.path, outcome)
                assert principal in outcome.message


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.path)
async def test_random_bytes_are_refused_or_answered_but_never_an_incident(
    platform: tuple[str, Path], method: Method
) -> None:
    address, tls_dir = platform
    chance = random.Random(method.path)
    async with open_channel(address, tls_dir=tls_dir, principal=min(POLICY[method.path])) as channel:
        for _ in range(25):
            outcome = await _outcome(channel, method, chance.randbytes(chance.choice((1, 3, 12, 60, 400))))
            assert not isinstance(outcome, Internal | Unavailable), (method.path, outcome)
