"""What every served call passes through, one function per concern; ``server`` puts them in order.

A layer gets the call, the request (or the iterator of requests) and ``proceed``, the rest of the way. It may refuse by
raising an ``EsperError``, hand on another request, or time what follows; the answer of a call that streams out is
``None``, its messages are written on the way. Requests arrive as bytes and become messages only after the caller has
been let in.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import protovalidate
from google.protobuf.message import DecodeError, Message
from prometheus_client import CollectorRegistry, Histogram

from esper_core import log, telemetry
from esper_core.errors import DeadlineExceeded, EsperError, Internal, InvalidInput, Unavailable, Unsupported
from esper_core.ids import new_id
from esper_core.rpc import auth
from esper_core.rpc.status import to_status

HEAR_OUT_SECONDS = 1.0
_MAX_FAULTS = 8
_log = log.get("rpc")


@dataclass(frozen=True)
class Call:
    """A call on its way in.

    Attributes:
        method: full path.
        context: gRPC's.
        decode: bytes to the method's request message.
        streams_in: whether the client sends a stream.
        streams_out: whether the server does.
    """

    method: str
    context: Any
    decode: Callable[[bytes], Any]
    streams_in: bool
    streams_out: bool


Proceed = Callable[[Any], Awaitable[Any]]
Layer = Callable[[Call, Any, Proceed], Awaitable[Any]]


def observed(registry: CollectorRegistry | None) -> Layer:
    """Put the work under the caller's trace, and time it.

    Args:
        registry: where ``esper_rpc_seconds`` (by method and code) is kept; ``None``: only the log is told.
    """
    labels = ("method", "code")
    times = Histogram("esper_rpc_seconds", "Time to serve a call.", labels, registry=registry) if registry else None

    async def layer(call: Call, request: Any, proceed: Proceed) -> Any:
        header = dict(call.context.invocation_metadata() or ()).get(telemetry.HEADER, "")
        started, code = time.monotonic(), "OK"
        with telemetry.use(header if isinstance(header, str) else ""):
            try:
                return await proceed(request)
            except asyncio.CancelledError:
                code = "CANCELLED"
                raise
            except grpc.aio.AbortError:
                code = call.context.code().name
                raise
            finally:
                seconds = time.monotonic() - started
                if times:
                    times.labels(call.method, code).observe(seconds)
                _log.debug("served", method=call.method, code=code, seconds=round(seconds, 6))

    return layer


def explained(away: tuple[type[Exception], ...]) -> Layer:
    """Turn errors into statuses; what nobody expected becomes an incident whose text stays in the log.

    Args:
        away: what it looks like when a server that this one stands on is away; the caller may try again.
    """

    async def layer(call: Call, request: Any, proceed: Proceed) -> Any:
        try:
            return await proceed(request)
        except grpc.aio.AbortError:
            raise
        except EsperError as error:
            status = to_status(error, _incident(call, error) if isinstance(error, Internal) else "")
        except away as error:
            _log.warning("away", method=call.method, error=f"{type(error).__name__}: {error}")
            told = Unavailable("a part of the platform is away", hint="try again; `esperctl status` shows which")
            status = to_status(told)
        except Exception as error:  # noqa: BLE001 - the boundary: its text must not reach the caller, nor the server die
            incident = _incident(call, error)
            unknown = Internal("an internal error", hint=f"the log explains incident {incident}")
            status = to_status(unknown, incident)
        if call.streams_in:
            await _hear_out(request)
        return await call.context.abort_with_status(status)

    return layer


async def _hear_out(requests: AsyncIterator[bytes]) -> None:
    """Take what a client still sends, for a moment: one whose send fails before the status is there never gets to see that status."""
    with contextlib.suppress(Exception):  # it may be gone, or have nothing more to say
        async with asyncio.timeout(HEAR_OUT_SECONDS):
            async for _ in requests:
                pass


def _incident(call: Call, error: Exception) -> str:
    incident = new_id()
    _log.error("incident", incident_id=incident, method=call.method, exc_info=error)
    return incident


def authenticated(policy: Mapping[str, frozenset[str]]) -> Layer:
    """Let in whom ``policy`` lists for the method."""

    async def layer(call: Call, request: Any, proceed: Proceed) -> Any:
        auth.authorize(auth.identify(call.context.auth_context()), call.method, policy)
        return await proceed(request)

    return layer


def punctual(deadline: float, idle: float) -> Layer:
    """End what takes too long.

    Args:
        deadline: seconds that a call without streams may take, whatever the client allows.
        idle: seconds that a client may pause between two messages of its stream.
    """

    async def layer(call: Call, request: Any, proceed: Proceed) -> Any:
        if call.streams_in:
            return await proceed(_impatient(request, idle))
        if call.streams_out:
            return await proceed(request)
        try:
            async with asyncio.timeout(deadline) as limit:
                return await proceed(request)
        except TimeoutError:
            if limit.expired():
                raise DeadlineExceeded(
                    f"{call.method} took longer than the server's {deadline:g} s", hint="ask for less at once"
                ) from None
            raise

    return layer


async def _impatient(requests: AsyncIterator[Any], idle: float) -> AsyncIterator[Any]:
    iterator = aiter(requests)
    while True:
        try:
            async with asyncio.timeout(idle):
                request = await anext(iterator)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise DeadlineExceeded(f"no message came for {idle:g} s", hint="send without long pauses") from None
        yield request


async def validated(call: Call, request: Any, proceed: Proceed) -> Any:
    """Decode what came and hold it against the contract's rules."""
    if call.streams_in:
        return await proceed(_checked_stream(call, request))
    return await proceed(_checked(call, request))


async def _checked_stream(call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _checked(call, request)


def _checked(call: Call, data: bytes) -> Any:
    try:
        message = call.decode(data)
    except DecodeError:
        raise InvalidInput(f"the request is no message of {call.method}", hint="compare the protos' versions") from None
    check(message)
    return message


def check(message: Message) -> None:
    """Hold ``message`` against its contract's rules.

    Raises:
        InvalidInput: says which fields break which rules; never shows their values.
    """
    violations = protovalidate.collect_violations(message)
    if violations:
        faults = [
            f"{_path(violation.proto.field)}: {violation.proto.message}" for violation in violations[:_MAX_FAULTS]
        ]
        more = len(violations) - len(faults)
        raise InvalidInput(
            f"{message.DESCRIPTOR.name}: {'; '.join(faults)}{f'; and {more} more' if more else ''}",
            hint="correct the named fields and send again",
        )


def _path(field: Any) -> str:
    """A violation's place, e.g. ``blueprint.nodes[3].op``."""
    out = ""
    for element in field.elements if field else ():
        subscript = element.subscript
        out += f".{element.field_name}" + (f"[{subscript.value!r}]" if subscript else "")
    return out.removeprefix(".") or "message"


def layered(handler: Any, method: str, layers: tuple[Layer, ...], idle: float) -> Any:
    """``handler`` behind ``layers``, the first outermost.

    Args:
        idle: seconds that a client may take to accept a message of the server's stream.
    """
    streams_in, streams_out = handler.request_streaming, handler.response_streaming
    kind = f"{'stream' if streams_in else 'unary'}_{'stream' if streams_out else 'unary'}"
    servant = getattr(handler, kind)
    decode = handler.request_deserializer or bytes

    async def serve(request: Any, context: Any) -> Any:
        call = Call(method, context, decode, streams_in, streams_out)
        proceed: Proceed = lambda request: _answer(servant, call, request, idle)  # noqa: E731 - reads in order
        for layer in reversed(layers):
            proceed = _step(layer, call, proceed)
        return await proceed(request)

    make = getattr(grpc, f"{kind}_rpc_method_handler")
    return make(serve, request_deserializer=None, response_serializer=handler.response_serializer)


def _step(layer: Layer, call: Call, proceed: Proceed) -> Proceed:
    return lambda request: layer(call, request, proceed)


async def _answer(servant: Callable[..., Any], call: Call, request: Any, idle: float) -> Any:
    """Run the servicer's method."""
    if inspect.isasyncgenfunction(servant):
        return await _stream(servant(request, call.context), call, idle)
    if not inspect.iscoroutinefunction(servant):
        raise Unsupported(f"{call.method} is not served here", hint="client and platform may differ in version")
    return await servant(request, call.context)


async def _stream(responses: AsyncGenerator[Any, None], call: Call, idle: float) -> None:
    """Send ``responses``; a client that stops reading does not keep the servicer waiting."""
    writing: asyncio.Future[None] | None = None
    try:
        async with contextlib.aclosing(responses):
            async for response in responses:
                writing = asyncio.ensure_future(call.context.write(response))
                await asyncio.wait({writing}, timeout=idle)
                if not writing.done():
                    break
                writing.result()
                writing = None
        if writing is not None:
            await writing  # gRPC can send no status past a message that is stuck
            raise DeadlineExceeded(f"the client took no message for {idle:g} s", hint="read without long pauses")
    finally:
        if writing is not None:
            writing.cancel()
