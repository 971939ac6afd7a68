"""Tamiyo: what to serve, what to ask the library, which orders to send and which reports to keep."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from google.protobuf import json_format

from esper_core.blueprint.interface import SlotInterface
from esper_core.blueprint.ir import BlueprintIR
from esper_core.blueprint.widening import units
from esper_core.bus import subjects
from esper_core.bus.bus import Bus
from esper_core.bus.database import Connection
from esper_core.bus.envelope import Event, wrap
from esper_core.bus.inbox import consume, watch
from esper_core.bus.outbox import enqueue
from esper_core.control.packet import AdaptationSignal, Command, KernelCandidate
from esper_core.kernel.record import Measurement
from esper_core.pb.esper.bus.v1 import bus_pb2
from esper_core.pb.esper.core.v1 import kernel_pb2, lifecycle_pb2
from esper_core.pb.esper.tamiyo.v1 import tamiyo_pb2_grpc
from esper_core.pb.esper.urza.v1 import urza_pb2, urza_pb2_grpc
from esper_core.rpc.convert import from_proto, to_proto
from esper_core.rpc.server import ServedService
from services.runtime import Platform, Service
from services.tamiyo.candidates import Candidates
from services.tamiyo.controller import Controller
from services.tamiyo.decisions import Decisions, Experience
from services.tamiyo.policies import Policies
from services.tamiyo.servicer import TamiyoServicer

SERVICE = "esper.tamiyo.v1.TamiyoService"
PRINCIPAL = "tamiyo"
PAGE_SIZE = 200
RELOAD_SECONDS = 5.0
UrzaStub: Any = urza_pb2_grpc.UrzaServiceStub  # generated without types


class Library:
    """Validated kernels, as Urza knows them."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub

    async def ask(self, interface_id: str) -> tuple[KernelCandidate, ...]:
        """All validated kernels for an interface.

        Raises:
            Unavailable: the library is away.
        """
        request = urza_pb2.QueryKernelsRequest(
            interface_id=interface_id, status=kernel_pb2.KERNEL_STATUS_VALIDATED, page_size=PAGE_SIZE
        )
        found: list[KernelCandidate] = []
        while True:
            answer = await self._stub.QueryKernels(request)
            found.extend(_candidate(record) for record in answer.kernels)
            if not answer.next_page_token:
                return tuple(found)
            request.page_token = answer.next_page_token


class Reports:
    """Keeps field reports from the bus as experience."""

    def __init__(self, experience: Experience) -> None:
        self._experience = experience

    async def handle(self, connection: Connection, event: Event) -> None:
        """Keep one, in the transaction that also notes its event id."""
        report = event.message
        told = json_format.MessageToDict(report, preserving_proto_field_name=True)
        await self._experience.add(connection, report.report_id, report.run_id, told)


async def send(connection: Connection, command: Command, signal: AdaptationSignal) -> None:
    """Put an order of a decision into the outbox of the connection's transaction."""
    envelope = wrap(
        to_proto(command, lifecycle_pb2.Command),
        producer=PRINCIPAL,
        run_id=command.run_id,
        epoch=signal.epoch,
        causation_id=signal.decision_id,
        correlation_id=command.command_id,
        priority=bus_pb2.PRIORITY_CONTROL,
    )
    await enqueue(connection, subjects.KASMINA_COMMANDS.of(command.run_id), envelope)


async def follow_verdicts(bus: Bus, candidates: Candidates) -> None:
    """Forget what the library said of an interface when a kernel of it was judged."""
    async for event in watch(bus, [subjects.KERNEL_CHARACTERIZED.all]):
        candidates.forget(event.message.interface_id)


async def follow_policy(policies: Policies) -> None:
    """Take over a policy that another process has put in force."""
    while True:
        await asyncio.sleep(RELOAD_SECONDS)
        await policies.refresh()


async def build(platform: Platform) -> Service:
    """The strategic controller, over the schema ``tamiyo``."""
    policies = Policies(platform.database)
    await policies.load()
    candidates = Candidates(Library(UrzaStub(platform.channel(PRINCIPAL))).ask)
    decisions, experience = Decisions(platform.database, send), Experience(platform.database)
    controller = Controller(policies, candidates, decisions)
    since = await decisions.last_ordinal()
    servicer = TamiyoServicer(controller, policies, decisions, experience, platform.database, since)
    reports = partial(
        consume,
        platform.database,
        platform.bus,
        durable="tamiyo-experience",
        subjects=(subjects.FIELD_REPORTS.all,),
        handler=Reports(experience).handle,
    )
    verdicts = partial(follow_verdicts, platform.bus, candidates)
    served = ServedService(SERVICE, tamiyo_pb2_grpc.add_TamiyoServiceServicer_to_server, servicer)
    return Service("tamiyo", (served,), (reports, verdicts, partial(follow_policy, policies)))


def _candidate(record: kernel_pb2.KernelRecord) -> KernelCandidate:
    manifest = record.manifest
    interface = from_proto(manifest.interface, SlotInterface)
    width = units(from_proto(manifest.blueprint, BlueprintIR), interface, dict(manifest.symbols))
    return KernelCandidate(
        kernel_id=manifest.kernel_id,
        blueprint_id=manifest.blueprint_id,
        blueprint_name=manifest.blueprint.name,
        width=width,
        parameters=manifest.parameters,
        flops=manifest.flops,
        foldable=width > 0,
        forward_seconds=record.measurement.forward_seconds,
        learned=from_proto(record.measurement, Measurement).learned if record.HasField("measurement") else None,
        born_of=record.born_of,
    )
