"""Orders that reached this run: kept on disk before they are acknowledged, handed over at the next epoch boundary.

JetStream forgets an order once it is acknowledged, and a run may be killed before it obeyed. The file is therefore read
again on resume; grower and carver know by their ids which orders they have obeyed.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError

from esper_core.log import get

log = get(__name__)
T = TypeVar("T", bound=BaseModel)


class Orders(Generic[T]):
    """The orders of one kind to one run. Written by the background thread, read by the training thread.

    Args:
        path: JSON lines; made when absent. A line that a crash cut short was never acknowledged and is dropped.
        kind: what they are.
        name: the field that names one.
    """

    def __init__(self, path: Path, kind: type[T], name: str) -> None:
        self._guard = threading.Lock()
        self._kind, self._name = kind, name
        self._waiting: list[T] = []
        self._known: set[str] = set()
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                self._add(self._kind.model_validate_json(line))
            except ValidationError as error:
                log.error("order.damaged", path=str(path), faults=error.error_count())
        self._file = path.open("ab")
        self._file.truncate(whole)

    def keep(self, order: T) -> None:
        """Note an order; on disk when this returns, so that it may be acknowledged. One known already is ignored."""
        with self._guard:
            if self._id(order) in self._known:
                return
            self._file.write(order.model_dump_json().encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._add(order)

    def take(self) -> list[T]:
        """The orders that came since the last call, oldest first."""
        with self._guard:
            taken, self._waiting = self._waiting, []
            return taken

    def close(self) -> None:
        self._file.close()

    def _add(self, order: T) -> None:
        if self._id(order) not in self._known:
            self._known.add(self._id(order))
            self._waiting.append(order)

    def _id(self, order: T) -> str:
        return str(getattr(order, self._name))
