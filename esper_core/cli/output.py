"""What leaves the command line: tables for people, JSON for programs, notes on stderr.

JSON is one document on stdout (one per line where a command watches); its field names are those of the contracts, its
enums short names (``TRAINING``), its integers numbers. Text that came from elsewhere is stripped of control characters,
so that it cannot move the cursor of whoever reads it.
"""

from __future__ import annotations

import base64
import enum
import io
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

_UNBOUNDED = 10_000
"""Columns of a page that is not a terminal: nothing is cut off or wrapped for a program that reads."""

STYLES: Mapping[str, str] = {
    "DORMANT": "dim", "GERMINATED": "cyan", "LOADING": "cyan", "TRAINING": "blue", "GRAFTING": "magenta",
    "STABILIZATION": "magenta", "EVALUATING": "yellow", "FINE_TUNING": "yellow", "FOSSILIZED": "bold green",
    "CULLED": "red", "ROLLED_BACK": "bold red", "COMPILED": "cyan", "VALIDATED": "green", "REJECTED": "red",
    "RETIRED": "dim", "RUNNING": "blue", "FINISHED": "green", "FAILED": "bold red", "STOPPED": "yellow",
    "QUEUED": "cyan", "DONE": "green", "yes": "green", "no": "bold red", "healthy": "green", "unhealthy": "bold red",
}  # fmt: skip


class Format(enum.StrEnum):
    """How a command answers on stdout."""

    TABLE = "table"
    """For people."""
    JSON = "json"
    """For programs."""


class Output:
    """Where one command's answer goes. Nothing here raises but on a broken stdout (``BrokenPipeError``)."""

    def __init__(self, format: Format) -> None:  # noqa: A002 - the option's own name
        self.format = format

    @property
    def json(self) -> bool:
        """Whether a program reads."""
        return self.format is Format.JSON

    def document(self, value: Any, *views: RenderableType) -> None:
        """Answer with ``value`` as one JSON document, or with ``views`` for people."""
        if self.json:
            _write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
        else:
            for view in views:
                _print(view, sys.stdout)

    def line(self, value: Any, view: RenderableType) -> None:
        """Answer with one more line: of JSON, or for people. Flushed at once."""
        if self.json:
            _write(json.dumps(value, ensure_ascii=False, allow_nan=False))
        else:
            _print(view, sys.stdout)

    def note(self, text: RenderableType) -> None:
        """Tell people something beside the answer, on stderr."""
        _print(text, sys.stderr)


def console(file: IO[str]) -> Console:
    """A console that takes text literally: no markup, no emoji codes, no highlighting, no colour off a terminal."""
    tty = file.isatty()
    return Console(
        file=file, markup=False, highlight=False, emoji=False, soft_wrap=not tty,
        width=None if tty else _UNBOUNDED, force_terminal=tty, no_color=None if tty else True,
    )  # fmt: skip


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _print(view: RenderableType, file: IO[str]) -> None:
    view = clean(view) if isinstance(view, str) else view
    if file.isatty():
        console(file).print(view)
    else:
        page = io.StringIO()
        console(page).print(view)
        file.write("".join(line.rstrip() + "\n" for line in page.getvalue().splitlines()))
    file.flush()


def error(message: str, hint: str = "") -> None:
    """One ``error:`` line and, when there is something to do about it, one ``hint:`` line, on stderr."""
    page = console(sys.stderr)
    page.print(Text.assemble(("error: ", "bold red"), clean(message)), soft_wrap=True)
    if hint:
        page.print(Text.assemble(("hint: ", "bold cyan"), clean(hint)), soft_wrap=True)


def clean(text: str) -> str:
    """``text`` without control characters; newlines and tabs become spaces."""
    return "".join(c if c.isprintable() else " " if c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, empty: str) -> RenderableType:
    """Rows under headings; a heading that begins with ``>`` is set flush right, one with ``*`` may wrap.

    Args:
        columns: the headings.
        rows: cells in the same order; see ``cell``.
        empty: what to say when there are no rows.
    """
    body = [[cell(value) for value in row] for row in rows]
    if not body:
        return Text(empty, style="dim")
    page = Table(box=box.SIMPLE_HEAD if sys.stdout.isatty() else None, pad_edge=False, header_style="bold")
    for name in columns:
        wraps = name.startswith("*")
        page.add_column(
            name.lstrip(">*"), justify="right" if name.startswith(">") else "left",
            no_wrap=not wraps, overflow="fold" if wraps else "ellipsis",
        )  # fmt: skip
    for row in body:
        page.add_row(*row)
    return page


def fields(pairs: Iterable[tuple[str, Any]]) -> RenderableType:
    """Names and values, one pair a line; pairs whose value is empty are left out."""
    page = Table.grid(padding=(0, 2))
    page.add_column(style="bold", no_wrap=True)
    page.add_column(overflow="fold")
    for name, value in pairs:
        if value is not None and value != "":
            page.add_row(name, cell(value))
    return page


def cell(value: Any) -> Text:
    """A value as people read it: states coloured, floats to four figures, nothing as a dash."""
    if isinstance(value, Text):
        return value
    if value is None or value == "":
        return Text("-", style="dim")
    if isinstance(value, bool):
        value = "yes" if value else "no"
    if isinstance(value, float):
        value = number(value)
    text = clean(str(value))
    return Text(text, style=STYLES.get(text, ""))


def words(*parts: str | Text) -> Text:
    """A line put together from text that may have come from elsewhere and from cells."""
    return Text.assemble(*(clean(part) if isinstance(part, str) else part for part in parts))


def number(value: float) -> str:
    """A float to four significant figures."""
    return f"{value:.4g}"


def short(identifier: str) -> str:
    """A content id cut to what still names it (12 hex digits); other text as it is."""
    kind, _, digest = identifier.partition("-")
    return f"{kind}-{digest[:12]}" if len(digest) == 64 else identifier


def moment(stamp: str) -> str:
    """An RFC 3339 time to the second."""
    return stamp[:19].replace("T", " ")


def enum_value(descriptor: EnumDescriptor, name: str) -> Any:
    """The contract's number for ``TRAINING``; the other way round than ``enum_name``.

    Raises:
        KeyError: it has no such value.
    """
    prefix = descriptor.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return descriptor.values_by_name[prefix + name].number


def enum_name(descriptor: EnumDescriptor, value: int) -> str:
    """``TRAINING`` for ``SEED_STATE_TRAINING``; the number itself when the contract of this build has no such value."""
    known = descriptor.values_by_number.get(value)
    if known is None:
        return str(value)
    prefix = descriptor.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return known.name.removeprefix(prefix)


def plain(message: Message) -> dict[str, Any]:
    """A message as plain data: every field by its contract's name; unset ones with presence are ``None``."""
    return {field.name: _field(message, field) for field in message.DESCRIPTOR.fields}


def _field(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    entry = field.message_type
    if entry is not None and entry.GetOptions().map_entry:
        inner = entry.fields_by_name["value"]
        return {str(key): _scalar(inner, value[key]) for key in sorted(value)}
    if field.is_repeated:
        return [_scalar(field, item) for item in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _scalar(field, value)


def _scalar(field: Any, value: Any) -> Any:
    if isinstance(value, Timestamp):
        return value.ToJsonString()
    if field.message_type is not None:
        return plain(value)
    if field.enum_type is not None:
        return enum_name(field.enum_type, value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
