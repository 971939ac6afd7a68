"""Checkpoint files: a tree of tensors and plain values in one safetensors file, written whole or not at all.

The tree's shape (dicts, lists, tuples, numbers, text) stands as JSON in the file's metadata, its tensors in the file's
body, and a SHA-256 over both beside it; every read checks it. Nothing is pickled, so a file can lie but not act.

Does not protect against someone who may write the file: the digest finds damage, not intent.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

from esper_core.errors import Corrupt, InvalidInput, NotFound

FORMAT = "esper.checkpoint/1"
MAX_DEPTH = 64
DAMAGED = "restore the file from a copy, or go back to an earlier checkpoint"

Tree = Any
"""None, bool, int, float, str, Tensor, or a list, tuple or dict (keys: str or int) of trees."""


def save(path: Path, tree: Tree) -> int:
    """Write ``tree`` to ``path`` so that a crash at any moment leaves the old file or the new one, never a mixture.

    Args:
        path: the file; its directory must exist.
        tree: see ``Tree``. Tensors are copied to the CPU; sharing between them is not kept.

    Returns:
        Bytes written.

    Raises:
        InvalidInput: the tree holds something that is neither a tensor nor a plain value.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_outline(tree, tensors, 0), separators=(",", ":"), allow_nan=False)
    metadata = {"format": FORMAT, "skeleton": skeleton, "sha256": _digest(skeleton, tensors)}
    data = dump_tensors(tensors, metadata)
    write_atomic(path, data)
    return len(data)


def load(path: Path) -> Tree:
    """Read what ``save`` wrote.

    Raises:
        NotFound: there is no such file.
        Corrupt: it is damaged, cut short, or was never a checkpoint.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f"no checkpoint {path}", hint="check the path, or start without --resume") from None
    metadata = _metadata(path, data)
    try:
        tensors = parse_tensors(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise Corrupt(f"{path} is damaged: {error}", hint=DAMAGED) from None
    skeleton = metadata.get("skeleton", "")
    if metadata.get("sha256") != _digest(skeleton, tensors):
        raise Corrupt(f"{path} does not match its digest", hint=DAMAGED)
    try:
        return _rebuilt(json.loads(skeleton), tensors)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Corrupt(f"{path} has a malformed skeleton: {error}", hint=DAMAGED) from None


def write_atomic(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``: temporary file, fsync, rename, fsync of the directory."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _outline(value: Tree, tensors: dict[str, Tensor], depth: int) -> Any:
    """``value`` as JSON, its tensors put aside under running numbers."""
    if depth > MAX_DEPTH:
        raise InvalidInput(f"a checkpoint nests deeper than {MAX_DEPTH}", hint="keep state dictionaries shallow")
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"t": name}
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"f": repr(float(value))}
    if isinstance(value, tuple):
        return {"u": [_outline(item, tensors, depth + 1) for item in value]}
    if isinstance(value, list):
        return [_outline(item, tensors, depth + 1) for item in value]
    if isinstance(value, Mapping):
        return {"d": [[_key(key), _outline(item, tensors, depth + 1)] for key, item in value.items()]}
    raise InvalidInput(
        f"a checkpoint cannot hold a {type(value).__name__}", hint="only tensors, numbers, text, lists and dicts"
    )


def _key(key: Any) -> str | int:
    if isinstance(key, (str, int)) and not isinstance(key, bool):
        return key
    raise InvalidInput(f"a checkpoint cannot have the key {key!r}", hint="keys are text or whole numbers")


def _rebuilt(outline: Any, tensors: Mapping[str, Tensor]) -> Tree:
    if isinstance(outline, list):
        return [_rebuilt(item, tensors) for item in outline]
    if not isinstance(outline, dict):
        return outline
    ((kind, inner),) = outline.items()
    if kind == "t":
        return tensors[inner]
    if kind == "f":
        return float(inner)
    if kind == "u":
        return tuple(_rebuilt(item, tensors) for item in inner)
    if kind == "d":
        return {key: _rebuilt(item, tensors) for key, item in inner}
    raise ValueError(f"unknown mark {kind!r}")


def _digest(skeleton: str, tensors: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over the skeleton and each tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(f"{FORMAT}\n{len(skeleton)}\n{skeleton}".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _metadata(path: Path, data: bytes) -> dict[str, str]:
    """The text metadata in a safetensors header (8 bytes of length, then JSON)."""
    try:
        (length,) = struct.unpack_from("<Q", data)
        if length > len(data) - 8:
            raise ValueError("it ends early")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        if metadata.get("format") != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}")
    except (struct.error, ValueError, AttributeError, RecursionError) as error:
        raise Corrupt(f"{path} is no checkpoint: {error}", hint=DAMAGED) from None
    return {str(key): str(value) for key, value in metadata.items()}
