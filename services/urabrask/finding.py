"""A finding: what is wrong with a kernel, by name for programs and in words for people. Knows no torch."""

from __future__ import annotations

from esper_core.errors import DeadlineExceeded, EsperError, Exhausted, Untrusted
from esper_core.kernel.record import RejectionReason


class Unfit(Exception):
    """The kernel must not be used.

    Args:
        reason: which fault.
        message: what was seen.
    """

    def __init__(self, reason: RejectionReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


def reason_of(error: EsperError) -> RejectionReason:
    """The fault of a kernel whose examination ended with ``error`` every time it was tried."""
    if isinstance(error, DeadlineExceeded):
        return RejectionReason.TIMEOUT
    if isinstance(error, Exhausted):
        return RejectionReason.MEMORY
    if isinstance(error, Untrusted):
        return RejectionReason.UNTRUSTED
    return RejectionReason.FAILS
