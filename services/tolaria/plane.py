"""What stands behind a growing run: nothing but itself (offline), or the platform."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import TimeoutError as NotInTime
from pathlib import Path
from typing import Any, Protocol

import torch

from esper_core.bus.spool import Spool
from esper_core.config import Endpoints
from esper_core.control.carve.papers import CarveOrder
from esper_core.control.packet import Command
from esper_core.control.roles import Controller, KernelSource
from esper_core.errors import EsperError
from esper_core.kernel.record import KernelStatus
from esper_core.nn.cache import KernelCache
from esper_core.nn.host import Slot
from esper_core.pb.esper.core.v1 import blueprint_pb2, run_pb2
from esper_core.pb.esper.tezzeret.v1 import tezzeret_pb2, tezzeret_pb2_grpc
from esper_core.pb.esper.urza.v1 import urza_pb2, urza_pb2_grpc
from esper_core.rpc.convert import to_proto
from services.tolaria.config import TolariaConfig
from services.tolaria.facts import Facts
from services.tolaria.history import Boundary
from services.tolaria.link import Link
from services.tolaria.live import View
from services.tolaria.orders import Orders
from services.tolaria.remote import RemoteController, RemoteKernels
from services.tolaria.trainer import Stop

LOOK_SECONDS = 0.5
CALL_SECONDS = 5.0
JUDGED = (int(KernelStatus.VALIDATED), int(KernelStatus.REJECTED), int(KernelStatus.RETIRED))

Widths = Mapping[str, tuple[torch.Size, torch.Size]]
"""Shapes of source and sink by slot."""


class Plane(Protocol):
    """The surroundings of one run.

    Attributes:
        controller, source: the two roles of growing; None: the grower's own.
        facts: tells the platform; None without one.
        sculpted: whether somebody outside decides on carving.
    """

    controller: Controller | None
    source: KernelSource | None
    facts: Facts | None
    sculpted: bool

    def orders(self) -> list[Command]:
        """Orders to seeds from outside since the last call."""
        ...

    def carve_orders(self) -> list[CarveOrder]:
        """Orders to carve from outside since the last call."""
        ...

    def register(self, slots: list[Slot], epoch: int) -> None:
        """Tell that the run begins."""
        ...

    def prepare(self, slots: list[Slot], view: View, stop: Stop) -> None:
        """Wait, as long as the settings say, for kernels that fit the slots."""
        ...

    def epoch(self, boundary: Boundary) -> None:
        """Send what may get lost."""
        ...

    def close(self, view: View) -> None:
        """Deliver what can be delivered, and say what cannot."""
        ...


class Offline:
    """No platform: decisions and kernels come from the process itself."""

    controller: Controller | None = None
    source: KernelSource | None = None
    facts: Facts | None = None
    sculpted = False

    def orders(self) -> list[Command]:
        return []

    def carve_orders(self) -> list[CarveOrder]:
        return []

    def register(self, slots: list[Slot], epoch: int) -> None:
        pass

    def prepare(self, slots: list[Slot], view: View, stop: Stop) -> None:
        pass

    def epoch(self, boundary: Boundary) -> None:
        pass

    def close(self, view: View) -> None:
        pass


class Online:
    """The platform behind one run.

    Args:
        config: the run's settings.
        endpoints: where the platform is, whether or not it runs at this moment.
        run_id: of this run.
        directory: where spool and orders are kept.
    """

    def __init__(self, config: TolariaConfig, endpoints: Endpoints, run_id: str, directory: Path) -> None:
        self.config = config
        self.run_id = run_id
        self.sculpted = True
        self._orders = Orders(directory / "orders.jsonl", Command, "command_id")
        self._carve_orders = Orders(directory / "carve-orders.jsonl", CarveOrder, "order_id")
        self.link = Link(endpoints, run_id, Spool(directory / "spool"), self._orders, self._carve_orders)
        self._facts = Facts(self.link.spool, run_id)
        self.facts: Facts | None = self._facts
        wait = config.morphogenetic.decision_wait_seconds
        cache = KernelCache(config.morphogenetic.growth.cache_bytes)
        self._controller = RemoteController(self.link, wait)
        self.controller: Controller | None = self._controller
        self.source: KernelSource | None = RemoteKernels(
            self.link,
            endpoints.keys_dir / "trust.json",
            cache,
            wait,
            native=config.morphogenetic.native == "trusted",
        )
        self.link.start()
        self._slots: list[Slot] = []
        self._widths: Widths = {}

    def orders(self) -> list[Command]:
        return self._orders.take()

    def carve_orders(self) -> list[CarveOrder]:
        return self._carve_orders.take()

    def register(self, slots: list[Slot], epoch: int) -> None:
        self._slots, self._widths = slots, _widths(slots)
        described = [
            run_pb2.Slot(slot=slot.name, interface=to_proto(slot.interface, blueprint_pb2.SlotInterface))
            for slot in slots
        ]
        self._facts.registered(self.config, described, epoch)

    def prepare(self, slots: list[Slot], view: View, stop: Stop) -> None:
        limit = self.config.morphogenetic.prepare_seconds
        interfaces = sorted({slot.interface.id for slot in slots})
        end = time.monotonic() + limit
        stock = Stock(self.link)
        while time.monotonic() < end and interfaces and not stop.signal:
            counts = stock.look(interfaces)
            if counts is None:
                view.waiting("waiting for the platform", 0, 1)
            else:
                validated, judged, wished = counts
                view.waiting("kernels compiled and measured for this network", judged, wished)
                if wished and judged >= wished:
                    view.say(f"{validated} validated kernels fit the network's {len(slots)} slots")
                    return
            time.sleep(LOOK_SECONDS)
        if limit and not stop.signal:
            view.say(f"not every kernel was ready within {limit:g} s; training begins with those that are")

    def epoch(self, boundary: Boundary) -> None:
        self._tell_growth(boundary.figures.epoch)
        if boundary.health:
            self.link.tell_health(boundary.figures.epoch, boundary.health)

    def _tell_growth(self, epoch: int) -> None:
        """Register again when the host has grown, or was resumed grown: kernels for its new widths are then built ahead."""
        if _widths(self._slots) != self._widths:
            # From the next epoch on: a registration takes back what was told of its epoch and later ones.
            self.register(self._slots, epoch + 1)

    def close(self, view: View) -> None:
        left = self.link.close(self.config.services.drain_seconds)
        if left:
            view.say(
                f"{left} facts of {self.run_id} are not delivered yet: the platform was away; they are kept beside the "
                f"checkpoints and delivered by the next `--resume --name {self.run_id}` with the platform up"
            )
        if self.link.dropped:
            view.say(f"{self.link.dropped} telemetry messages were dropped while the platform was away")


def _widths(slots: list[Slot]) -> Widths:
    """What growing changes of each slot's interface, at the price of looking at two shapes."""
    found = ((slot.name, slot.layers) for slot in slots)
    return {name: (layers[0].weight.shape, layers[1].weight.shape) for name, layers in found if layers is not None}


class Stock:
    """Counts the kernels that the platform has, or is making, for some interfaces."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def look(self, interfaces: list[str]) -> tuple[int, int, int] | None:
        """(validated, judged, wished) over all of ``interfaces``; None while the platform does not answer.

        A wish counts as judged when its kernel has a verdict or its build failed. The sum is 0 wished as long as the
        platform has not heard of every interface.
        """
        try:
            counts = [self._link.submit(self._call(interface)).result(CALL_SECONDS) for interface in interfaces]
        except (EsperError, NotInTime):
            return None
        if any(not wished for _, _, wished in counts):
            return sum(count[0] for count in counts), sum(count[1] for count in counts), 0
        validated, judged, wished = (sum(column) for column in zip(*counts, strict=True))
        return validated, judged, wished

    def _call(self, interface: str) -> Callable[[], Coroutine[Any, Any, tuple[int, int, int]]]:
        return lambda: self._count(interface)

    async def _count(self, interface: str) -> tuple[int, int, int]:
        channel = self._link.channel
        forge = tezzeret_pb2_grpc.TezzeretServiceStub(channel)  # type: ignore[no-untyped-call]
        library = urza_pb2_grpc.UrzaServiceStub(channel)  # type: ignore[no-untyped-call]
        wishes = tezzeret_pb2.ListBuildsRequest(interface_id=interface, page_size=1000)
        builds = await forge.ListBuilds(wishes, timeout=CALL_SECONDS)
        kernels: dict[str, int] = {}
        token = ""
        while True:
            query = urza_pb2.QueryKernelsRequest(interface_id=interface, page_size=100, page_token=token)
            page = await library.QueryKernels(query, timeout=CALL_SECONDS)
            kernels.update({record.manifest.kernel_id: record.status for record in page.kernels})
            token = page.next_page_token
            if not token:
                break
        failed = sum(build.state == tezzeret_pb2.BUILD_STATE_FAILED for build in builds.builds)
        judged = sum(kernels.get(build.kernel_id) in JUDGED for build in builds.builds)
        validated = sum(status == int(KernelStatus.VALIDATED) for status in kernels.values())
        return validated, judged + failed, len(builds.builds)
