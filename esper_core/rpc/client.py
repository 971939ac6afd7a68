"""Dial: a channel that proves who we are, waits no longer than it should, retries what may be repeated, carries the
trace, and raises the server's own errors.

A channel dials lazily and reconnects by itself; it belongs to the event loop it was opened on.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Generator
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import grpc.aio

from esper_core import telemetry
from esper_core.rpc import contract
from esper_core.rpc.status import from_call
from esper_core.rpc.tls import client_credentials

DEADLINE = 10.0
"""Seconds that a call without streams may take unless the caller says otherwise."""


def open_channel(address: str, *, tls_dir: Path, principal: str) -> grpc.aio.Channel:
    """A channel to ``address`` (host:port) as ``principal``; calls raise ``EsperError``.

    Nothing is dialled yet. Calls without streams end after ``DEADLINE`` seconds unless given a ``timeout``; streams run
    until either side ends them.

    Raises:
        NotFound: the principal's certificate is not under ``tls_dir``.
    """
    options = (
        ("grpc.max_receive_message_length", contract.MAX_MESSAGE),
        ("grpc.max_send_message_length", contract.MAX_MESSAGE),
        ("grpc.service_config", contract.service_config()),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.max_reconnect_backoff_ms", 5_000),
        ("grpc.keepalive_time_ms", 30_000),  # a platform that is gone without a word is noticed
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.enable_http_proxy", 0),
    )
    return Channel(grpc.aio.secure_channel(address, client_credentials(tls_dir, principal), options=options))


class Channel(grpc.aio.Channel):
    """A ``grpc.aio.Channel`` whose calls raise our errors."""

    def __init__(self, inner: grpc.aio.Channel) -> None:
        self._inner = inner

    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return _Callable(self._inner.unary_unary(method, *args, **kwargs), method, DEADLINE)

    def unary_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return _Callable(self._inner.unary_stream(method, *args, **kwargs), method)

    def stream_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return _Callable(self._inner.stream_unary(method, *args, **kwargs), method)

    def stream_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return _Callable(self._inner.stream_stream(method, *args, **kwargs), method)

    async def close(self, grace: float | None = None) -> None:
        await self._inner.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._inner.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._inner.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._inner.channel_ready()

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        await self.close()


class _Callable:
    """A method that can be called."""

    def __init__(self, inner: Any, method: str, deadline: float | None = None) -> None:
        self._inner, self._method, self._deadline = inner, method, deadline

    def __call__(self, *request: Any, timeout: float | None = None, metadata: Any = (), **options: Any) -> _Call:
        trace = (telemetry.HEADER, telemetry.current() or telemetry.new())
        limit = self._deadline if timeout is None else timeout
        return _Call(self._inner(*request, timeout=limit, metadata=(*(metadata or ()), trace), **options), self._method)


class _Call:
    """A call under way; awaited, iterated, read or written it raises our errors. The rest is gRPC's own."""

    def __init__(self, inner: Any, method: str) -> None:
        self._inner, self._method = inner, method

    def __await__(self) -> Generator[Any, None, Any]:
        with self._explained():
            return (yield from self._inner.__await__())

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            with self._explained():
                async for response in self._inner:
                    yield response
        finally:
            self._inner.cancel()  # no more than a formality when the stream has ended

    async def read(self) -> Any:
        with self._explained():
            return await self._inner.read()

    async def write(self, request: Any) -> None:
        with self._explained():
            await self._inner.write(request)

    async def done_writing(self) -> None:
        with self._explained():
            await self._inner.done_writing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @contextlib.contextmanager
    def _explained(self) -> Generator[None, None, None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise from_call(error, self._method) from None
