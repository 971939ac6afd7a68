"""A real server with mutual TLS on a free loopback port, whose servicer does what the request's name says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from esper_core import errors, telemetry
from esper_core.local.certs import provision
from esper_core.local.layout import Layout
from esper_core.pb.esper.urza.v1 import urza_pb2, urza_pb2_grpc
from esper_core.rpc import auth
from esper_core.rpc.client import open_channel
from esper_core.rpc.server import RunningServer, ServedService, serve
from esper_core.rpc.tls import ServerTls

KERNEL = "kernel-" + "0" * 64
SECRET = "the vault opens at 4711"


class Urza(urza_pb2_grpc.UrzaServiceServicer):
    """GetKernel obeys its request's kernel_id; the others tell what they saw."""

    def __init__(self) -> None:
        self.running = 0
        self.attempts = 0
        self.cancelled = asyncio.Event()
        self.release = asyncio.Event()
        self.changed = asyncio.Condition()

    async def GetKernel(self, request: Any, context: Any) -> Any:
        word, _, rest = request.kernel_id.partition(":")
        return await getattr(self, f"_{word}")(rest)

    async def ListBlueprints(self, request: Any, context: Any) -> Any:
        return urza_pb2.ListBlueprintsResponse(next_page_token=f"{auth.principal()} {telemetry.current()}")

    async def UploadKernel(self, requests: Any, context: Any) -> Any:
        count = 0
        async for _ in requests:
            count += 1
        return urza_pb2.UploadKernelResponse(kernel_id=str(count))

    async def StreamKernel(self, request: Any, context: Any) -> Any:
        try:
            for offset in range(min(request.offset, 3)):
                yield urza_pb2.StreamKernelResponse(chunk=urza_pb2.KernelChunk(offset=offset))
            if request.offset == 3:
                raise errors.Corrupt("the blob is damaged", hint="fetch it again")
            while request.offset > 3:
                yield urza_pb2.StreamKernelResponse(chunk=urza_pb2.KernelChunk(data=bytes(100_000)))
                await asyncio.sleep(0.001)
        finally:
            self.cancelled.set()

    async def _raise(self, name: str) -> Any:
        raise getattr(errors, name)(f"{name} happened to ünïcode", hint=f"do something about {name}")

    async def _long(self, size: str) -> Any:
        raise errors.NotFound("ß" * int(size), hint="ä" * int(size))

    async def _boom(self, _: str) -> Any:
        raise RuntimeError(SECRET)

    async def _flaky(self, times: str) -> Any:
        self.attempts += 1
        if self.attempts <= int(times):
            raise errors.Unavailable("not yet")
        return urza_pb2.GetKernelResponse()

    async def _hold(self, _: str) -> Any:
        async with self.changed:
            self.running += 1
            self.changed.notify_all()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.running -= 1
        return urza_pb2.GetKernelResponse()

    async def _big(self, size: str) -> Any:
        response = urza_pb2.GetKernelResponse()
        response.kernel.reason = "x" * int(size)
        return response


class Site:
    """A server, its servicer and channels to it."""

    def __init__(self, server: RunningServer, urza: Urza, tls_dir: Path, stack: AsyncExitStack) -> None:
        self.server, self.urza, self.tls_dir, self._stack = server, urza, tls_dir, stack
        self.address = f"127.0.0.1:{server.port}"

    async def channel(self, principal: str = "operator", tls_dir: Path | None = None) -> grpc.aio.Channel:
        channel = open_channel(self.address, tls_dir=tls_dir or self.tls_dir, principal=principal)
        return await self._stack.enter_async_context(channel)

    async def stub(self, principal: str = "operator") -> Any:
        return urza_pb2_grpc.UrzaServiceStub(await self.channel(principal))


@pytest.fixture(scope="session")
def tls_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of a platform of our own."""
    return _certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="session")
def foreign_tls_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of somebody else's platform."""
    return _certificates(tmp_path_factory.mktemp("foreign"))


def _certificates(folder: Path) -> Path:
    layout = Layout(folder)
    layout.create()
    provision(layout, "127.0.0.1")
    return layout.tls


@pytest.fixture
async def site(tls_dir: Path) -> AsyncIterator[Callable[..., Awaitable[Site]]]:
    """Starts a server: ``await site(deadline=1.0)``; stopped afterwards."""
    async with AsyncExitStack() as stack:

        async def start(**limits: Any) -> Site:
            urza = Urza()
            served = ServedService("esper.urza.v1.UrzaService", urza_pb2_grpc.add_UrzaServiceServicer_to_server, urza)
            server = await serve([served], host="127.0.0.1", port=0, tls=ServerTls.read(tls_dir), **limits)
            stack.push_async_callback(server.stop, 0)
            return Site(server, urza, tls_dir, stack)

        yield start
