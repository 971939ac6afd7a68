"""The run's only connection to the platform: one background thread with one event loop that owns every channel.

The training thread hands work in without waiting and picks results up at epoch boundaries. While the platform is away,
facts wait in the spool, telemetry is dropped and counted, calls fail quickly, and both sides meet again by themselves.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import grpc.aio

from esper_core.bus import subjects
from esper_core.bus.bus import Bus
from esper_core.bus.envelope import Event, wrap
from esper_core.bus.inbox import consume_plain
from esper_core.bus.spool import Spool
from esper_core.config import Endpoints
from esper_core.control.carve.papers import CarveOrder
from esper_core.control.packet import Command, HealthSignal
from esper_core.errors import EsperError, Exhausted, InvalidInput
from esper_core.log import get
from esper_core.pb.esper.bus.v1 import bus_pb2
from esper_core.pb.esper.core.v1 import carve_pb2, telemetry_pb2
from esper_core.rpc.client import open_channel
from esper_core.rpc.convert import from_proto, to_proto
from services.tolaria.orders import Orders

log = get(__name__)
PRINCIPAL = "tolaria"
CALLS_AT_ONCE = 16
TELEMETRY_WAITING = 64
SIGNALS_PER_MESSAGE = 512
T = TypeVar("T")


class Link:
    """Connects one run to the platform.

    Args:
        endpoints: where the platform is.
        run_id: whose orders to listen to.
        spool: facts to deliver; closed with the link.
        orders: where orders to seeds go.
        carve_orders: where orders to carve go.

    Attributes:
        dropped: telemetry messages that were not sent.
    """

    def __init__(
        self, endpoints: Endpoints, run_id: str, spool: Spool, orders: Orders[Command], carve_orders: Orders[CarveOrder]
    ) -> None:
        self.endpoints = endpoints
        self.run_id = run_id
        self.spool = spool
        self.orders = orders
        self.carve_orders = carve_orders
        self.dropped = 0
        self.channel: grpc.aio.Channel
        self._loop = asyncio.new_event_loop()
        self._telemetry: asyncio.Queue[bus_pb2.SeedTelemetry] = asyncio.Queue(TELEMETRY_WAITING)
        self._pending: set[concurrent.futures.Future[Any]] = set()
        self._bus: Bus | None = None
        self._ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="esper-link", daemon=True)

    def start(self) -> None:
        """Begin to connect; returns once calls can be made, whether or not the platform is there.

        Raises:
            NotFound: this run's certificate is not under the platform's data directory.
        """
        self._thread.start()
        self._ready.result()

    @property
    def connected(self) -> bool:
        """Whether the bus is on the line at this moment."""
        return self._bus is not None and self._bus.connected

    def submit(self, call: Callable[[], Coroutine[Any, Any, T]]) -> concurrent.futures.Future[T]:
        """Run ``call`` in the background.

        Raises:
            Exhausted: too many calls are under way; nothing was begun.
        """
        self._pending = {future for future in self._pending if not future.done()}
        if len(self._pending) >= CALLS_AT_ONCE:
            raise Exhausted(f"{CALLS_AT_ONCE} calls to the platform are under way", hint="they end by themselves")
        future = asyncio.run_coroutine_threadsafe(call(), self._loop)
        self._pending.add(future)
        return future

    def tell_health(self, epoch: int, signals: tuple[HealthSignal, ...]) -> None:
        """Send vital signs if there is room; they are dropped and counted otherwise."""
        for first in range(0, len(signals), SIGNALS_PER_MESSAGE):
            message = bus_pb2.SeedTelemetry(
                run_id=self.run_id,
                epoch=epoch,
                signals=[
                    to_proto(signal, telemetry_pb2.HealthSignal)
                    for signal in signals[first : first + SIGNALS_PER_MESSAGE]
                ],
            )
            self._loop.call_soon_threadsafe(self._enqueue, message)

    def close(self, drain_seconds: float) -> int:
        """Wait up to ``drain_seconds`` for the spool to empty, then disconnect.

        Returns:
            Facts that are still in the spool.
        """
        end = time.monotonic() + drain_seconds
        while self.spool.pending and time.monotonic() < end and self._thread.is_alive():
            time.sleep(0.05)
        left = self.spool.pending
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(timeout=10)
        self.spool.close()
        self.orders.close()
        self.carve_orders.close()
        return left

    def _enqueue(self, message: bus_pb2.SeedTelemetry) -> None:
        try:
            self._telemetry.put_nowait(message)
        except asyncio.QueueFull:
            self.dropped += 1

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._main())
        finally:
            self._loop.close()

    async def _main(self) -> None:
        try:
            self.channel = open_channel(
                self.endpoints.grpc_address, tls_dir=self.endpoints.tls_dir, principal=PRINCIPAL
            )
        except EsperError as error:
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        work = asyncio.create_task(self._keep(self._converse()))
        await self._stopping.wait()
        mine = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not mine]
        for task in others:
            task.cancel()
        await asyncio.gather(work, *others, return_exceptions=True)
        if self._bus is not None:
            await self._bus.close()
        await self.channel.close()

    async def _converse(self) -> None:
        """Everything that goes over the bus, for as long as the run lasts."""
        self._bus = await Bus.join(self.endpoints, PRINCIPAL, f"{PRINCIPAL}-{self.run_id}", timeout=None)
        bus = self._bus
        await asyncio.gather(
            self._keep(self.spool.drain(bus)), self._keep(self._listen(bus)), self._keep(self._send_telemetry(bus))
        )

    async def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Do ``work``; when it is refused for good, say so and let the rest go on."""
        try:
            await work
        except EsperError as error:
            log.error("link.refused", run_id=self.run_id, reason=error.message, hint=error.hint)

    async def _listen(self, bus: Bus) -> None:
        mine = [subject.of(self.run_id) for subject in (subjects.KASMINA_COMMANDS, subjects.CARVE_ORDERS)]
        await consume_plain(bus, durable=f"{PRINCIPAL}-{self.run_id}", subjects=mine, handler=self._ordered)

    async def _ordered(self, event: Event) -> None:
        """Keep an order; who may give which, the bus has checked."""
        if not isinstance(event.message, carve_pb2.CarveOrder):
            self.orders.keep(from_proto(event.message, Command))
            return
        order = from_proto(event.message, CarveOrder)
        if order.run_id != self.run_id:
            raise InvalidInput(f"an order for {order.run_id!r} came to {self.run_id!r}")
        self.carve_orders.keep(order)

    async def _send_telemetry(self, bus: Bus) -> None:
        subject = subjects.SEED_HEALTH.of(self.run_id)
        while True:
            message = await self._telemetry.get()
            envelope = wrap(
                message,
                producer=PRINCIPAL,
                run_id=self.run_id,
                epoch=message.epoch,
                priority=bus_pb2.PRIORITY_BULK,
            )
            try:
                await bus.publish(subject, envelope)
            except EsperError as error:
                self.dropped += 1
                log.debug("telemetry.dropped", run_id=self.run_id, dropped=self.dropped, reason=error.message)
