"""The trace a piece of work belongs to: W3C ``traceparent`` in a context variable, carried across gRPC and NATS.

Collects and exports nothing; it lets log lines and events of one cause be found together. Log lines made while a trace
is in force carry its ``trace_id``.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from contextvars import ContextVar

from structlog.contextvars import bound_contextvars

HEADER = "traceparent"

_FORM = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_current: ContextVar[str] = ContextVar("traceparent", default="")


def new() -> str:
    """A ``traceparent`` of a trace of its own, flagged as sampled."""
    return f"00-{os.urandom(16).hex()}-{os.urandom(8).hex()}-01"


def current() -> str:
    """The ``traceparent`` in force, or an empty string."""
    return _current.get()


def trace_id(traceparent: str) -> str:
    """The 32 hex digits that name the trace, or an empty string when ``traceparent`` is not well-formed."""
    match = _FORM.fullmatch(traceparent)
    return match.group(1) if match else ""


@contextlib.contextmanager
def use(traceparent: str = "") -> Iterator[str]:
    """Work under ``traceparent``; what is empty or malformed (it may come from anyone) begins a new trace.

    Yields:
        The ``traceparent`` in force.
    """
    if not (trace := trace_id(traceparent)):
        traceparent = new()
        trace = trace_id(traceparent)
    token = _current.set(traceparent)
    try:
        with bound_contextvars(trace_id=trace):
            yield traceparent
    finally:
        _current.reset(token)
