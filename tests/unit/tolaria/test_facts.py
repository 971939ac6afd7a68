"""A run that died while it told of an epoch tells the rest when it comes back, and nothing twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from esper_core.bus.envelope import unwrap
from esper_core.bus.framing import decode
from esper_core.bus.spool import Spool
from esper_core.control.packet import FieldReport, SeedEvent
from esper_core.ids import new_id
from esper_core.lifecycle import State
from esper_core.pb.esper.bus.v1 import bus_pb2
from services.tolaria import facts
from services.tolaria.facts import Facts
from services.tolaria.history import Boundary, Figures
from tests.unit.tolaria.conftest import MakeConfig

RUN = "run-1"
FIGURES = Figures(
    epoch=4, step=50, train_loss=1 / 3, validation_loss=float("nan"), learning_rate=0.1, train_seconds=0.1,
    boundary_seconds=0.2, parameters=7,
)  # fmt: skip
SEED = {"seed_id": "run-1/a:b/0", "run_id": RUN, "slot": "a:b", "epoch": 4}
BOUNDARY = Boundary(
    figures=FIGURES,
    events=(
        SeedEvent(**SEED, source=State.DORMANT, target=State.GERMINATED, reason="it is narrow"),
        SeedEvent(**SEED, source=State.GERMINATED, target=State.TRAINING, reason="its kernel is here"),
    ),
    reports=(
        FieldReport(
            report_id=new_id(), run_id=RUN, seed_id="run-1/c:d/0", slot="c:d", kernel_id="kernel-" + "a" * 64,
            outcome=State.CULLED, contribution=0.1,
        ),
    ),
)  # fmt: skip
ALL = [message for _, message in facts.of_epoch(RUN, BOUNDARY)]


class Killed(BaseException):
    """The process is gone."""


class Mortal(Spool):
    """Takes so many records, and the process dies at the next one."""

    left: int | None = None

    def append(self, subject: str, envelope: bus_pb2.EventEnvelope) -> int:
        if self.left == 0:
            raise Killed
        self.left = None if self.left is None else self.left - 1
        return super().append(subject, envelope)


class Telling:
    """A run's processes, one after the other, over one spool."""

    def __init__(self, folder: Path, config: object) -> None:
        self.folder, self.config = folder, config
        self.since = 0

    def first(self, takes: int) -> None:
        """The one that trains the epoch, notes its checkpoint, and dies after so many of its facts."""
        spool = Mortal(self.folder)
        told = Facts(spool, RUN)
        told.registered(self.config, [], 0)
        self.since, spool.left = told.position, takes
        with pytest.raises(Killed):
            told.epoch(BOUNDARY)
        spool.close()

    def again(self, takes: int | None = None) -> None:
        """One that comes back from the checkpoint, and dies after so many facts, its registration not counted."""
        spool = Mortal(self.folder)
        told = Facts(spool, RUN)
        told.registered(self.config, [], 5)
        spool.left = takes
        try:
            told.catch_up(Boundary.model_validate_json(BOUNDARY.model_dump_json(exclude_defaults=True)), self.since)
        finally:
            spool.close()

    def told(self) -> list[object]:
        """What the spool holds of the epoch."""
        (file,) = self.folder.glob("*.log")
        events = [unwrap(record.data, record.subject) for record in decode(file.read_bytes())]
        return [event.message for event in events if not isinstance(event.message, bus_pb2.RunRegistered)]


@pytest.fixture
def telling(tmp_path: Path, quick: MakeConfig) -> Telling:
    return Telling(tmp_path / "spool", quick())


@pytest.mark.parametrize("takes", range(len(ALL)))
def test_what_a_kill_left_untold_is_told(telling: Telling, takes: int) -> None:
    telling.first(takes)
    assert same(telling.told(), ALL[:takes])
    telling.again()
    assert same(telling.told(), ALL)
    telling.again()
    assert same(telling.told(), ALL)


def test_one_that_dies_again_while_it_catches_up_leaves_no_gap(telling: Telling) -> None:
    telling.first(1)
    for takes in (0, 1, 0, 1):
        with pytest.raises(Killed):
            telling.again(takes)
    telling.again()
    assert same(telling.told(), ALL)


def test_nothing_is_told_again_that_was_delivered_and_forgotten(telling: Telling) -> None:
    """The run told megabytes after the epoch; the first of it, the epoch's own facts, is not kept any more."""
    telling.first(2)
    spool = Spool(telling.folder, segment_bytes=1, keep_bytes=0)
    told = Facts(spool, RUN)
    told.catch_up(BOUNDARY, telling.since)
    for _ in range(2):
        told.registered(telling.config, [], 5)
    place = spool._segments.find(spool.last)
    spool._segments.forget(place, 0)
    before = spool.last
    assert spool.forgotten > telling.since
    told.catch_up(BOUNDARY, telling.since)
    assert spool.last == before
    spool.close()


def same(found: list[Any], wanted: list[Any]) -> bool:
    """By their bytes, for NaN differs from itself."""
    return [bytes(each.SerializeToString(deterministic=True)) for each in found] == [
        each.SerializeToString(deterministic=True) for each in wanted
    ]
