"""The connection to JetStream: publish with an id and wait for the acknowledgement; make the streams.

On the platform's own server every principal has a key of its own and may do what ``policy`` says of it.

Reconnects for ever; what cannot be done meanwhile raises ``Unavailable`` and may be tried again with the same event
id, which JetStream deduplicates within its window and consumers for good. Must be used in the loop it was made in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig, StreamInfo

from esper_core import log
from esper_core.bus.envelope import check_belongs
from esper_core.bus.login import Login, login_of
from esper_core.bus.subjects import MAX_MESSAGE, STREAMS, Stream
from esper_core.config import Endpoints
from esper_core.errors import (
    Conflict,
    EsperError,
    Exhausted,
    Forbidden,
    InvalidInput,
    NotFound,
    Unauthenticated,
    Unavailable,
)
from esper_core.pb.esper.bus.v1.bus_pb2 import EventEnvelope

REQUEST_TIMEOUT = 3.0  # seconds for one exchange with the server
DUPLICATE_WINDOW = 120.0  # seconds in which the server itself drops a repeated id
SERVER_PAYLOAD = MAX_MESSAGE + 64 * 1024  # bytes a server must take: the largest dead letter with its headers
MAX_PENDING = 4 * 1024 * 1024  # bytes written ahead while disconnected

_VIOLATION = "nats: permissions violation for "
_TOO_LARGE, _STREAM_FULL = 10054, (10077, 10023, 10047)
_log = log.get("bus")


@dataclass(frozen=True)
class Receipt:
    """Where a stream keeps a message.

    Attributes:
        stream: its name.
        sequence: the message's place in it.
        duplicate: whether the server had it already.
    """

    stream: str
    sequence: int
    duplicate: bool


class Bus:
    """A connection to NATS with JetStream. Made by ``join``, or ``connect``.

    Attributes:
        refused: what the server did not let this principal do, in the words of nats-py: small letters throughout.
    """

    def __init__(self, client: Client, refused: set[str] | None = None) -> None:
        self.client = client
        self.jetstream: JetStreamContext = client.jetstream(timeout=REQUEST_TIMEOUT)
        self.refused = set[str]() if refused is None else refused

    @classmethod
    async def join(
        cls, endpoints: Endpoints, principal: str, name: str | None = None, *, timeout: float | None = 10.0
    ) -> Bus:
        """Connect to the platform's bus as ``principal``.

        Args:
            name: shown in the server's connection list; the principal's unless given.
            timeout: as ``connect``.

        Raises:
            NotFound: ``principal`` has no key there.
            Corrupt: its key was altered.
            Unavailable, Unauthenticated, Conflict: as ``connect``.
        """
        login = login_of(endpoints, principal)
        return await cls.connect(endpoints.nats_url, login, name or principal, timeout=timeout)

    @classmethod
    async def connect(cls, url: str, login: Login, name: str, *, timeout: float | None = 10.0) -> Bus:
        """Connect, and stay connected until ``close``.

        Args:
            url: ``nats://`` or ``tls://`` host and port.
            login: as whom.
            name: shown in the server's connection list.
            timeout: seconds to wait for the first connection; None waits until there is one.

        Raises:
            Unavailable: no server answered in time.
            Unauthenticated: it did not let us in.
            Conflict: it takes only smaller messages than the bus needs.
        """
        client = Client()
        client._public_nkey = login.key.public if login.key else None  # nats-py sets it only with a library of its own
        unknown, refused = asyncio.Event(), set[str]()

        async def on_error(error: Exception) -> None:
            said = str(error).lower()
            if "authorization violation" in said:
                unknown.set()
            if (reason := said.removeprefix(_VIOLATION)) != said:
                refused.add(reason)
            _log.warning("bus.error", connection=name, error=str(error) or type(error).__name__)

        async def on_disconnect() -> None:
            if not client.is_closed:
                _log.warning("bus.disconnected", connection=name)

        async def on_reconnect() -> None:
            _log.info("bus.reconnected", connection=name)

        dial = client.connect(
            url,
            name=name,
            max_reconnect_attempts=-1,
            reconnect_time_wait=1,
            connect_timeout=2,
            ping_interval=10,
            max_outstanding_pings=2,
            pending_size=MAX_PENDING,
            error_cb=on_error,
            disconnected_cb=on_disconnect,
            reconnected_cb=on_reconnect,
            **login.options,
        )
        dialling, refusal = asyncio.ensure_future(dial), asyncio.ensure_future(unknown.wait())
        try:
            await asyncio.wait((dialling, refusal), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            refusal.cancel()
            if not dialling.done():
                dialling.cancel()
                await client.close()
        if unknown.is_set():
            raise Unauthenticated(f"the event bus at {url} does not know {login}", hint=login.hint)
        if dialling.cancelled() or not dialling.done():
            raise Unavailable(
                f"the event bus at {url} did not answer within {timeout:g} s",
                hint="`esperctl status` says what runs; `esperctl up` starts it",
            )
        dialling.result()
        if client.max_payload < SERVER_PAYLOAD:
            await client.close()
            raise Conflict(
                f"the event bus at {url} takes messages of {client.max_payload} bytes, {SERVER_PAYLOAD} are needed",
                hint="set max_payload to 1MB in the server's configuration",
            )
        return cls(client, refused)

    @property
    def connected(self) -> bool:
        """Whether there is a server on the line at this moment."""
        return self.client.is_connected

    @property
    def server_id(self) -> str:
        """Names the server process on the line (another one after its restart); empty before the first."""
        info: Mapping[str, Any] = self.client._server_info  # nats-py shows it in no other way
        return str(info.get("server_id", ""))

    def check_connected(self) -> None:
        """Raise Unavailable at once while there is no server, rather than after a timeout."""
        if not self.connected:
            raise Unavailable(
                "no connection to the event bus", hint="`esperctl status` says more; it reconnects by itself"
            )

    async def publish(self, subject: str, envelope: EventEnvelope) -> Receipt:
        """Publish an event and wait until the stream has stored it.

        Raises:
            InvalidInput: the event does not belong on ``subject`` or is too large.
            Exhausted: the stream is full and refuses new messages.
            Forbidden: the server does not let this principal publish there.
            Unavailable: not stored, or not known to be: publish again with the same envelope.
        """
        check_belongs(envelope, subject)
        return await self.publish_bytes(subject, envelope.SerializeToString(), message_id=envelope.event_id)

    async def publish_bytes(
        self, subject: str, data: bytes, *, message_id: str, headers: Mapping[str, str] | None = None
    ) -> Receipt:
        """Publish bytes as they are, under ``message_id``; raises as ``publish``."""
        self.check_connected()
        try:
            ack = await self.jetstream.publish(subject, data, headers={**(headers or {}), "Nats-Msg-Id": message_id})
        except (nats.errors.Error, TimeoutError, OSError) as error:
            raise self.failure(error, f"publishing on {subject}", subject) from error
        return Receipt(ack.stream, ack.seq, bool(ack.duplicate))

    def failure(self, error: Exception, doing: str, subject: str) -> EsperError:
        """What a failed exchange on ``subject`` amounts to: the server answers a forbidden request with silence."""
        if f'publish to "{subject.lower()}"' in self.refused:
            return Forbidden(
                f"{doing}: the event bus does not let this principal publish on {subject}",
                hint="who may is declared in esper_core/bus/policy.py; another's data directory has other keys",
            )
        return translated(error, doing)

    async def provision(self) -> None:
        """Make every stream, or bring it to what ``subjects`` declares; safe to repeat.

        Raises:
            Unavailable: JetStream does not answer.
            Conflict: the server keeps other settings than the ones asked for, e.g. because it is too old.
        """
        self.check_connected()
        for stream in STREAMS:
            await self._provision(stream)

    async def stream_info(self, stream: Stream) -> StreamInfo:
        """What the server says about ``stream``; raises NotFound or Unavailable."""
        self.check_connected()
        try:
            return await self.jetstream.stream_info(stream.name)
        except (nats.errors.Error, TimeoutError, OSError) as error:
            raise translated(error, f"asking about stream {stream.name}") from error

    async def _provision(self, stream: Stream) -> None:
        wanted = _config(stream)
        try:
            try:
                info = await self.jetstream.update_stream(wanted)
            except nats.js.errors.NotFoundError:
                info = await self.jetstream.add_stream(wanted)
        except (nats.errors.Error, TimeoutError, OSError) as error:
            raise translated(error, f"making stream {stream.name}") from error
        for field in (
            "subjects",
            "retention",
            "max_age",
            "max_bytes",
            "max_msg_size",
            "discard",
            "storage",
            "duplicate_window",
        ):
            asked, kept = getattr(wanted, field), getattr(info.config, field)
            if asked != kept:
                raise Conflict(
                    f"stream {stream.name}: asked for {field}={asked!r}, the server keeps {kept!r}",
                    hint="use nats-server 2.10.23 or newer, and let nothing else manage this stream",
                )

    async def close(self) -> None:
        """Send what is written and leave; safe to repeat and while disconnected."""
        if not self.client.is_closed:
            try:
                await self.client.close()
            except OSError as error:  # the line is broken: there is nobody to say good-bye to
                _log.info("bus.left_unsaid", error=str(error))


def _config(stream: Stream) -> StreamConfig:
    return StreamConfig(
        name=stream.name,
        subjects=list(stream.subjects),
        retention=RetentionPolicy.LIMITS,
        max_age=stream.max_age,
        max_bytes=stream.max_bytes,
        max_msg_size=stream.max_message,
        discard=DiscardPolicy.OLD if stream.shed else DiscardPolicy.NEW,
        storage=StorageType.FILE,
        duplicate_window=DUPLICATE_WINDOW,
        allow_direct=True,
    )


def translated(error: Exception, doing: str) -> EsperError:
    """The Esper error that a failed exchange with NATS amounts to; ``doing`` begins its message."""
    if isinstance(error, nats.js.errors.APIError):
        if error.err_code == _TOO_LARGE:
            return InvalidInput(f"{doing}: the message is larger than the stream takes")
        if error.err_code in _STREAM_FULL:
            return Exhausted(f"{doing}: {error.description}", hint="consumers lag, or the disk is full")
        if isinstance(error, nats.js.errors.NotFoundError):
            return NotFound(f"{doing}: {error.description}")
        if isinstance(error, nats.js.errors.BadRequestError):
            return Conflict(f"{doing}: {error.description}")
        return Unavailable(f"{doing}: {error.description or 'JetStream is not ready'}", hint="it is tried again")
    if isinstance(error, nats.errors.MaxPayloadError):
        return InvalidInput(f"{doing}: the message is larger than the server takes")
    return Unavailable(
        f"{doing}: {str(error) or type(error).__name__}", hint="the event bus is away; `esperctl status` says more"
    )
