"""Our errors as gRPC statuses and back, losing neither the class nor the hint.

On the wire an error is a status code, its message, and an ``esper.core.v1.ErrorDetail`` in ``google.rpc.Status``; a
client that knows only gRPC still gets the code and the message. What gRPC itself says (nobody listens, too large, too
late) becomes the nearest of our errors, with a hint.
"""

from __future__ import annotations

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from esper_core import errors
from esper_core.errors import EsperError, Refused
from esper_core.pb.esper.core.v1.error_pb2 import ErrorDetail

DETAILS_KEY = "grpc-status-details-bin"
MAX_MESSAGE = 1000  # bytes; all trailing metadata together must stay under 8 KiB, percent-encoded
MAX_HINT = 500
UP_HINT = "is the platform up? `esperctl up`"

_KINDS = {cls.__name__: cls for cls in errors.every() if cls is not EsperError}
_BY_CODE: dict[grpc.StatusCode, type[EsperError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidInput,
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidInput,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.ALREADY_EXISTS: errors.AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: errors.Conflict,
    grpc.StatusCode.ABORTED: errors.Conflict,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.Forbidden,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Exhausted,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.CANCELLED: errors.Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.DATA_LOSS: errors.Corrupt,
    grpc.StatusCode.UNIMPLEMENTED: errors.Unsupported,
    grpc.StatusCode.UNKNOWN: errors.Internal,
    grpc.StatusCode.INTERNAL: errors.Internal,
}


def to_status(error: EsperError, incident_id: str = "") -> grpc.Status:
    """``error`` as something a servicer's context can abort with."""
    detail = AnyMessage()
    code = error.code if isinstance(error, Refused) else ""
    kind, hint = type(error).__name__, _cut(error.hint, MAX_HINT)
    detail.Pack(ErrorDetail(kind=kind, hint=hint, incident_id=incident_id, code=code))
    status = Status(
        code=grpc.StatusCode[error.status].value[0], message=_cut(error.message, MAX_MESSAGE), details=[detail]
    )
    told: grpc.Status = rpc_status.to_status(status)  # type: ignore[no-untyped-call]
    return told


def from_call(error: grpc.aio.AioRpcError, method: str) -> EsperError:
    """The error that the server raised, or the one that gRPC's own status amounts to.

    Args:
        error: what the call to ``method`` ended with.
    """
    message = error.details() or error.code().name
    detail = _detail(error)
    if detail is not None and detail.kind == Refused.__name__:
        return Refused(message, hint=detail.hint, code=detail.code)
    if detail is not None and detail.kind in _KINDS:
        return _KINDS[detail.kind](message, hint=detail.hint)
    return _of_transport(error.code(), message, method)


def _of_transport(code: grpc.StatusCode, message: str, method: str) -> EsperError:
    """The error for a status that no servicer of ours has set."""
    cls = _BY_CODE.get(code, errors.Internal)
    if code is grpc.StatusCode.UNAVAILABLE:
        return cls(f"{method}: the platform cannot be reached ({message})", hint=UP_HINT)
    if code is grpc.StatusCode.CANCELLED:
        return cls(f"{method}: the server ended the call ({message})", hint="it may be shutting down; try again")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return cls(f"{method} did not answer in time", hint="try again, or allow it more time")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in message:
        return cls(f"{method}: {message}", hint="ask for a smaller page, or send it in smaller pieces")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return cls(f"{method}: {message}", hint="too many calls at once; try again shortly")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return cls(f"{method} is not served there ({message})", hint="client and platform may differ in version")
    return cls(f"{method}: {message}")


def _detail(error: grpc.aio.AioRpcError) -> ErrorDetail | None:
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                return _unpack(Status.FromString(value))
            except DecodeError:
                return None
    return None


def _unpack(status: Status) -> ErrorDetail | None:
    found = ErrorDetail()
    return found if any(detail.Unpack(found) for detail in status.details) else None


def _cut(text: str, size: int) -> str:
    """``text`` in at most ``size`` bytes of UTF-8; what cannot be encoded becomes a question mark."""
    raw = text.encode("utf-8", "replace")
    return raw.decode() if len(raw) <= size else raw[: size - 3].decode("utf-8", "ignore") + "…"
