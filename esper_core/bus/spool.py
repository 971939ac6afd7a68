"""A training process's outbox: a local append-only log beside its checkpoints, drained to JetStream in the background.

``append`` is called from the training thread and touches the local disk only; ``drain`` runs in the background loop
and publishes in order, under the same event ids however often it must. What was drained is kept for a while, so that
a stream that turns out to have been wiped can be filled again. ``cursor.json`` says how far it got; when it is lost,
everything kept is sent again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from esper_core import log
from esper_core.bus.bus import Bus
from esper_core.bus.dead import bury
from esper_core.bus.envelope import check_belongs
from esper_core.bus.framing import Record
from esper_core.bus.mark import Mark, damage, generation_id
from esper_core.bus.patience import heed_cancellation, persist
from esper_core.bus.segments import Place, Segments
from esper_core.bus.subjects import STREAMS, stream_of
from esper_core.clock import SYSTEM
from esper_core.errors import InvalidInput
from esper_core.pb.esper.bus.v1.bus_pb2 import EventEnvelope

SEGMENT_BYTES = 4 * 1024 * 1024  # a file is closed beyond this
KEEP_BYTES = 64 * 1024 * 1024  # drained files beyond this are removed, oldest first
MAX_BYTES = 1024 * 1024 * 1024  # on disk; more is refused
LOOK = 0.1  # seconds between looks for new records
INSPECT = 15.0  # seconds between looks at the streams' health

_log = log.get("spool")


class _Cursor(BaseModel):
    """How far the spool is drained, how often it began again, and a mark in every stream it went to."""

    model_config = ConfigDict(extra="forbid")
    drained: int = 0
    generation: int = 0
    marks: dict[str, Mark] = {}


class Spool:
    """An append-only queue of events on the local disk, for one process at a time.

    Args:
        folder: where its files are; made when missing.
        after: number the first new record ``after + 1`` at least, e.g. because a checkpoint says so.
        segment_bytes, keep_bytes, max_bytes: see the constants.

    Raises:
        Conflict: another process has this spool open.
        Exhausted, Unavailable: the disk is full, or cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        after: int = 0,
        segment_bytes: int = SEGMENT_BYTES,
        keep_bytes: int = KEEP_BYTES,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._segments = Segments(folder, after=after, segment_bytes=segment_bytes, max_bytes=max_bytes)
        self._keep_bytes = keep_bytes
        self._cursor_file = folder / "cursor.json"
        cursor = _read_cursor(self._cursor_file)
        self._marks, self._generation = cursor.marks, cursor.generation
        self._place = self._segments.find(min(cursor.drained, self._segments.last))

    @property
    def last(self) -> int:
        """Sequence of the newest record; 0 before the first."""
        return self._segments.last

    @property
    def pending(self) -> int:
        """Records that JetStream has not acknowledged yet."""
        return self._segments.last - self._place.sequence

    def append(self, subject: str, envelope: EventEnvelope) -> int:
        """Add an event and return its sequence, which an envelope without one of its own also gets. Any thread.

        Raises:
            InvalidInput: the event does not belong on ``subject``.
            Exhausted: the disk, or the spool's share of it, is full; nothing was added.
            Unavailable: the disk cannot be written; nothing was added.
        """
        check_belongs(envelope, subject)

        def sealed(sequence: int) -> bytes:
            stamped = EventEnvelope()
            stamped.CopyFrom(envelope)
            stamped.sequence = envelope.sequence or sequence
            return stamped.SerializeToString()

        sequence = self._segments.append(subject, sealed)
        envelope.sequence = envelope.sequence or sequence
        return sequence

    def after(self, sequence: int) -> Iterator[EventEnvelope]:
        """The events behind ``sequence`` as far as they are kept; see ``forgotten``."""
        return (EventEnvelope.FromString(record.data) for record in self._segments.after(sequence))

    @property
    def forgotten(self) -> int:
        """Records up to this one were delivered and are kept no more; 0 while all are kept."""
        return self._segments.start.sequence

    def sync(self) -> None:
        """Make everything appended so far survive a power cut; raises Exhausted or Unavailable when it may not."""
        self._segments.sync()

    async def drain(self, bus: Bus) -> None:
        """Publish what was and will be appended, in order, for ever; waits while NATS is away."""
        await persist(partial(self._session, bus), "spool")

    def close(self) -> None:
        """Sync and let go of the files; safe to repeat. What is pending is there at the next opening."""
        self._segments.close()

    async def _session(self, bus: Bus) -> None:
        """Deliver until the server changes or a while has passed; then look at the streams again."""
        await self._inspect(bus)
        server, begun = bus.server_id, SYSTEM.monotonic()
        while bus.server_id == server and SYSTEM.monotonic() - begun < INSPECT:
            heed_cancellation()
            records, self._place = self._segments.read(self._place)
            if not records:
                await SYSTEM.sleep(LOOK if not self.pending else 0)
                continue
            try:
                for record in records:
                    await self._deliver(bus, record)
            finally:
                self._write_cursor()
            self._segments.forget(self._place, self._keep_bytes)

    async def _deliver(self, bus: Bus, record: Record) -> None:
        envelope = EventEnvelope.FromString(record.data)
        name = stream_of(record.subject).name
        try:
            message_id = generation_id(envelope.event_id, self._generation)
            receipt = await bus.publish_bytes(record.subject, record.data, message_id=message_id)
        except InvalidInput as error:  # what this server will never take must not stop the line
            await bury(bus, None, consumer="spool", subject=record.subject, data=record.data, reason=error.message)
        else:
            created = self._marks[name].created
            self._marks[name] = Mark(created, receipt.sequence, message_id, SYSTEM.now())
        self._place = Place(record.sequence, self._place.first, record.end)

    async def _inspect(self, bus: Bus) -> None:
        """Compare the streams with what is remembered of them; begin again from the oldest record if one was lost."""
        lost: list[str] = []
        fresh: dict[str, Mark] = {}
        for stream in STREAMS:
            info = await bus.stream_info(stream)
            mark = self._marks.get(stream.name)
            why = await damage(bus, stream, info, mark) if mark else ""
            if why and not stream.shed:
                lost.append(f"{stream.name}: {why}")
            fresh[stream.name] = mark if mark and not why else Mark(info.created)
        self._marks = fresh
        if lost:
            self._place = self._segments.start
            self._generation += 1
            _log.error("spool.sent_again", why=lost, events=self.pending)
        self._write_cursor()

    def _write_cursor(self) -> None:
        """Replace the cursor whole. Not synced: an older or missing one only sends again what consumers drop."""
        cursor = _Cursor(drained=self._place.sequence, generation=self._generation, marks=self._marks)
        fresh = self._cursor_file.with_suffix(".new")
        try:
            fresh.write_text(cursor.model_dump_json(), "utf-8")
            os.replace(fresh, self._cursor_file)
        except OSError as error:
            _log.warning("spool.cursor_not_written", file=str(self._cursor_file), error=str(error))


def _read_cursor(path: Path) -> _Cursor:
    try:
        return _Cursor.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return _Cursor()
    except (ValidationError, OSError) as error:
        _log.warning("spool.cursor_lost", file=str(path), error=str(error))
        return _Cursor()
