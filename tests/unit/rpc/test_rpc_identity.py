"""Who gets in, as whom, and what the server refuses to start with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import CollectorRegistry

from esper_core import errors, telemetry
from esper_core.pb.esper.urza.v1 import urza_pb2, urza_pb2_grpc
from esper_core.rpc import auth, contract
from esper_core.rpc.policy import POLICY, PRINCIPALS
from esper_core.rpc.server import ServedService, serve
from esper_core.rpc.tls import ServerTls

LIST = urza_pb2.ListBlueprintsRequest()


@pytest.mark.parametrize("principal", sorted(PRINCIPALS))
async def test_the_servicer_learns_who_calls(site: Any, principal: str) -> None:
    response = await (await (await site()).stub(principal)).ListBlueprints(LIST)
    assert response.next_page_token.split()[0] == principal


async def test_outside_a_call_there_is_no_principal() -> None:
    with pytest.raises(errors.Unauthenticated):
        auth.principal()


async def test_the_trace_goes_along(site: Any) -> None:
    stub = await (await site()).stub()
    with telemetry.use() as traceparent:
        response = await stub.ListBlueprints(LIST)
    assert response.next_page_token.split()[1] == traceparent


async def test_a_malformed_trace_is_replaced(site: Any) -> None:
    here = await site()
    raw = grpc.aio.secure_channel(here.address, _credentials(here.tls_dir, "operator"))
    async with raw as channel:
        response = await urza_pb2_grpc.UrzaServiceStub(channel).ListBlueprints(
            LIST, metadata=(("traceparent", "00-evil"),)
        )
    assert telemetry.trace_id(response.next_page_token.split()[1])


async def test_clients_without_a_certificate_of_ours_are_refused(
    site: Any, foreign_tls_dir: Path, tmp_path: Path
) -> None:
    here = await site()
    authority = (here.tls_dir / "ca.pem").read_bytes()
    mixed = tmp_path / "mixed"
    shutil.copytree(foreign_tls_dir, mixed)
    shutil.copy(here.tls_dir / "ca.pem", mixed / "ca.pem")
    for credentials in (
        grpc.ssl_channel_credentials(authority),  # nobody
        _credentials(mixed, "operator"),  # somebody else's operator
        _credentials(here.tls_dir, "server"),  # the server's certificate may only listen
    ):
        async with grpc.aio.secure_channel(here.address, credentials) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await urza_pb2_grpc.UrzaServiceStub(channel).ListBlueprints(LIST, timeout=5)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    async with grpc.aio.insecure_channel(here.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await urza_pb2_grpc.UrzaServiceStub(channel).ListBlueprints(LIST, timeout=5)
    await (await here.stub()).ListBlueprints(LIST)


async def test_a_server_of_another_authority_is_not_believed(site: Any, foreign_tls_dir: Path) -> None:
    channel = await (await site()).channel(tls_dir=foreign_tls_dir)
    with pytest.raises(errors.Unavailable):
        await urza_pb2_grpc.UrzaServiceStub(channel).ListBlueprints(LIST)


def _credentials(tls_dir: Path, name: str) -> grpc.ChannelCredentials:
    authority, key, certificate = ((tls_dir / file).read_bytes() for file in ("ca.pem", f"{name}.key", f"{name}.pem"))
    return grpc.ssl_channel_credentials(authority, key, certificate)


@pytest.mark.parametrize(
    "names",
    [
        [],
        [b""],
        [b"spiffe://esper/"],
        [b"spiffe://esper/nobody"],
        [b"spiffe://elsewhere/operator"],
        [b"spiffe://esper/operator/x"],
        [b"operator"],
        [b"spiffe://esper/spiffe://esper/operator"],
        [b"spiffe://esper/operator", b"spiffe://esper/tolaria"],
        [b"\xff"],
    ],
)
def test_only_one_known_name_of_ours_is_an_identity(names: list[bytes]) -> None:
    with pytest.raises(errors.Unauthenticated):
        auth.identify({"peer_spiffe_id": names})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "127.0.0.1", "example.org"])  # noqa: S104
async def test_nothing_listens_without_tls(host: str) -> None:
    with pytest.raises(errors.InvalidInput, match="without TLS") as caught:
        await serve([], host=host, port=0, tls=None)
    assert "esperctl up" in caught.value.hint


async def test_a_method_missing_from_the_policy_stops_the_start(tls_dir: Path) -> None:
    served = ServedService("esper.urza.v1.UrzaService", urza_pb2_grpc.add_UrzaServiceServicer_to_server, object())
    policy = {path: who for path, who in POLICY.items() if not path.endswith("UrzaService/GetKernel")}
    with pytest.raises(errors.Internal, match="GetKernel"):
        await serve([served], host="127.0.0.1", port=0, tls=ServerTls.read(tls_dir), policy=policy)


async def test_a_service_that_no_contract_describes_stops_the_start(tls_dir: Path) -> None:
    served = ServedService("esper.none.v1.None", lambda servicer, server: None, object())
    with pytest.raises(errors.Internal, match=r"esper\.none"):
        await serve([served], host="127.0.0.1", port=0, tls=ServerTls.read(tls_dir))


async def test_a_taken_port_is_refused(site: Any, tls_dir: Path) -> None:
    here = await site()
    with pytest.raises(errors.Unavailable, match="cannot be bound"):
        await serve([], host="127.0.0.1", port=here.server.port, tls=ServerTls.read(tls_dir))


def test_missing_certificates_say_where_they_come_from(tmp_path: Path) -> None:
    with pytest.raises(errors.NotFound, match=r"ca\.pem") as caught:
        ServerTls.read(tmp_path)
    assert "esperctl up" in caught.value.hint


def test_a_key_is_not_shown(tls_dir: Path) -> None:
    assert "PRIVATE" not in repr(ServerTls.read(tls_dir))


async def test_calls_are_counted_by_method_and_outcome(site: Any) -> None:
    registry = CollectorRegistry()
    here = await site(metrics=registry)
    stub = await here.stub()
    await stub.ListBlueprints(LIST)
    for _ in range(2):
        with pytest.raises(errors.Forbidden):
            await stub.UploadKernel(iter([]))
    await here.server.stop(1)
    counted = {
        (sample.labels["method"].rpartition("/")[2], sample.labels["code"]): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name == "esper_rpc_seconds_count"
    }
    assert counted == {("ListBlueprints", "OK"): 1, ("UploadKernel", "PERMISSION_DENIED"): 2}


async def test_reflection_lists_what_is_served(site: Any) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(await (await site()).channel("nissa"))

    async def ask() -> Any:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    found = [response async for response in stub.ServerReflectionInfo(ask())]
    names = {service.name for service in found[0].list_services_response.service}
    assert names == {
        "esper.urza.v1.UrzaService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


def test_retries_follow_from_the_contracts() -> None:
    paths = contract.methods()
    assert paths["/esper.urza.v1.UrzaService/StreamKernel"].streams_out
    assert paths["/esper.urza.v1.UrzaService/UploadKernel"].streams_in
    for method in paths.values():
        assert (f'"method": "{method.name}"' in contract.service_config()) == method.repeatable
