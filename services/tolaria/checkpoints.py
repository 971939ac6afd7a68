"""A run's last checkpoints on disk: numbered files, the newest that is whole wins, older ones are deleted.

``latest`` is found by number, not by a pointer that could lie; a damaged file is set aside under ``.damaged`` and said
aloud, and the one before it is used.
"""

from __future__ import annotations

import re
from pathlib import Path

from esper_core.errors import Corrupt, Exhausted
from esper_core.log import get
from esper_core.nn import checkpoint

log = get(__name__)
_NAME = re.compile(r"^epoch-(\d{8})\.ckpt$")


class Checkpoints:
    """The checkpoints under one directory.

    Args:
        directory: made when absent.
        keep: how many to keep.
    """

    def __init__(self, directory: Path, keep: int = 5) -> None:
        self.directory = directory
        self.keep = keep
        directory.mkdir(parents=True, exist_ok=True)
        for half in directory.glob(".*.tmp"):  # what a killed process was writing
            half.unlink(missing_ok=True)

    def save(self, epoch: int, tree: checkpoint.Tree) -> Path:
        """Write the state after ``epoch`` epochs and delete what is too old.

        Raises:
            Exhausted: the disk is full or cannot be written; earlier checkpoints are untouched.
        """
        path = self.directory / f"epoch-{epoch:08d}.ckpt"
        try:
            checkpoint.save(path, tree)
        except OSError as error:
            raise Exhausted(
                f"checkpoint {path} could not be written: {error.strerror}",
                hint="make room, then go on with --resume from the checkpoint before",
            ) from None
        for old in self.paths()[: -self.keep]:
            old.unlink(missing_ok=True)
        return path

    def latest(self) -> checkpoint.Tree | None:
        """The newest state that is whole, or None when there is none at all.

        Raises:
            Corrupt: there are checkpoints, and every one of them is damaged.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                return checkpoint.load(path)
            except Corrupt as error:
                aside = path.with_suffix(".damaged")
                path.rename(aside)
                log.error("checkpoint.damaged", path=str(path), reason=error.message, set_aside=str(aside))
        if paths:
            raise Corrupt(f"all {len(paths)} checkpoints under {self.directory} are damaged", hint="start the run anew")
        return None

    def paths(self) -> list[Path]:
        """Existing checkpoints, oldest first."""
        return sorted(path for path in self.directory.iterdir() if _NAME.match(path.name))
