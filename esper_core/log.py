"""Structured log lines on stderr: for people or as JSON, never with a secret in them, never on stdout.

``get`` works before ``configure`` (a library user sees warnings only). Lines carry what is bound by ``context`` and by
``esper_core.telemetry``. Lines of other libraries take the same road, from WARNING up.

Redaction goes by the names of keys and by the shape of text (URL userinfo, bearer tokens, PEM private keys,
``password=…``); a secret in free text that looks like nothing is not recognised.
"""

from __future__ import annotations

import functools
import json as jsonlib
import logging
import math
import re
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal, cast

import structlog
from pydantic import SecretBytes, SecretStr
from structlog.contextvars import bound_contextvars as context

__all__ = ["configure", "context", "get", "redact"]

Level = Literal["debug", "info", "warning", "error"]

HIDDEN = "***"
_MAX_DEPTH = 6
_SENSITIVE = r"pass(?:word|wd|phrase)|secret|token|authorization|cookie|credential|dsn|(?:private|api|access)_?-?key"
_SECRET_KEY = re.compile(_SENSITIVE, re.IGNORECASE)
_SHAPES = (
    (re.compile(r"-----BEGIN ([A-Z ]*PRIVATE KEY)-----.*?(?:-----END \1-----|\Z)", re.DOTALL), HIDDEN),
    (re.compile(r"(?<=://)[^\s\"'<>]*@"), f"{HIDDEN}@"),
    (re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{8,}", re.IGNORECASE), rf"\1 {HIDDEN}"),
    (
        re.compile(
            rf"((?:{_SENSITIVE})[\w-]*[\"']?\s*[=:]\s*)(?:\"[^\"]*\"|'[^']*'|[^\s,;&)}}\]]+)",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

_Event = MutableMapping[str, Any]


class _State:
    """How this process logs; one per process, set by ``configure``."""

    service = ""
    json = False
    level = logging.WARNING


def configure(service: str, *, json: bool, level: Level = "info") -> None:
    """Say how this process logs, from now on and for every logger.

    Args:
        service: name that every line carries.
        json: one JSON object a line instead of text for people.
        level: the least important that is written.
    """
    _State.service, _State.json = service, json
    _State.level = logging.getLevelNamesMapping()[level.upper()]
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, _Bridge):
            root.removeHandler(handler)
    root.addHandler(_Bridge())
    root.setLevel(max(_State.level, logging.WARNING))


def get(name: str) -> structlog.typing.FilteringBoundLogger:
    """The logger of a part of Esper, e.g. ``urza``."""
    logger = structlog.wrap_logger(
        _Stderr(),
        processors=_CHAIN,
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        context_class=dict,
        cache_logger_on_first_use=True,
        part=name,
    )
    return cast(structlog.typing.FilteringBoundLogger, logger)


def redact(value: Any, depth: int = 0) -> Any:
    """``value`` without what looks secret, in plain types that JSON has."""
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, SecretStr | SecretBytes):
        return HIDDEN
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    if depth < _MAX_DEPTH and isinstance(value, Mapping):
        return {str(key): _under(str(key), item, depth) for key, item in value.items()}
    if depth < _MAX_DEPTH and isinstance(value, list | tuple | set | frozenset):
        return [redact(item, depth + 1) for item in value]
    return _text(str(value))


def _under(key: str, value: Any, depth: int) -> Any:
    """``value`` as it may be shown under ``key``."""
    if value is None or isinstance(value, bool) or not _SECRET_KEY.search(key):
        return redact(value, depth + 1)
    return HIDDEN


def _text(text: str) -> str:
    for shape, shown in _SHAPES:
        text = shape.sub(shown, text)
    return text


class _Stderr:
    """Writes finished lines to whatever stderr is at that moment."""

    def msg(self, line: str) -> None:
        try:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
        except (OSError, ValueError):
            return  # stderr is gone: there is nobody left to tell, and a log line must not stop the work

    debug = info = warning = error = critical = msg


class _Bridge(logging.Handler):
    """Takes the standard library's records to our lines."""

    def emit(self, record: logging.LogRecord) -> None:
        logger = get(record.name)
        level = max(logging.DEBUG, min(record.levelno // 10 * 10, logging.CRITICAL))
        logger.log(level, record.getMessage(), exc_info=record.exc_info)


def _admit(_logger: Any, method: str, event: _Event) -> _Event:
    if logging.getLevelNamesMapping().get(method.upper(), logging.ERROR) < _State.level:
        raise structlog.DropEvent
    return event


def _stamp(_logger: Any, _method: str, event: _Event) -> _Event:
    if _State.service:
        event.setdefault("service", _State.service)
    return event


def _clean(_logger: Any, _method: str, event: _Event) -> _Event:
    return {key: _under(key, value, 0) for key, value in event.items()}


def _render(logger: Any, method: str, event: _Event) -> str:
    if _State.json:
        return jsonlib.dumps(event, ensure_ascii=True, default=str)
    trace = event.pop("exception", None)
    shown = {key: _CONTROL.sub(_escaped, value) if isinstance(value, str) else value for key, value in event.items()}
    if trace is not None:
        shown["exception"] = trace
    return str(_console(sys.stderr.isatty())(logger, method, shown))


@functools.cache
def _console(colors: bool) -> structlog.dev.ConsoleRenderer:
    return structlog.dev.ConsoleRenderer(
        colors=colors, exception_formatter=structlog.dev.plain_traceback, pad_event_to=0
    )


def _escaped(match: re.Match[str]) -> str:
    return repr(match.group())[1:-1]


_CHAIN: list[structlog.typing.Processor] = [
    _admit,
    structlog.contextvars.merge_contextvars,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    _stamp,
    structlog.processors.format_exc_info,
    _clean,
    _render,
]
