"""Who may publish, read and administer what on our own NATS server: its permissions, made from one table.

``Subject.producers`` says whose events these may be, ``READERS`` who consumes them. What follows from that is all there
is; everything else the server refuses:

- Training processes publish their facts themselves, from their spools. Everybody else's events are in the outbox, and
  Oona alone carries those: no service can put an event on a subject, so none can write another's name into one.
- A service makes, fetches from and acknowledges its own consumers, and buries letters in their names; a training process
  those of runs, which are not known beforehand: any but the declared ones.
- Answers reach a principal under an inbox prefix of its own, which nobody else may subscribe or publish to.
- Oona keeps the streams: only she may make, change or empty them. A spool may look up its own last fact in them.

Does not protect against a reader of the data directory, who holds every seed, nor against one who writes into the
outbox of the database that all services share: Oona carries what is there. One run may read and spoil another's orders:
all are ``tolaria``. Reading is granted by stream, not by subject: NATS does not look at a consumer's filters. An answer
can be sent to a foreign subject; what was published before keeps its own subject there, by which consumers choose, and
the server's own words are no event (a dead letter). An external server has the permissions that its owner gave it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from esper_core.bus.subjects import (
    ADVISORY,
    BLUEPRINT_SUBMITTED,
    CARVE_EVENTS,
    CARVE_ORDERS,
    EPOCH_EVENTS,
    FIELD_REPORTS,
    KASMINA_COMMANDS,
    KERNEL_CHARACTERIZED,
    KERNEL_READY,
    PREFIX,
    RUN_EVENTS,
    SEED_EVENTS,
    SEED_HEALTH,
    STREAMS,
    SUBJECTS,
    Stream,
    Subject,
    consumer_of,
)

KEEPER = "oona"
SPOOLED = "tolaria"
"""Publishes from spools of its own; everybody else's events are in the outbox, which is the keeper's to carry."""


@dataclass(frozen=True)
class Reader:
    """A durable consumer, one per stream that ``subjects`` lie on.

    Attributes:
        durable: its name, as given to ``consume``.
        subjects: what it reads.
    """

    durable: str
    subjects: tuple[Subject, ...]

    @property
    def consumers(self) -> tuple[tuple[Stream, str], ...]:
        """Stream and the server's name of each consumer."""
        streams = dict.fromkeys(subject.stream for subject in self.subjects)
        return tuple((stream, consumer_of(self.durable, stream)) for stream in streams)


READERS: Mapping[str, tuple[Reader, ...]] = MappingProxyType(
    {
        "tamiyo": (Reader("tamiyo-experience", (FIELD_REPORTS,)),),
        "kasmina": (
            Reader("kasmina-seeds", (RUN_EVENTS, SEED_EVENTS, FIELD_REPORTS)),
            Reader("kasmina-telemetry", (SEED_HEALTH,)),
        ),
        "urza": (Reader("urza-usage", (FIELD_REPORTS,)),),
        "tezzeret": (Reader("tezzeret-runs", (RUN_EVENTS,)), Reader("tezzeret-builds", (BLUEPRINT_SUBMITTED,))),
        "urabrask": (
            Reader("urabrask-kernels", (KERNEL_READY,)),
            Reader("urabrask-reports", (FIELD_REPORTS,)),
            Reader("urabrask-warm", (BLUEPRINT_SUBMITTED,)),
        ),
        "tolaria": (Reader("tolaria-runs", (RUN_EVENTS, EPOCH_EVENTS)),),
        "nissa": (Reader("nissa", SUBJECTS),),
        "emrakul": (Reader("emrakul-plans", (RUN_EVENTS, CARVE_EVENTS)),),
        "karn": (
            Reader("karn-runs", (RUN_EVENTS,)),
            Reader("karn-verdicts", (KERNEL_CHARACTERIZED,)),
            Reader("karn-reports", (FIELD_REPORTS,)),
        ),
    }
)
"""The durable consumers of each principal. Those of single runs are ``tolaria``'s, too, on the streams of ``ORDERS``."""

ORDERS = (KASMINA_COMMANDS, CARVE_ORDERS)
"""What every training process reads for its own run, by a consumer named after it."""

WATCHERS: Mapping[str, tuple[Subject, ...]] = MappingProxyType({"tamiyo": (KERNEL_CHARACTERIZED,)})
"""Who looks on, without a consumer, as it is published."""

PRINCIPALS = frozenset({KEEPER, SPOOLED, *READERS, *WATCHERS})
"""Whom the server knows: everybody with business on the bus."""


@dataclass(frozen=True)
class Permissions:
    """What the server lets a principal do; subjects with NATS's wildcards. What is denied is so although it is allowed."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    deny_publish: tuple[str, ...] = ()


def inbox(principal: str) -> str:
    """The prefix of the subjects on which ``principal`` gets its answers."""
    return f"_INBOX_{principal}"


def permissions(principal: str) -> Permissions:
    """What follows from the table for one of ``PRINCIPALS``."""
    own = f"{inbox(principal)}.>"
    if principal == KEEPER:
        kept = tuple(name for stream in STREAMS for name in stream.subjects if not name.startswith(ADVISORY))
        return Permissions((*kept, "$JS.API.>", "$JS.ACK.>"), (own, *kept))
    publish = [subject for reader in READERS.get(principal, ()) for subject in _reading(reader)]
    subscribe = (own, *(subject.all for subject in WATCHERS.get(principal, ())))
    if principal != SPOOLED:
        return Permissions(tuple(publish), subscribe)
    told = [subject for subject in SUBJECTS if SPOOLED in subject.producers]
    marked = dict.fromkeys(subject.stream for subject in told if not subject.stream.shed)
    publish += [
        *(subject.all for subject in told),
        *(f"$JS.API.STREAM.INFO.{stream.name}" for stream in STREAMS),
        *(f"$JS.API.STREAM.MSG.GET.{stream.name}" for stream in marked),
        *(name for subject in ORDERS for name in _consuming(subject.stream, "*")),
        f"{PREFIX}dead.*",
    ]
    foreign = [reader for other, readers in READERS.items() if other != SPOOLED for reader in readers]
    denied = [name for reader in foreign for name in _reading(reader)]
    return Permissions(tuple(dict.fromkeys(publish)), subscribe, tuple(dict.fromkeys(denied)))


def _reading(reader: Reader) -> list[str]:
    """What is published by a process that consumes: requests to the server, and letters it gives up."""
    requests = [name for stream, consumer in reader.consumers for name in _consuming(stream, consumer)]
    return [*requests, f"{PREFIX}dead.{reader.durable}"]


def _consuming(stream: Stream, consumer: str) -> tuple[str, ...]:
    """Make it (or find it made), fetch from it, acknowledge."""
    return (
        f"$JS.API.CONSUMER.CREATE.{stream.name}.{consumer}",
        f"$JS.API.CONSUMER.MSG.NEXT.{stream.name}.{consumer}",
        f"$JS.ACK.{stream.name}.{consumer}.>",
    )
