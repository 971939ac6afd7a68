"""Orders that reached this run: kept on disk before they are acknowledged, handed over at the next epoch boundary.

JetStream forgets an order once it is acknowledged, and a run may be killed before it obeyed. The file is therefore read
again on resume; the grower knows by their ids which orders it has obeyed.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from pydantic import ValidationError

from esper_core.control.packet import Command
from esper_core.log import get

log = get(__name__)


class Orders:
    """The orders of one run. Written by the background thread, read by the training thread.

    Args:
        path: JSON lines; made when absent. A line that a crash cut short was never acknowledged and is dropped.
    """

    def __init__(self, path: Path) -> None:
        self._guard = threading.Lock()
        self._waiting: list[Command] = []
        self._known: set[str] = set()
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                self._add(Command.model_validate_json(line))
            except ValidationError as error:
                log.error("order.damaged", path=str(path), faults=error.error_count())
        self._file = path.open("ab")
        self._file.truncate(whole)

    def keep(self, command: Command) -> None:
        """Note an order; on disk when this returns, so that it may be acknowledged. One known already is ignored."""
        with self._guard:
            if command.command_id in self._known:
                return
            self._file.write(command.model_dump_json().encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._add(command)

    def take(self) -> list[Command]:
        """The orders that came since the last call, oldest first."""
        with self._guard:
            taken, self._waiting = self._waiting, []
            return taken

    def close(self) -> None:
        self._file.close()

    def _add(self, command: Command) -> None:
        if command.command_id not in self._known:
            self._known.add(command.command_id)
            self._waiting.append(command)
