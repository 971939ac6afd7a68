"""The policy table against the contracts and against a server: principal × method, generated from both; and principal × subject."""

from __future__ import annotations

import importlib
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import MethodOptions
from google.protobuf.descriptor_pool import Default

from esper_core.bus.envelope import check_belongs
from esper_core.bus.subjects import SUBJECTS, Subject
from esper_core.errors import EsperError, Forbidden, Internal, InvalidInput, Unauthenticated, Unavailable
from esper_core.local.certs import provision
from esper_core.local.layout import Layout
from esper_core.pb.esper.bus.v1.bus_pb2 import EventEnvelope
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


OVERTAKEN = "Internal error from Core"
"""The client's own word for a stream that the server refused while it was still being written to; no server says it."""


async def _outcome(channel: Any, method: Method, data: bytes) -> EsperError | None:
    """What a call with ``data`` as its request ends with; asked again where the refusal overtook the request."""
    for _ in range(5):
        outcome = await _once(channel, method, data)
        if not (isinstance(outcome, Internal) and OVERTAKEN in outcome.message and method.streams_in):
            break
    return outcome


async def _once(channel: Any, method: Method, data: bytes) -> EsperError | None:
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
        if _changes(method):
            assert POLICY[method.path] < PRINCIPALS, method.path


def _changes(method: Method) -> bool:
    options = Default().FindMethodByName(method.path.strip("/").replace("/", ".")).GetOptions()
    return bool(options.idempotency_level != MethodOptions.NO_SIDE_EFFECTS)


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
    assert callers("/Retag") == {"operator"}
    assert callers("/Evaluate") == {"operator", "tezzeret"}


def test_who_proposes_does_not_act() -> None:
    """Emrakul and Karn change nothing by themselves: no method that carries something out is theirs."""
    changing = {method.path for method in METHODS if _changes(method)}
    own = {path for path in changing if "EmrakulService" in path or "KarnService" in path}
    may = {
        name: {path for path in changing - own if name in POLICY[path]} for name in ("emrakul", "karn", "nissa", "oona")
    }
    assert not {path for path in may["emrakul"] if not path.startswith("/esper.urza.")}
    assert may["karn"] == {
        "/esper.urza.v1.UrzaService/UploadBlueprint",
        "/esper.tezzeret.v1.TezzeretService/SubmitBuild",
    }
    assert may["nissa"] == may["oona"] == set()


def test_only_urabrask_reaches_the_verdict_and_nobody_else_but_the_operator_a_status() -> None:
    """The operator may only retire; which status is asked for is Urza's to look at, see tests/service/innovation."""
    path = "/esper.urza.v1.UrzaService/UpdateKernelStatus"
    assert POLICY[path] - {"operator"} == {"urabrask"}


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
@pytest.mark.parametrize("principal", sorted(PRINCIPALS))
def test_each_principal_speaks_only_where_the_table_lets_it(subject: Subject, principal: str) -> None:
    """Principal × subject: what an event says of its producer is looked at before anything else acts on it."""
    full = subject.of("run-1") if subject.per_run else subject.of()
    for name in subject.types:
        envelope = EventEnvelope(event_id="e", type=name, schema_version=1, producer=principal)
        if principal in subject.producers:
            check_belongs(envelope, full)
            continue
        with pytest.raises(InvalidInput, match=f"{principal} may not speak on {subject.name}"):
            check_belongs(envelope, full)


def test_what_is_said_on_the_bus_is_as_designed() -> None:
    speakers = {subject.name: subject.producers for subject in SUBJECTS}
    assert all(who and who <= PRINCIPALS for who in speakers.values())
    assert speakers["compilation.kernel.ready"] == {"tezzeret", "urza"}  # the library has what it imported judged here
    assert speakers["control.emrakul.orders"] == {"emrakul"}
    assert speakers["validation.kernel.characterized"] == {"urabrask"}
    assert speakers["control.kasmina.commands"] == {"kasmina", "tamiyo"}
    for fact in (
        "system.events.run",
        "system.events.epoch",
        "system.events.seed",
        "system.events.carve",
        "innovation.field_reports",
    ):
        assert speakers[fact] == {"tolaria"}


@pytest.mark.parametrize("principal", sorted(PRINCIPALS))
async def test_each_principal_gets_exactly_what_the_table_says(platform: tuple[str, Path], principal: str) -> None:
    """With its own certificate, on the wire: every method of every contract, let in or refused by name."""
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
