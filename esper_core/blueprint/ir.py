"""BlueprintIR: a kernel's design as a typed graph of named operations. Data, never code.

Field names equal those of ``esper.core.v1.BlueprintIR``. What can be told without a slot is checked when one is made;
shapes and cost need a slot and are :mod:`esper_core.blueprint.analyse`'s.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator

from esper_core.blueprint import expression
from esper_core.blueprint.interface import MAX_WIDTH, Layout, canonical_json
from esper_core.blueprint.ops import BANNED, REGISTRY, Attribute, Kind
from esper_core.blueprint.refusal import Refusal
from esper_core.errors import Refused, Unsupported, nearest
from esper_core.ids import DIGEST, content_id

SCHEMA_VERSION = 1
MAX_NODES = 256
MAX_BYTES = 64 * 1024
MAX_INPUTS = 16
MAX_ATTRIBUTES = 32
MAX_SYMBOLS = 32
MAX_PARENTS = 8

INPUT = "input"
"""The name by which a node refers to the tensor entering the slot."""
DIMENSIONS = ("in_width", "out_width", "hidden_width")
"""Symbols that every expression may use; the slot gives their values."""

_NODE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,79}")
_SYMBOL = re.compile(r"[a-z][a-z0-9_]{0,31}")
_LISTS = {"nodes": MAX_NODES, "parent_ids": MAX_PARENTS, "layouts": len(Layout), "symbols": MAX_SYMBOLS}


class Node(BaseModel):
    """One operation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Unique within the blueprint."""
    op: str
    """Its name in the op registry."""
    inputs: tuple[str, ...]
    """Names of earlier nodes, or ``input``."""
    attributes: dict[str, str] = {}
    """Widths may be expressions over the symbols."""


class BlueprintIR(BaseModel):
    """A design for a kernel.

    Raises:
        Refused: from the constructor, for anything malformed, with the reason's name.
        Unsupported: for a schema version this build does not know.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """A short name for people."""
    schema_version: int = SCHEMA_VERSION
    """Version of the op registry's meaning."""
    symbols: dict[str, int] = {}
    """Free symbols and their default values."""
    nodes: tuple[Node, ...]
    """Operations in topological order."""
    output: str
    """Name of the node whose value leaves."""
    layouts: tuple[Layout, ...]
    """Layouts it can serve."""
    parent_ids: tuple[str, ...] = ()
    """Blueprints it descends from."""

    @classmethod
    def from_json(cls, data: bytes) -> BlueprintIR:
        """Read a blueprint that came from elsewhere: at most 64 KiB of JSON.

        Raises:
            Refused: when it is too long, no JSON, or malformed.
        """
        if len(data) > MAX_BYTES:
            raise Refusal.TOO_MANY_NODES.because(
                f"a blueprint of {len(data)} bytes is too long", hint=f"at most {MAX_BYTES} bytes"
            )
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise _malformed(error) from error

    def canonical(self) -> bytes:
        """The one byte string of this blueprint."""
        return canonical_json(self.model_dump(mode="json"))

    @property
    def id(self) -> str:
        """``blueprint-<sha256>`` over the canonical bytes."""
        return content_id("blueprint", self.canonical())

    def bind(self, symbols: Mapping[str, int] | None = None) -> dict[str, int]:
        """Values of all free symbols: the defaults, overridden by ``symbols``.

        Raises:
            Refused: BAD_SYMBOL for a symbol it does not have or a value outside 1 … 2^20.
        """
        bound = {**self.symbols, **(symbols or {})}
        for name, value in bound.items():
            if name not in self.symbols:
                raise Refusal.BAD_SYMBOL.because(
                    f"blueprint {self.name!r} has no symbol {name!r}", hint=nearest(name, self.symbols) or "it has none"
                )
            _check_value(name, value)
        return bound

    @model_validator(mode="wrap")
    @classmethod
    def _checked(cls, value: Any, handler: ModelWrapValidatorHandler[BlueprintIR]) -> BlueprintIR:
        if isinstance(value, Mapping):
            for name, limit in _LISTS.items():
                items = value.get(name, ())
                if isinstance(items, (list, tuple, dict)) and len(items) > limit:
                    raise Refusal.TOO_MANY_NODES.because(
                        f"a blueprint with {len(items)} {name} is too large", hint=f"at most {limit}"
                    )
        try:
            ir = handler(value)
        except ValidationError as error:
            raise _malformed(error) from error
        ir._check_head()
        ir._check_nodes()
        ir._check_reach()
        if len(ir.canonical()) > MAX_BYTES:
            raise Refusal.TOO_MANY_NODES.because(
                "the blueprint is too long", hint=f"at most {MAX_BYTES} bytes of canonical JSON"
            )
        return ir

    def _check_head(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise Unsupported(
                f"blueprint schema {self.schema_version}", hint=f"this build reads schema {SCHEMA_VERSION}"
            )
        if not _NAME.fullmatch(self.name):
            raise Refusal.MALFORMED.because(
                f"{self.name[:80]!r} is no blueprint name", hint="1-80 characters of a-z, 0-9, '_' and '-'"
            )
        if not self.nodes:
            raise Refusal.MALFORMED.because(
                f"blueprint {self.name!r} has no nodes", hint="a blueprint has at least one"
            )
        if not self.layouts or len(set(self.layouts)) != len(self.layouts):
            raise Refusal.MALFORMED.because(
                "a blueprint names each layout it serves, once", hint="layouts: FEATURES, TOKENS, IMAGE"
            )
        for parent in self.parent_ids:
            if not DIGEST.fullmatch(parent) or not parent.startswith("blueprint-"):
                raise Refusal.MALFORMED.because(
                    f"{parent[:80]!r} is no blueprint id", hint="blueprint- and 64 hex digits"
                )
        for symbol, value in self.symbols.items():
            if not _SYMBOL.fullmatch(symbol) or symbol in (*DIMENSIONS, *expression.FUNCTIONS):
                raise Refusal.MALFORMED.because(
                    f"{symbol[:40]!r} cannot be a symbol", hint="a-z, 0-9, '_', and no reserved word"
                )
            _check_value(symbol, value)

    def _check_nodes(self) -> None:
        names = [node.name for node in self.nodes]
        known = {INPUT}
        for node in self.nodes:
            if not _NODE_NAME.fullmatch(node.name) or node.name == INPUT:
                hint = "1-64 letters, digits and '_', beginning with a letter; 'input' is reserved"
                raise Refusal.MALFORMED.because(f"{node.name[:80]!r} is no node name", hint=hint)
            if node.name in known:
                raise Refusal.MALFORMED.because(
                    f"two nodes are named {node.name!r}", hint="give every node its own name"
                )
            for source in node.inputs[:MAX_INPUTS]:
                if source not in known and source in names:
                    hint = "list nodes in topological order; a blueprint has no cycles"
                    raise Refusal.CYCLE.because(f"node {node.name!r} reads {source!r} before it is computed", hint=hint)
                if source not in known:
                    raise Refusal.MALFORMED.because(
                        f"node {node.name!r} reads unknown {source[:80]!r}", hint=nearest(source[:80], known)[:300]
                    )
            self._check_op(node)
            known.add(node.name)
        if self.output not in known or self.output == INPUT:
            raise Refusal.MALFORMED.because(
                f"the output {self.output[:80]!r} is no node", hint=nearest(self.output[:80], known - {INPUT})[:300]
            )

    def _check_op(self, node: Node) -> None:
        op = REGISTRY.get(node.op)
        if node.op in BANNED:
            raise Refusal.BANNED_OP.because(f"node {node.name!r}: op {node.op!r} is banned", hint=BANNED[node.op])
        if op is None:
            raise Refusal.UNKNOWN_OP.because(
                f"node {node.name!r}: unknown op {node.op[:80]!r}", hint=nearest(node.op[:80], REGISTRY)
            )
        fewest, most = op.arity
        if not fewest <= len(node.inputs) <= most:
            hint = f"{op.name} takes {fewest}" + (f" to {most}" if most > fewest else "")
            raise Refusal.MALFORMED.because(f"node {node.name!r} has {len(node.inputs)} inputs", hint=hint)
        missing = [
            key for key, attribute in op.attributes.items() if attribute.default is None and key not in node.attributes
        ]
        if missing:
            raise Refusal.MALFORMED.because(
                f"node {node.name!r} lacks {', '.join(missing)}", hint=f"{op.name} cannot do without"
            )
        for key, text in node.attributes.items():
            if key not in op.attributes:
                hint = nearest(key[:80], op.attributes) or f"{op.name} has none"
                raise Refusal.MALFORMED.because(
                    f"node {node.name!r}: {op.name} has no attribute {key[:80]!r}", hint=hint
                )
            self._check_attribute(op.attributes[key], text)

    def _check_attribute(self, attribute: Attribute, text: str) -> None:
        if attribute.kind is Kind.WORD:
            if text not in attribute.words:
                raise Refusal.MALFORMED.because(
                    f"{text[:40]!r} is not among the choices", hint=nearest(text[:40], attribute.words)
                )
        elif attribute.kind is not Kind.STRIDE or text not in ("source", "sink"):
            expression.check(text, {**self.symbols, **dict.fromkeys(DIMENSIONS, 1)})

    def _check_reach(self) -> None:
        inputs = {node.name: node.inputs for node in self.nodes}
        reached: set[str] = set()
        waiting = [self.output]
        while waiting:
            name = waiting.pop()
            if name != INPUT and name not in reached:
                reached.add(name)
                waiting.extend(inputs[name])
        unused = [name for name in inputs if name not in reached]
        if unused:
            raise Refusal.DEAD_NODE.because(
                f"node {unused[0]!r} does not reach the output", hint="remove it, or use it"
            )


def _check_value(name: str, value: int) -> None:
    if not 1 <= value <= MAX_WIDTH:
        raise Refusal.BAD_SYMBOL.because(f"symbol {name[:40]!r} is {value}", hint=f"1 to {MAX_WIDTH}")


def _malformed(error: ValidationError) -> Refused:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part)[:40] for part in first["loc"][:4]) or "blueprint"
    return Refusal.MALFORMED.because(
        f"malformed blueprint: {where}: {first['msg'][:200]}", hint="see BlueprintIR in esper.core.v1"
    )
