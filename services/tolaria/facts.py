"""What a run tells the platform: facts into the local spool, to be delivered whenever the platform is there.

Which facts an epoch gives is a pure function of its history line; a resumed run can therefore tell the ones that a
crash kept it from telling, and no fact is told twice.
"""

from __future__ import annotations

from google.protobuf.message import Message

from esper_core.bus import subjects
from esper_core.bus.envelope import wrap
from esper_core.bus.spool import Spool
from esper_core.errors import EsperError
from esper_core.ids import sha256
from esper_core.log import get
from esper_core.pb.esper.bus.v1 import bus_pb2
from esper_core.pb.esper.core.v1 import carve_pb2, decision_pb2, lifecycle_pb2, run_pb2
from esper_core.rpc.convert import to_proto
from services.tolaria.config import TolariaConfig
from services.tolaria.history import Boundary

log = get(__name__)
PRODUCER = "tolaria"
FINISHED, FAILED, STOPPED = run_pb2.RUN_STATE_FINISHED, run_pb2.RUN_STATE_FAILED, run_pb2.RUN_STATE_STOPPED
Fact = tuple[subjects.Subject, Message]


class Facts:
    """Tells one run's facts.

    Attributes:
        lost: facts that the disk would not take; training goes on without them.
    """

    def __init__(self, spool: Spool, run_id: str) -> None:
        self.spool = spool
        self.run_id = run_id
        self.lost = 0

    @property
    def position(self) -> int:
        """Facts told so far."""
        return self.spool.last

    def registered(self, config: TolariaConfig, slots: list[run_pb2.Slot], epoch: int) -> None:
        """The run begins, or comes back, at ``epoch``."""
        run = run_pb2.Run(
            run_id=self.run_id,
            state=run_pb2.RUN_STATE_RUNNING,
            host=config.model.host,
            dataset=config.dataset.name,
            epochs=config.optimization.epochs,
            seed=config.seed,
            morphogenetic=bool(slots),
            slots=slots,
        )
        native = config.morphogenetic.native == "trusted"
        self._tell((subjects.RUN_EVENTS, bus_pb2.RunRegistered(run=run, epoch=epoch, native=native)), epoch)
        self.spool.sync()

    def epoch(self, boundary: Boundary) -> None:
        """An epoch is over."""
        self._tell_all(of_epoch(self.run_id, boundary), boundary.figures.epoch)

    def catch_up(self, boundary: Boundary, since: int) -> None:
        """Tell what is missing of an epoch's facts, given that none of them stands before fact number ``since``.

        What is there is read from the spool, not counted: registrations and ends of other processes of the run may stand
        between an epoch's facts.
        """
        if self.spool.forgotten > since:  # so much was delivered since that nothing of the epoch can be missing
            return
        epoch = boundary.figures.epoch
        told = {(said.type, said.payload_sha256) for said in self.spool.after(since) if said.epoch == epoch}
        missing = [fact for fact in of_epoch(self.run_id, boundary) if _name(fact[1]) not in told]
        self._tell_all(missing, epoch)

    def ended(self, state: run_pb2.RunState, results: dict[str, float], reason: str, report: str, epoch: int) -> None:
        """The run is over, for now or for good."""
        message = bus_pb2.RunEnded(
            run_id=self.run_id, state=state, results=results, reason=reason[:500], report=report[:1000]
        )
        self._tell((subjects.RUN_EVENTS, message), epoch)
        self.spool.sync()

    def _tell_all(self, facts: list[Fact], epoch: int) -> None:
        for fact in facts:
            self._tell(fact, epoch)
        self.spool.sync()

    def _tell(self, fact: Fact, epoch: int) -> None:
        subject, message = fact
        full = subject.of(self.run_id if subject.per_run else "")
        try:
            self.spool.append(full, wrap(message, producer=PRODUCER, run_id=self.run_id, epoch=epoch))
        except EsperError as error:
            self.lost += 1
            log.error("fact.lost", run_id=self.run_id, subject=full, lost=self.lost, reason=error.message)


def _name(message: Message) -> tuple[str, str]:
    """Type and digest, as the message's envelope has them."""
    return message.DESCRIPTOR.full_name, sha256(message.SerializeToString(deterministic=True))


def of_epoch(run_id: str, boundary: Boundary) -> list[Fact]:
    """The facts of one epoch, in the order they are told."""
    metrics = to_proto(boundary.figures, run_pb2.EpochMetrics)
    facts: list[Fact] = [(subjects.EPOCH_EVENTS, bus_pb2.EpochCompleted(run_id=run_id, metrics=metrics))]
    facts += [(subjects.SEED_EVENTS, to_proto(event, lifecycle_pb2.SeedEvent)) for event in boundary.events]
    facts += [(subjects.FIELD_REPORTS, to_proto(report, decision_pb2.FieldReport)) for report in boundary.reports]
    facts += [(subjects.CARVE_EVENTS, to_proto(event, carve_pb2.CarveEvent)) for event in boundary.carved]
    if boundary.units is not None:
        facts.append((subjects.CARVE_EVENTS, to_proto(boundary.units, carve_pb2.CarveSurvey)))
    return facts
