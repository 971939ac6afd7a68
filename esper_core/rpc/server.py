"""Listen: one place where a servicer gets its identity checks, validation, deadlines, error mapping, health and
reflection.

Only mutual TLS is spoken, on loopback too: without certificates there is no server. One event loop per process, and no
fork beside it (children are spawned). Does not limit how often one principal calls, only how many calls run at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf import descriptor_pool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.reflection import SERVICE_NAME as REFLECTION
from grpc_reflection.v1alpha.reflection import enable_server_reflection
from prometheus_client import CollectorRegistry

from esper_core import log
from esper_core.errors import Internal, InvalidInput, Unavailable
from esper_core.rpc.contract import MAX_MESSAGE
from esper_core.rpc.layers import Layer, authenticated, explained, layered, observed, punctual, validated
from esper_core.rpc.policy import POLICY
from esper_core.rpc.tls import ServerTls

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", MAX_MESSAGE),
    ("grpc.so_reuseport", 0),  # a taken port is refused, not shared
    ("grpc.keepalive_time_ms", 30_000),  # a peer that is gone without a word is noticed
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)
_STATUS = health_pb2.HealthCheckResponse
_log = log.get("rpc")


@dataclass(frozen=True)
class ServedService:
    """A servicer and how gRPC gets to know it.

    Attributes:
        name: full name, e.g. ``esper.urza.v1.UrzaService``.
        register: the generated ``add_UrzaServiceServicer_to_server``.
        servicer: methods are ``async def``; those that stream out are async generators.
    """

    name: str
    register: Callable[[Any, grpc.aio.Server], None]
    servicer: Any


class RunningServer:
    """A server that listens; made by ``serve``.

    Attributes:
        port: the bound port.
    """

    def __init__(self, server: grpc.aio.Server, checks: Any, names: tuple[str, ...], port: int):
        self.port = port
        self._server, self._checks, self._names = server, checks, names
        self._announcing: set[asyncio.Task[None]] = set()

    def set_serving(self, serving: bool) -> None:
        """Tell whoever checks health; calls are answered either way. In force after the loop's next turn."""
        task = asyncio.get_running_loop().create_task(self._announce(serving))
        self._announcing.add(task)
        task.add_done_callback(self._announcing.discard)

    async def stop(self, grace: float) -> None:
        """Say NOT_SERVING, take no new calls, give running ones ``grace`` seconds, then cancel them."""
        await self._checks.enter_graceful_shutdown()
        await self._server.stop(grace)
        _log.info("stopped", port=self.port)

    async def _announce(self, serving: bool) -> None:
        for name in ("", *self._names):
            await self._checks.set(name, _STATUS.SERVING if serving else _STATUS.NOT_SERVING)


async def serve(
    served: Iterable[ServedService],
    *,
    host: str,
    port: int,
    tls: ServerTls | None,
    policy: Mapping[str, frozenset[str]] = POLICY,
    max_concurrent: int = 256,
    deadline: float = 30.0,
    idle: float = 30.0,
    metrics: CollectorRegistry | None = None,
    away: tuple[type[Exception], ...] = (),
) -> RunningServer:
    """Listen on ``host``:``port`` (0: any free port) and report SERVING.

    Args:
        served: what to serve, beside health and reflection.
        tls: without it nothing is served anywhere.
        policy: full method path to the principals that may call it.
        max_concurrent: calls at once, streams included; more are refused with RESOURCE_EXHAUSTED.
        deadline: seconds that a call without streams may take at most.
        idle: seconds that a stream may stand still because of the client.
        metrics: registry that counts and times the calls; one server per registry.
        away: what servicers raise while a server that they stand on is away; told as UNAVAILABLE.

    Raises:
        InvalidInput: no certificates, or they are not what they should be.
        Internal: a served method is missing from the policy, or its service is unknown.
        Unavailable: the address cannot be bound.
    """
    if tls is None:
        raise InvalidInput(
            f"refusing to listen on {host}:{port} without TLS", hint="`esperctl up` makes certificates under tls/"
        )
    served = tuple(served)
    names = tuple(service.name for service in served)
    _listed((*names, health.SERVICE_NAME, REFLECTION), policy)
    layers: tuple[Layer, ...] = (
        observed(metrics),
        explained(away),
        authenticated(policy),
        punctual(deadline, idle),
        validated,
    )
    server = grpc.aio.server(
        interceptors=(_Interceptor(layers, idle),), options=_OPTIONS, maximum_concurrent_rpcs=max_concurrent
    )
    for service in served:
        service.register(service.servicer, server)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)  # type: ignore[no-untyped-call]
    enable_server_reflection((*names, health.SERVICE_NAME, REFLECTION), server)  # type: ignore[no-untyped-call]
    bound = _bind(server, f"[{host}]:{port}" if ":" in host else f"{host}:{port}", tls)
    running = RunningServer(server, checks, names, bound)
    await server.start()
    running.set_serving(True)
    _log.info("listening", host=host, port=bound, services=names)
    return running


def _listed(names: Iterable[str], policy: Mapping[str, frozenset[str]]) -> None:
    """Refuse to serve a method that nobody has decided about."""
    for name in names:
        try:
            service = descriptor_pool.Default().FindServiceByName(name)
        except KeyError:
            raise Internal(f"no contract describes {name}", hint="import its stubs; run `make proto`") from None
        missing = [method.name for method in service.methods if f"/{name}/{method.name}" not in policy]
        if missing:
            raise Internal(
                f"the policy says nothing of {name}: {', '.join(missing)}", hint="list it in esper_core/rpc/policy.py"
            )


def _bind(server: grpc.aio.Server, address: str, tls: ServerTls) -> int:
    try:
        return server.add_secure_port(address, tls.credentials())
    except RuntimeError as error:
        raise Unavailable(
            f"{address} cannot be bound ({error})", hint="does another platform run there? `esperctl status`"
        ) from None


class _Interceptor(grpc.aio.ServerInterceptor):
    """Puts every handler behind the layers, once."""

    def __init__(self, layers: tuple[Layer, ...], idle: float) -> None:
        self._layers, self._idle = layers, idle
        self._known: dict[str, Any] = {}

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        if details.method not in self._known:
            handler = await continuation(details)
            if handler is None:
                return None  # gRPC answers UNIMPLEMENTED
            self._known[details.method] = layered(handler, details.method, self._layers, self._idle)
        return self._known[details.method]
