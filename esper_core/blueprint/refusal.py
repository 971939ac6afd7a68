"""Why a blueprint is refused: one name per reason, so that who designs them can learn from it without reading prose."""

from __future__ import annotations

import enum

from esper_core.errors import InvalidInput, Refused


class Refusal(enum.IntEnum):
    """A reason; the numbers equal those of ``esper.tezzeret.v1.Refusal``."""

    MALFORMED = 1
    """A field, a name or an attribute cannot mean anything."""
    TOO_MANY_NODES = 2
    """More nodes, symbols or parents, or more bytes, than a blueprint may have."""
    CYCLE = 3
    """A node reads one that is not computed before it."""
    UNKNOWN_OP = 4
    """The registry has no such operation."""
    BANNED_OP = 5
    """An operation that is known, and that no kernel may contain."""
    BAD_SHAPE = 6
    """Two shapes, or a shape and an operation, do not fit, or the output is not what the slot needs."""
    WRONG_LAYOUT = 7
    """The blueprint does not serve the slot's layout."""
    BAD_SYMBOL = 8
    """A symbol or width expression is unknown, out of range or not computable."""
    NOT_SILENT = 9
    """It could not start as a no-op that still learns."""
    UNREACHABLE_GRADIENT = 10
    """Some of its weights can never receive a gradient."""
    TOO_LARGE = 11
    """It asks for more parameters, activations or FLOPs than a kernel may."""
    DEAD_NODE = 12
    """A node does not reach the output."""

    def because(self, message: str, *, hint: str = "") -> Refused:
        """The error to raise."""
        return Refused(message, hint=hint, code=self.name)


def code_of(error: Exception) -> int:
    """The refusal's number in an error; MALFORMED's for an unnamed one of bad input, 0 for any other."""
    if isinstance(error, Refused) and error.code in Refusal.__members__:
        return int(Refusal[error.code])
    return int(Refusal.MALFORMED) if isinstance(error, InvalidInput) else 0
