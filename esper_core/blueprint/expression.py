"""Symbolic widths: integer expressions such as ``max(4, hidden_width // 2)``, evaluated without ever calling ``eval``.

Grammar: integers, names, ``+ - * //``, parentheses, ``min(a, b, …)`` and ``max(a, b, …)``. Length, depth and the
size of every intermediate value are capped, so an expression from a stranger costs microseconds at worst.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping

from esper_core.blueprint.refusal import Refusal
from esper_core.errors import Refused, nearest

MAX_LENGTH = 128
MAX_DEPTH = 16
MAX_VALUE = 1 << 40

GRAMMAR = "use integers, symbols, + - * //, min(a, b) and max(a, b), at most 128 characters and 16 levels deep"

_ALLOWED = re.compile(r"[a-z0-9_+\-*/(), ]+")
_GLUED = re.compile(r"(?<![a-z0-9_])[0-9]+[a-z_]")
_BINARY: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}
_CALLS: Mapping[str, Callable[[list[int]], int]] = {"min": min, "max": max}
FUNCTIONS = frozenset(_CALLS)


def evaluate(text: str, symbols: Mapping[str, int]) -> int:
    """The value of ``text`` with names taken from ``symbols``.

    Raises:
        Refused: BAD_SYMBOL when it is outside the grammar, names an unknown symbol, divides by zero or leaves ±2^40.
    """
    return _value(_parse(text), symbols, text, MAX_DEPTH)


def check(text: str, symbols: Mapping[str, int] | None = None) -> None:
    """Refuse what no values could make sense of: wrong grammar and, when ``symbols`` are given, unknown names.

    Raises:
        Refused: see above; arithmetic (division by zero, size) is only judged by :func:`evaluate`.
    """
    _check(_parse(text), symbols, text, MAX_DEPTH)


def _parse(text: str) -> ast.expr:
    if len(text) > MAX_LENGTH or not _ALLOWED.fullmatch(text) or _GLUED.search(text):
        raise _refused(text)
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _refused(text) from error


def _refused(text: str) -> Refused:
    return Refusal.BAD_SYMBOL.because(f"{text[:40]!r} is not a width expression", hint=GRAMMAR)


def _parts(node: ast.expr, text: str, depth: int) -> list[ast.expr]:
    """Operands of an inner node that the grammar allows; empty for a leaf."""
    if depth == 0:
        raise _refused(text)
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return [node.left, node.right]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CALLS:
        if not node.args or node.keywords or any(isinstance(argument, ast.Starred) for argument in node.args):
            raise _refused(text)
        return node.args
    if isinstance(node, ast.Name) or (isinstance(node, ast.Constant) and type(node.value) is int):
        return []
    raise _refused(text)


def _check(node: ast.expr, symbols: Mapping[str, int] | None, text: str, depth: int) -> None:
    for part in _parts(node, text, depth):
        _check(part, symbols, text, depth - 1)
    if isinstance(node, ast.Name) and symbols is not None and node.id not in symbols:
        raise Refusal.BAD_SYMBOL.because(f"unknown symbol {node.id!r} in {text!r}", hint=nearest(node.id, symbols))


def _value(node: ast.expr, symbols: Mapping[str, int], text: str, depth: int) -> int:
    operands = [_value(part, symbols, text, depth - 1) for part in _parts(node, text, depth)]
    if isinstance(node, ast.BinOp):
        if isinstance(node.op, ast.FloorDiv) and operands[1] == 0:
            raise Refusal.BAD_SYMBOL.because(f"{text!r} divides by zero", hint="guard the divisor, e.g. max(1, …)")
        result = _BINARY[type(node.op)](*operands)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        result = _CALLS[node.func.id](operands)
    elif isinstance(node, ast.Name):
        if node.id not in symbols:
            raise Refusal.BAD_SYMBOL.because(f"unknown symbol {node.id!r} in {text!r}", hint=nearest(node.id, symbols))
        result = symbols[node.id]
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        result = node.value
    else:
        raise _refused(text)
    if abs(result) > MAX_VALUE:
        raise Refusal.BAD_SYMBOL.because(f"{text!r} grows beyond 2^40", hint="widths are at most 1048576")
    return result
