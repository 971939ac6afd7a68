"""The spool's files: an append-only log in segments, for one process at a time, written by any thread of it.

``<first sequence>.log`` files in one folder, under a ``lock``. A torn tail is cut off on opening. An appended record
survives the process's death at once, the machine's after ``sync``. A flipped bit loses the rest of its segment.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from esper_core import log
from esper_core.bus.framing import Record, decode, encode
from esper_core.errors import Conflict, EsperError, Exhausted, Unavailable

READ_BYTES = 1024 * 1024  # read at once; holds the largest record

_log = log.get("spool")


@dataclass
class Segment:
    """One file: its first record's sequence, and its size up to the last whole record."""

    first: int
    path: Path
    size: int


@dataclass(frozen=True)
class Place:
    """A reader's position: everything up to ``sequence`` is behind it; ``offset`` is in the segment of ``first``."""

    sequence: int
    first: int
    offset: int


class Segments:
    """An open log.

    Args:
        folder: where the files are; made when missing.
        after: number the first new record ``after + 1`` at least.
        segment_bytes: a segment is closed beyond this.
        max_bytes: more than this on disk is refused.

    Raises:
        Conflict: another process has this log open.
        Exhausted, Unavailable: the disk is full, or cannot be written.
    """

    def __init__(self, folder: Path, *, after: int, segment_bytes: int, max_bytes: int) -> None:
        self._folder = folder
        self._segment_bytes, self._max_bytes = segment_bytes, max_bytes
        self._guard = threading.Lock()
        with _disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with _disk_errors(folder), contextlib.ExitStack() as undo:
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            undo.callback(os.close, self._lock)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Conflict(
                    f"the spool under {folder} is in use", hint="another process trains this run; stop it first"
                ) from None
            self._segments, last = _recover(folder)
            self.last = max(last, after)
            if self._segments and self.last == last:
                self._file = os.open(self._segments[-1].path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            else:
                self._file = self._begin(self.last + 1)
            undo.pop_all()
        self._closed = False

    @property
    def start(self) -> Place:
        """In front of the oldest record that is kept."""
        first = self._segments[0].first
        return Place(first - 1, first, 0)

    def append(self, subject: str, sealed: Callable[[int], bytes]) -> int:
        """Add what ``sealed(sequence)`` returns, and return the sequence.

        Raises:
            Exhausted: the disk, or the log's share of it, is full; nothing was added.
            Unavailable: the disk cannot be written, or the log is closed; nothing was added.
        """
        with self._guard:
            if self._closed:
                raise Unavailable(f"the spool under {self._folder} is closed")
            sequence = self.last + 1
            record = encode(sequence, subject, sealed(sequence))
            if sum(segment.size for segment in self._segments) + len(record) > self._max_bytes:
                raise Exhausted(
                    f"the spool under {self._folder} is full ({self._max_bytes} bytes)",
                    hint="start the platform (`esperctl up`), so that its events can be delivered",
                )
            with _disk_errors(self._folder):
                if self._segments[-1].size >= self._segment_bytes:
                    os.fsync(self._file)
                    old, self._file = self._file, self._begin(sequence)
                    os.close(old)
                self._write(record)
            self.last = sequence
            return sequence

    def sync(self) -> None:
        """Make everything appended so far survive a power cut; raises Exhausted or Unavailable when it may not."""
        with self._guard, _disk_errors(self._folder):
            os.fsync(self._file)

    def find(self, sequence: int) -> Place:
        """The place right behind ``sequence``, or the nearest one that is kept."""
        segment = next((found for found in reversed(self._segments) if found.first <= sequence + 1), None)
        if segment is None:
            return self.start
        offset = 0
        for record in decode(segment.path.read_bytes()[: segment.size]):
            if record.sequence > sequence:
                break
            offset = record.end
        return Place(sequence, segment.first, offset)

    def read(self, place: Place) -> tuple[list[Record], Place]:
        """The next records behind ``place``, and where to go on when there are none: what is damaged is skipped."""
        with self._guard:
            index = next(i for i, segment in enumerate(self._segments) if segment.first == place.first)
            segment, size = self._segments[index], self._segments[index].size
            following = self._segments[index + 1] if index + 1 < len(self._segments) else None
        with _disk_errors(self._folder), segment.path.open("rb") as file:
            file.seek(place.offset)
            data = file.read(min(READ_BYTES, size - place.offset))
        records = list(decode(data, place.offset))
        if records or following is None:
            return records, place
        if place.offset < size:
            lost = following.first - 1 - place.sequence
            _log.error("spool.damaged", file=segment.path.name, offset=place.offset, events=lost)
        return [], Place(following.first - 1, following.first, 0)

    def after(self, sequence: int) -> Iterator[Record]:
        """The records behind ``sequence`` that are kept; others may append and forget meanwhile.

        Raises:
            Unavailable: the disk cannot be read.
        """
        with self._guard:
            ends = [segment.first - 1 for segment in self._segments[1:]] + [self.last]
            wanted = [segment for segment, end in zip(self._segments, ends, strict=True) if end > sequence]
        for segment in wanted:
            with _disk_errors(self._folder):
                try:
                    data = segment.path.read_bytes()
                except FileNotFoundError:  # forgotten meanwhile: it was delivered
                    continue
            yield from (record for record in decode(data) if record.sequence > sequence)

    def forget(self, place: Place, keep_bytes: int) -> None:
        """Remove whole segments before ``place``, oldest first, as long as more than ``keep_bytes`` are kept."""
        with self._guard, _disk_errors(self._folder):
            while self._segments[0].first < place.first and sum(s.size for s in self._segments) > keep_bytes:
                self._segments.pop(0).path.unlink()

    def close(self) -> None:
        """Sync and let go of the files; safe to repeat."""
        with self._guard:
            if not self._closed:
                self._closed = True
                try:
                    with _disk_errors(self._folder):
                        os.fsync(self._file)
                finally:
                    os.close(self._file)
                    os.close(self._lock)

    def _begin(self, first: int) -> int:
        """Make the segment that starts with ``first`` and return its file descriptor."""
        path = self._folder / f"{first:020d}.log"
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._segments.append(Segment(first, path, 0))
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return file

    def _write(self, record: bytes) -> None:
        """Write a record whole or not at all."""
        segment = self._segments[-1]
        try:
            if (written := os.write(self._file, record)) < len(record):
                raise OSError(errno.ENOSPC, f"only {written} of {len(record)} bytes were written")
        except OSError:
            os.ftruncate(self._file, segment.size)
            raise
        segment.size += len(record)


def _recover(folder: Path) -> tuple[list[Segment], int]:
    """The segments on disk, the last one cut behind its last whole record, and the sequence of that record."""
    segments = [Segment(int(path.stem), path, path.stat().st_size) for path in sorted(folder.glob("*.log"))]
    if not segments:
        return [], 0
    tail = segments[-1]
    last, end = tail.first - 1, 0
    for record in decode(tail.path.read_bytes()):
        last, end = record.sequence, record.end
    if end < tail.size:
        _log.warning("spool.tail_cut", file=tail.path.name, kept=end, cut=tail.size - end)
        os.truncate(tail.path, end)
        tail.size = end
    return segments, last


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _translated(error, folder) from error


def _translated(error: OSError, folder: Path) -> EsperError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Exhausted(f"no space left for the spool under {folder}", hint="free some disk space; training goes on")
    return Unavailable(
        f"the spool under {folder} cannot be written: {error.strerror or error}", hint="check the disk and permissions"
    )
