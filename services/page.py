"""Paging newest first by ordinal: the token of a page is the last ordinal on it. Stable while rows are added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from esper_core.errors import InvalidInput

DEFAULT = 100
T = TypeVar("T")


def wanted(page_size: int) -> int:
    """The number of rows asked for; 0 means 100."""
    return page_size or DEFAULT


def before(token: str) -> int:
    """The ordinal that the wished page lies below; 0 for the first page.

    Raises:
        InvalidInput: the token is none of ours.
    """
    if not token:
        return 0
    if not (token.isascii() and token.isdecimal()) or len(token) > 18:
        raise InvalidInput(f"page token {token!r} is none of ours", hint="pass on the token of the page before")
    return int(token)


def cut(rows: Sequence[T], size: int, ordinal: Callable[[T], int]) -> tuple[Sequence[T], str]:
    """Of ``size + 1`` rows asked for: the page, and the token of the next one; empty on the last."""
    page = rows[:size]
    return page, str(ordinal(page[-1])) if len(rows) > size else ""
