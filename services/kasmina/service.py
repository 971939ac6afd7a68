"""Kasmina, remote: what to serve, which facts about seeds to write down, and how to ask the library for a kernel."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from esper_core.blueprint.interface import SlotInterface
from esper_core.bus import subjects
from esper_core.bus.database import Connection
from esper_core.bus.envelope import Event, wrap
from esper_core.bus.inbox import consume
from esper_core.bus.outbox import enqueue
from esper_core.control.packet import Command
from esper_core.errors import InvalidInput
from esper_core.pb.esper.bus.v1 import bus_pb2
from esper_core.pb.esper.core.v1 import decision_pb2, kernel_pb2, lifecycle_pb2
from esper_core.pb.esper.kasmina.v1 import kasmina_pb2_grpc
from esper_core.pb.esper.urza.v1 import urza_pb2, urza_pb2_grpc
from esper_core.rpc.convert import from_proto, to_proto
from esper_core.rpc.server import ServedService
from services.bell import Bell
from services.fact import fact_of
from services.kasmina.orders import Kernel, Orders
from services.kasmina.projection import Projection
from services.kasmina.seeds import Seeds
from services.kasmina.servicer import NEWS, KasminaServicer
from services.runtime import Platform, Service

SERVICE = "esper.kasmina.v1.KasminaService"
PRINCIPAL = "kasmina"
FACTS = (subjects.RUN_EVENTS.all, subjects.SEED_EVENTS.all, subjects.FIELD_REPORTS.all)
UrzaStub: Any = urza_pb2_grpc.UrzaServiceStub  # generated without types


class Facts:
    """Takes seed, run and telemetry events to the projection."""

    def __init__(self, projection: Projection, bell: Bell) -> None:
        self._projection = projection
        self._bell = bell

    async def handle(self, connection: Connection, event: Event) -> None:
        """Note one fact, in the transaction that also notes its event id.

        Raises:
            InvalidInput: the event contradicts itself; it belongs among the dead letters.
        """
        fact, message = fact_of(event), event.message
        run_id = fact.run_id
        if isinstance(message, bus_pb2.RunRegistered):
            await self._projection.register(connection, fact, message.epoch, _interfaces(message))
        elif isinstance(message, bus_pb2.RunEnded):
            await self._projection.end(connection, fact, message.state)
        elif isinstance(message, lifecycle_pb2.SeedEvent):
            if message.seed_id != f"{run_id}/{message.slot}/{message.generation}":
                raise InvalidInput(f"seed {message.seed_id!r} is not named after its run, slot and generation")
            await self._projection.change(connection, fact, message.seed_id, message.epoch, _json(message))
        elif isinstance(message, decision_pb2.FieldReport):
            if message.folded:
                generation = _generation(message.seed_id, run_id, message.slot)
                await self._projection.fold(connection, fact, message.slot, generation, message.finished_epoch)
        elif isinstance(message, bus_pb2.SeedTelemetry):
            signals = {signal.slot: _json(signal) for signal in message.signals}
            await self._projection.measure(connection, fact, message.epoch, signals)
        await self._bell.ring(connection, NEWS)


class Library:
    """Kernels, as Urza knows them."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub

    async def find(self, kernel_id: str) -> Kernel:
        """What an order must know of a kernel.

        Raises:
            NotFound: the library has none of that id.
            Unavailable: the library is away.
        """
        answer = await self._stub.GetKernel(urza_pb2.GetKernelRequest(kernel_id=kernel_id))
        record: kernel_pb2.KernelRecord = answer.kernel
        name = kernel_pb2.KernelStatus.Name(record.status).removeprefix("KERNEL_STATUS_")
        return Kernel(record.manifest.kernel_id, record.status, name, record.interface_id, record.reason)


async def send(connection: Connection, command: Command) -> None:
    """Put a command into the outbox of the connection's transaction."""
    envelope = wrap(
        to_proto(command, lifecycle_pb2.Command),
        producer=PRINCIPAL,
        run_id=command.run_id,
        correlation_id=command.command_id,
        priority=bus_pb2.PRIORITY_CONTROL,
    )
    await enqueue(connection, subjects.KASMINA_COMMANDS.of(command.run_id), envelope)


async def build(platform: Platform) -> Service:
    """The remote face of the execution layer, over the schema ``kasmina``."""
    seeds = Seeds(platform.database)
    library = Library(UrzaStub(platform.channel(PRINCIPAL)))
    orders = Orders(platform.database, seeds, library.find, send)
    take = partial(consume, platform.database, platform.bus, handler=Facts(Projection(), platform.bell).handle)
    facts = partial(take, durable="kasmina-seeds", subjects=FACTS)
    telemetry = partial(take, durable="kasmina-telemetry", subjects=(subjects.SEED_HEALTH.all,))
    register = kasmina_pb2_grpc.add_KasminaServiceServicer_to_server
    served = ServedService(SERVICE, register, KasminaServicer(orders, seeds, platform.bell))
    return Service("kasmina", (served,), (facts, telemetry))


def _generation(seed_id: str, run_id: str, slot: str) -> int:
    generation = seed_id.removeprefix(f"{run_id}/{slot}/")
    if generation == seed_id or not (generation.isascii() and generation.isdecimal()) or len(generation) > 9:
        raise InvalidInput(f"seed {seed_id!r} is not named after its run, slot and generation")
    return int(generation)


def _interfaces(message: bus_pb2.RunRegistered) -> Mapping[str, str]:
    return {slot.slot: from_proto(slot.interface, SlotInterface).id for slot in message.run.slots}


def _json(message: Message) -> dict[str, Any]:
    return json_format.MessageToDict(message, preserving_proto_field_name=True, use_integers_for_enums=True)
