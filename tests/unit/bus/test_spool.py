"""The spool keeps what it took, whatever happens to the process, the file or the disk."""

from __future__ import annotations

import errno
import json
import os
import struct
import threading
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_core.bus.envelope import wrap
from esper_core.bus.framing import decode, encode
from esper_core.bus.segments import Place, Segments
from esper_core.bus.spool import Spool
from esper_core.bus.subjects import EPOCH_EVENTS, MAX_MESSAGE, SEED_EVENTS
from esper_core.errors import Conflict, Exhausted, InvalidInput, Unavailable
from esper_core.pb.esper.bus.v1.bus_pb2 import EpochCompleted, EventEnvelope
from esper_core.pb.esper.core.v1.run_pb2 import EpochMetrics

SUBJECT = EPOCH_EVENTS.of("run-1")


def event(epoch: int = 0) -> EventEnvelope:
    return wrap(EpochCompleted(run_id="run-1", metrics=EpochMetrics(epoch=epoch)), producer="tolaria", run_id="run-1")


def open_log(folder: Path, *, after: int = 0, segment_bytes: int = 10**6, max_bytes: int = 10**9) -> Segments:
    return Segments(folder, after=after, segment_bytes=segment_bytes, max_bytes=max_bytes)


def read_all(log: Segments, place: Place | None = None) -> list[tuple[int, str, bytes]]:
    """Every record behind ``place``, as a draining reader comes by them."""
    place = place or log.start
    found: list[tuple[int, str, bytes]] = []
    while place.sequence < log.last:
        records, place = log.read(place)
        for record in records:
            found.append((record.sequence, record.subject, record.data))
            place = Place(record.sequence, place.first, record.end)
    return found


@settings(max_examples=60, deadline=None)
@given(payloads=st.lists(st.binary(max_size=60), min_size=1, max_size=8), data=st.data())
def test_a_file_cut_anywhere_keeps_every_record_before_the_cut(
    tmp_path_factory: pytest.TempPathFactory, payloads: list[bytes], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    log = open_log(folder)
    ends = []
    for payload in payloads:
        log.append("s", lambda _, payload=payload: payload)
        ends.append((folder / f"{1:020d}.log").stat().st_size)
    log.close()
    cut = data.draw(st.integers(0, ends[-1]))
    noise = data.draw(st.sampled_from([b"", b"\0" * 40, b"\xff" * 7, struct.pack(">II", 12, 0) + b"x" * 12]))
    path = folder / f"{1:020d}.log"
    path.write_bytes(path.read_bytes()[:cut] + noise)

    survivors = sum(end <= cut for end in ends)
    log = open_log(folder)
    assert log.last == survivors
    assert [found[2] for found in read_all(log)] == payloads[:survivors]
    assert log.append("s", lambda sequence: b"next") == survivors + 1
    assert [found[2] for found in read_all(log)] == [*payloads[:survivors], b"next"]
    log.close()


@settings(max_examples=60, deadline=None)
@given(
    payloads=st.lists(st.binary(max_size=40), min_size=1, max_size=12),
    segment_bytes=st.integers(1, 200),
    data=st.data(),
)
def test_records_come_back_in_order_over_segments_and_from_any_place(
    tmp_path_factory: pytest.TempPathFactory, payloads: list[bytes], segment_bytes: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    wanted = list(enumerate(payloads, start=1))
    log = open_log(folder, segment_bytes=segment_bytes)
    for _, payload in wanted:
        log.append("s", lambda _, payload=payload: payload)
    log.close()
    log = open_log(folder, segment_bytes=segment_bytes)
    behind = data.draw(st.integers(0, len(payloads)))
    assert [(sequence, payload) for sequence, _, payload in read_all(log, log.find(behind))] == wanted[behind:]
    log.forget(log.find(behind), keep_bytes=0)
    assert [(sequence, payload) for sequence, _, payload in read_all(log, log.find(behind))] == wanted[behind:]
    log.close()


def test_zeros_and_lies_about_length_are_no_records() -> None:
    good = encode(1, "s", b"x")
    for bad in (b"\0" * 64, struct.pack(">II", MAX_MESSAGE * 4, zlib.crc32(b"")), good[:-1], good[:-1] + b"y"):
        assert [record.data for record in decode(good + bad)] == [b"x"]


def test_a_flipped_bit_costs_its_segment_only(tmp_path: Path) -> None:
    log = open_log(tmp_path, segment_bytes=1)  # one record a segment
    for number in range(4):
        log.append("s", lambda sequence, number=number: bytes([number]))
    log.close()
    victim = tmp_path / f"{2:020d}.log"
    raw = bytearray(victim.read_bytes())
    raw[-1] ^= 1
    victim.write_bytes(raw)
    log = open_log(tmp_path, segment_bytes=1)
    assert [sequence for sequence, _, _ in read_all(log)] == [1, 3, 4]
    log.close()


def test_sequences_go_on_over_openings_and_from_where_a_checkpoint_says(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    envelopes = [event(), event()]
    assert [spool.append(SUBJECT, envelope) for envelope in envelopes] == [1, 2]
    assert [envelope.sequence for envelope in envelopes] == [1, 2]
    spool.close()
    spool = Spool(tmp_path, after=10)
    assert spool.append(SUBJECT, event()) == 11
    spool.close()
    spool = Spool(tmp_path, after=3)
    assert (spool.last, spool.pending) == (11, 11)
    spool.close()


def test_many_threads_append_whole_records_without_gaps(tmp_path: Path) -> None:
    spool = Spool(tmp_path, segment_bytes=2000)
    threads = [threading.Thread(target=lambda: [spool.append(SUBJECT, event()) for _ in range(25)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spool.sync()
    spool.close()
    log = open_log(tmp_path)
    found = read_all(log)
    assert [sequence for sequence, _, _ in found] == list(range(1, 101))
    assert [EventEnvelope.FromString(data).sequence for _, _, data in found] == list(range(1, 101))
    log.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    with pytest.raises(Conflict, match="in use"):
        Spool(tmp_path)
    spool.close()
    spool.close()
    with pytest.raises(Unavailable, match="closed"):
        spool.append(SUBJECT, event())
    Spool(tmp_path).close()


def test_what_does_not_belong_is_refused_at_once(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    with pytest.raises(InvalidInput, match="does not travel"):
        spool.append(SEED_EVENTS.of("run-1"), event())
    assert spool.last == 0
    spool.close()


def test_its_share_of_the_disk_is_bounded(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=1000)

    def flood() -> None:
        for _ in range(100):
            spool.append(SUBJECT, event())

    with pytest.raises(Exhausted) as caught:
        flood()
    assert "esperctl up" in caught.value.hint
    assert 0 < spool.last == spool.pending < 10
    spool.close()


def test_a_full_disk_is_an_error_and_leaves_no_torn_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path)
    spool.append(SUBJECT, event(1))
    real = os.write

    def half(file: int, data: bytes) -> int:
        return real(file, data[: len(data) // 2])

    def none(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    for failing in (half, none):
        monkeypatch.setattr(os, "write", failing)
        with pytest.raises(Exhausted, match="no space left"):
            spool.append(SUBJECT, event(2))
    monkeypatch.setattr(os, "write", real)
    assert spool.append(SUBJECT, event(3)) == 2
    spool.close()
    log = open_log(tmp_path)
    assert [EventEnvelope.FromString(data).sequence for _, _, data in read_all(log)] == [1, 2]
    log.close()


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="cannot be written"):
        Spool(tmp_path / "file" / "spool")


@pytest.mark.parametrize("cursor", ["", "nonsense", '{"drained": "x"}', '{"other": 1}'])
def test_a_lost_cursor_means_everything_is_sent_again(tmp_path: Path, cursor: str) -> None:
    spool = Spool(tmp_path)
    spool.append(SUBJECT, event())
    spool.close()
    (tmp_path / "cursor.json").write_text(json.dumps({"drained": 1}))
    spool = Spool(tmp_path)
    assert spool.pending == 0
    spool.close()
    (tmp_path / "cursor.json").write_text(cursor)
    spool = Spool(tmp_path)
    assert spool.pending == 1
    spool.close()


def test_what_stands_behind_a_record_is_read_back_across_segments(tmp_path: Path) -> None:
    log = open_log(tmp_path, segment_bytes=40)
    for number in range(1, 9):
        log.append("s", lambda _, number=number: b"%d" % number)
    assert len(list(tmp_path.glob("*.log"))) > 2
    for sequence in range(9):
        assert [int(record.data) for record in log.after(sequence)] == list(range(sequence + 1, 9))
    reading = log.after(0)
    assert next(reading).sequence == 1
    log.forget(log.find(8), 0)
    left = [record.sequence for record in reading]
    assert left[-1] == 8
    assert len(left) < 7, "what was forgotten meanwhile is passed over"
    log.close()
