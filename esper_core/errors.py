"""Every error Esper raises on purpose.

Each carries a message that says what is wrong, a hint a person can act on, the gRPC status it becomes on the wire
and the exit code ``esperctl`` ends with.

    EsperError                 status               exit
    ├── InvalidInput           INVALID_ARGUMENT        2    the request, file or flag cannot mean anything
    │   └── Refused            INVALID_ARGUMENT        2    a blueprint that must not be built; ``code`` names the reason
    ├── NotFound               NOT_FOUND               3    nothing has that name
    ├── AlreadyExists          ALREADY_EXISTS          4    that name is taken by something different
    ├── Conflict               FAILED_PRECONDITION     5    legal in general, not in the present state
    │   └── IllegalTransition  FAILED_PRECONDITION     5    the lifecycle table has no such edge
    ├── Unauthenticated        UNAUTHENTICATED         6    the caller did not prove who it is
    ├── Forbidden              PERMISSION_DENIED       6    the caller is known and may not do this
    ├── Exhausted              RESOURCE_EXHAUSTED      7    a budget or a quota is used up; try later or ask for less
    ├── Unavailable            UNAVAILABLE             8    a dependency is away; the same call may succeed later
    ├── DeadlineExceeded       DEADLINE_EXCEEDED       9    it took longer than was allowed
    ├── Corrupt                DATA_LOSS              10    bytes do not match their digest
    ├── Untrusted              FAILED_PRECONDITION    11    a signature is missing, wrong, or by an unlisted key
    ├── Unsupported            UNIMPLEMENTED          12    a well-formed wish that this build cannot fulfil
    └── Internal               INTERNAL               70    a defect in Esper; the incident id finds it in the log

Knows neither grpc nor the terminal: the status is a name, the edges translate it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class EsperError(Exception):
    """Root of the tree; never raised itself.

    Args:
        message: what is wrong, in one sentence, with the offending value.
        hint: what to do about it; empty when there is nothing to do.
    """

    status: ClassVar[str] = "INTERNAL"
    exit_code: ClassVar[int] = 70

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InvalidInput(EsperError):
    status, exit_code = "INVALID_ARGUMENT", 2


class Refused(InvalidInput):
    """See the tree above.

    Args:
        code: name of the reason, see ``esper_core.blueprint.refusal``.
    """

    def __init__(self, message: str, *, hint: str = "", code: str = "") -> None:
        super().__init__(message, hint=hint)
        self.code = code


class NotFound(EsperError):
    status, exit_code = "NOT_FOUND", 3


class AlreadyExists(EsperError):
    status, exit_code = "ALREADY_EXISTS", 4


class Conflict(EsperError):
    status, exit_code = "FAILED_PRECONDITION", 5


class IllegalTransition(Conflict):
    pass


class Unauthenticated(EsperError):
    status, exit_code = "UNAUTHENTICATED", 6


class Forbidden(EsperError):
    status, exit_code = "PERMISSION_DENIED", 6


class Exhausted(EsperError):
    status, exit_code = "RESOURCE_EXHAUSTED", 7


class Unavailable(EsperError):
    status, exit_code = "UNAVAILABLE", 8


class DeadlineExceeded(EsperError):
    status, exit_code = "DEADLINE_EXCEEDED", 9


class Corrupt(EsperError):
    status, exit_code = "DATA_LOSS", 10


class Untrusted(EsperError):
    status, exit_code = "FAILED_PRECONDITION", 11


class Unsupported(EsperError):
    status, exit_code = "UNIMPLEMENTED", 12


class Internal(EsperError):
    status, exit_code = "INTERNAL", 70


def every() -> list[type[EsperError]]:
    """All error classes, roots before leaves."""
    found: list[type[EsperError]] = []
    queue: list[type[EsperError]] = [EsperError]
    while queue:
        cls = queue.pop(0)
        found.append(cls)
        queue.extend(cls.__subclasses__())
    return found


def nearest(word: str, known: Iterable[str]) -> str:
    """A "did you mean" hint for a mistyped name; lists what is known when nothing is close."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(names)}" if names else ""
