"""Streams and subjects, declared once.

Commands, facts, telemetry and dead letters never share a stream: orders are refused rather than shed when the stream
is full, telemetry is shed oldest first. Each subject says which payload types may travel on it; everything else is
poison there, and so is what comes from a principal that has no business on it. Knows nothing of connections.
"""

from __future__ import annotations

from dataclasses import dataclass

from esper_core.errors import InvalidInput, nearest
from esper_core.ids import check_name

PREFIX = "esper."
MAX_PAYLOAD = 256 * 1024  # bytes; the contract's bound on EventEnvelope.payload
MAX_MESSAGE = 2 * MAX_PAYLOAD  # bytes; what a stream stores of one message, poison included
ADVISORY = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES."  # then stream and consumer: the server gave a message up

_DAY = 86_400.0
_MIB = 1024 * 1024


@dataclass(frozen=True)
class Stream:
    """A JetStream stream.

    Attributes:
        name: on the server.
        subjects: what it captures.
        max_age: seconds a message is kept.
        max_bytes: size at which it is full.
        shed: when full, drop the oldest (True) or refuse the newest, so that the publisher waits (False).
        max_message: bytes of one message, headers included.
    """

    name: str
    subjects: tuple[str, ...]
    max_age: float
    max_bytes: int
    shed: bool
    max_message: int = MAX_MESSAGE


CONTROL = Stream("ESPER_CONTROL", ("esper.control.>",), 7 * _DAY, 64 * _MIB, shed=False)
FACTS = Stream(
    "ESPER_FACTS",
    ("esper.compilation.>", "esper.validation.>", "esper.system.>", "esper.innovation.>"),
    7 * _DAY,
    512 * _MIB,
    shed=False,
)
TELEMETRY = Stream("ESPER_TELEMETRY", ("esper.telemetry.>",), _DAY / 4, 64 * _MIB, shed=True)
DEAD = Stream(
    "ESPER_DEAD",
    ("esper.dead.>", *(f"{ADVISORY}{stream.name}.*" for stream in (CONTROL, FACTS, TELEMETRY))),
    30 * _DAY,
    128 * _MIB,
    shed=True,
    max_message=1024 * 1024,
)
STREAMS = (CONTROL, FACTS, TELEMETRY, DEAD)


@dataclass(frozen=True)
class Subject:
    """A subject, or a family of them with the run as last token.

    Attributes:
        name: without prefix, e.g. ``system.events.epoch``.
        stream: where it is kept.
        types: full names of the payload messages that may travel on it.
        producers: principals whose events these may be; anybody else's are refused wherever they are read.
        per_run: whether the run's id is appended.
    """

    name: str
    stream: Stream
    types: frozenset[str]
    producers: frozenset[str]
    per_run: bool = True

    def of(self, run_id: str = "") -> str:
        """The full subject to publish on.

        Raises:
            InvalidInput: the run is missing, superfluous or no valid name.
        """
        if not self.per_run:
            if run_id:
                raise InvalidInput(f"subject {self.name} belongs to no run", hint="leave run_id out")
            return PREFIX + self.name
        return f"{PREFIX}{self.name}.{check_name(run_id, 'run id')}"

    @property
    def all(self) -> str:
        """The filter that matches every subject of this family."""
        return f"{PREFIX}{self.name}.*" if self.per_run else PREFIX + self.name


def _types(package: str, *names: str) -> frozenset[str]:
    return frozenset(f"esper.{package}.v1.{name}" for name in names)


def _by(*principals: str) -> frozenset[str]:
    return frozenset(principals)


_RUN = _by("tolaria")
SEED_HEALTH = Subject("telemetry.seed.health", TELEMETRY, _types("bus", "SeedTelemetry"), _RUN)
KASMINA_COMMANDS = Subject("control.kasmina.commands", CONTROL, _types("core", "Command"), _by("kasmina", "tamiyo"))
CARVE_ORDERS = Subject("control.emrakul.orders", CONTROL, _types("core", "CarveOrder"), _by("emrakul"))
BLUEPRINT_SUBMITTED = Subject(
    "compilation.blueprint.submitted", FACTS, _types("bus", "BuildRequested"), _by("tezzeret", "karn"), per_run=False
)
KERNEL_READY = Subject(
    "compilation.kernel.ready", FACTS, _types("bus", "KernelReady"), _by("tezzeret", "urza"), per_run=False
)
KERNEL_CHARACTERIZED = Subject(
    "validation.kernel.characterized", FACTS, _types("bus", "KernelCharacterized"), _by("urabrask"), per_run=False
)
RUN_EVENTS = Subject("system.events.run", FACTS, _types("bus", "RunRegistered", "RunEnded"), _RUN)
EPOCH_EVENTS = Subject("system.events.epoch", FACTS, _types("bus", "EpochCompleted"), _RUN)
SEED_EVENTS = Subject("system.events.seed", FACTS, _types("core", "SeedEvent"), _RUN)
CARVE_EVENTS = Subject("system.events.carve", FACTS, _types("core", "CarveSurvey", "CarveEvent"), _RUN)
FIELD_REPORTS = Subject("innovation.field_reports", FACTS, _types("core", "FieldReport"), _RUN, per_run=False)
SUBJECTS = (
    SEED_HEALTH,
    KASMINA_COMMANDS,
    CARVE_ORDERS,
    BLUEPRINT_SUBMITTED,
    KERNEL_READY,
    KERNEL_CHARACTERIZED,
    RUN_EVENTS,
    EPOCH_EVENTS,
    SEED_EVENTS,
    CARVE_EVENTS,
    FIELD_REPORTS,
)
TYPES = frozenset[str]().union(*(subject.types for subject in SUBJECTS))


def matches(pattern: str, subject: str) -> bool:
    """Whether ``subject`` is caught by ``pattern``, by NATS's rules for ``*`` and ``>``."""
    want, have = pattern.split("."), subject.split(".")
    for index, part in enumerate(want):
        if part == ">":
            return len(have) > index
        if index >= len(have) or part not in ("*", have[index]):
            return False
    return len(want) == len(have)


def find(subject: str) -> Subject:
    """The declaration that ``subject`` (full, or a filter such as ``Subject.all``) falls under.

    Raises:
        InvalidInput: no declared subject is spelled so.
    """
    for declared in SUBJECTS:
        if subject == declared.all or matches(declared.all, subject):
            return declared
    bare = subject.removeprefix(PREFIX)
    raise InvalidInput(f"{subject!r} is no subject", hint=nearest(bare, (declared.name for declared in SUBJECTS)))


def consumer_of(durable: str, stream: Stream) -> str:
    """What the server calls the part of the consumer ``durable`` that reads ``stream``."""
    return f"{durable}-{stream.name.removeprefix('ESPER_').lower()}"


def stream_of(pattern: str) -> Stream:
    """The stream that keeps what ``pattern`` (a subject or a filter) asks for.

    Raises:
        InvalidInput: none does.
    """
    for stream in STREAMS:
        if any(matches(kept, pattern) or kept == pattern for kept in stream.subjects):
            return stream
    raise InvalidInput(f"no stream keeps {pattern!r}", hint=nearest(pattern, (known.all for known in SUBJECTS)))
