"""The question "which kernels" as SQL: filters, an order, preferred tags, and a token that says where a page ended.

Only what restricts is written into the statement, so that the planner sees what it can use an index for. Preferred
tags cut the answer into classes, best first: each is a query of its own that walks an index in the wished order, instead
of one that would have to rate every kernel. A token names the class, the sort value and the id of the page's last
kernel; what comes and goes between two pages shifts nothing.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from esper_core.errors import InvalidInput

MOST_PREFERRED = 4
"""Preferred tags that can be asked for: there are two classes for each; also in the contract."""
PLANNING = "SET LOCAL plan_cache_mode = force_custom_plan; SET LOCAL effective_cache_size = '64MB'"
"""Set around every search. A plan for any values would not know which tags are rare. And the planner would spread the
rows of a page over a table that it takes to be at hand: it then walks an index through rows that lie anywhere, where few
have the tag, although the index of tags leads there at once."""
_FARTHEST = 2**63 - 1


class Order(enum.IntEnum):
    """What comes first; the numbers equal those of ``esper.urza.v1.KernelOrder``."""

    PARAMETERS = 1
    FORWARD = 2
    INTEREST = 3
    NEWEST = 4


_COLUMN = {Order.PARAMETERS: "parameters", Order.FORWARD: "speed", Order.INTEREST: "interest", Order.NEWEST: "serial"}
_DESCENDING = frozenset({Order.INTEREST, Order.NEWEST})
_WHOLE = frozenset({Order.PARAMETERS, Order.NEWEST})


@dataclass(frozen=True)
class Query:
    """What kernels are wanted; empty and 0 do not restrict."""

    interface_id: str = ""
    status: int = 0
    required_tags: Sequence[str] = ()
    excluded_tags: Sequence[str] = ()
    preferred_tags: Sequence[str] = ()
    """The first one outweighs all later ones together, and so on."""
    max_parameters: int = 0
    max_forward_seconds: float = 0.0
    """Of the median; kernels that were not measured have none."""
    max_forward_seconds_p99: float = 0.0
    max_memory_bytes: int = 0
    target: str = ""
    """Machine kind of the measurement."""
    blueprint_id: str = ""
    born_of: str = ""
    order: Order = Order.PARAMETERS
    size: int = 100
    token: str = ""

    def __post_init__(self) -> None:
        if len(self.preferred_tags) > MOST_PREFERRED:
            raise InvalidInput(f"{len(self.preferred_tags)} preferred tags", hint=f"at most {MOST_PREFERRED}")


@dataclass(frozen=True)
class Place:
    """Where a page ends.

    Attributes:
        cls: the class of preferred tags; the lowest is the best.
        value: what the kernel is sorted by.
        kernel_id: of the last kernel; empty before the first.
    """

    cls: int
    value: int | float
    kernel_id: str

    def token(self) -> str:
        """As text, exact."""
        value = self.value.hex() if isinstance(self.value, float) else str(self.value)
        return f"{self.cls}:{value}:{self.kernel_id}"

    @classmethod
    def read(cls, token: str, query: Query) -> Place | None:
        """What ``token`` says; None for the first page.

        Raises:
            InvalidInput: the token is none of ours, or belongs to another order.
        """
        if not token:
            return None
        try:
            number, value, kernel_id = token.split(":")
            at: int | float
            if query.order in _WHOLE:
                at = _digits(value)
            elif math.isnan(at := float.fromhex(value)):
                raise ValueError
            place = cls(_digits(number), at, kernel_id)
            if place.cls >= 1 << len(query.preferred_tags) or not kernel_id.startswith("kernel-"):
                raise ValueError
        except (ValueError, OverflowError):
            hint = "pass on the token of the page before, and ask the same question"
            raise InvalidInput(f"page token {token[:80]!r} is none of ours", hint=hint) from None
        return place


def _digits(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 18:
        raise ValueError
    return int(text)


@dataclass
class Statement:
    """SQL behind ``FROM urza.kernels k``, and its arguments."""

    wheres: list[str] = field(default_factory=list)
    arguments: list[object] = field(default_factory=list)
    order: str = ""

    def where(self, condition: str, argument: object) -> None:
        """Restrict; ``{}`` in ``condition`` stands for ``argument``."""
        self.arguments.append(argument)
        self.wheres.append(condition.format(f"${len(self.arguments)}"))

    @property
    def sql(self) -> str:
        wheres = " AND ".join(self.wheres)
        return f"{f'WHERE {wheres} ' if wheres else ''}{self.order}"


def value_column(order: Order) -> str:
    """The column that ``order`` sorts by."""
    return _COLUMN[order]


def classes(query: Query) -> Iterator[tuple[int, Statement]]:
    """The statements to ask one after the other until the page is full, each with its class.

    Raises:
        InvalidInput: the token is none of ours.
    """
    after = Place.read(query.token, query)
    first = after.cls if after is not None else 0
    for cls in range(first, 1 << len(query.preferred_tags)):
        yield cls, _statement(_within(query, cls), after if cls == first else None)


def _within(query: Query, cls: int) -> Query:
    """``query`` for the kernels of one class: which preferred tags they have is then required, or excluded."""
    count = len(query.preferred_tags)
    lacks = [bool(cls >> (count - 1 - index) & 1) for index in range(count)]
    has = [tag for tag, lacking in zip(query.preferred_tags, lacks, strict=True) if not lacking]
    not_has = [tag for tag, lacking in zip(query.preferred_tags, lacks, strict=True) if lacking]
    return replace(query, required_tags=(*query.required_tags, *has), excluded_tags=(*query.excluded_tags, *not_has))


def _statement(query: Query, after: Place | None) -> Statement:
    made = Statement()
    for condition, argument in (
        ("k.interface_id = {}", query.interface_id),
        ("k.status = {}", query.status),
        ("k.blueprint_id = {}", query.blueprint_id),
        ("k.born_of = {}", query.born_of),
        ("k.target = {}", query.target),
        ("k.tags @> {}", list(query.required_tags)),
        ("NOT k.tags && {}", list(query.excluded_tags)),
        ("k.parameters <= {}", min(query.max_parameters, _FARTHEST)),
        ("k.speed <= {}", query.max_forward_seconds),
        ("k.forward_seconds_p99 <= {}", query.max_forward_seconds_p99),
        ("k.peak_memory_bytes <= {}", min(query.max_memory_bytes, _FARTHEST)),
    ):
        if argument:
            made.where(condition, argument)
    column, descending = _COLUMN[query.order], query.order in _DESCENDING
    if after is not None:
        made.arguments += [after.value, after.kernel_id]
        last = len(made.arguments)
        made.wheres.append(f"(k.{column}, k.kernel_id) {'<' if descending else '>'} (${last - 1}, ${last})")
    way = " DESC" if descending else ""
    made.order = f"ORDER BY k.{column}{way}, k.kernel_id{way} LIMIT {query.size + 1}"
    return made
