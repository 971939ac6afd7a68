"""Urabrask: what to serve, which events bring kernels and reports, the judge, and what runs beside him."""

from __future__ import annotations

from functools import partial

from esper_core.bus import subjects
from esper_core.bus.database import Connection
from esper_core.bus.envelope import Event
from esper_core.bus.inbox import consume, consume_plain
from esper_core.pb.esper.bus.v1 import bus_pb2
from esper_core.pb.esper.urabrask.v1 import urabrask_pb2_grpc
from esper_core.pb.esper.urza.v1 import urza_pb2_grpc
from esper_core.rpc.server import ServedService
from services.bell import Bell
from services.runtime import Platform, Service
from services.urabrask import evaluations
from services.urabrask.experience import Experience
from services.urabrask.judge import NEWS, PRINCIPAL, Judge
from services.urabrask.library import Library
from services.urabrask.retag import Retag
from services.urabrask.servicer import UrabraskServicer

SERVICE = "esper.urabrask.v1.UrabraskService"
TRUST_FILE = "trust.json"


async def build(platform: Platform) -> Service:
    """The evaluation engine over the schema ``urabrask``."""
    keys = platform.endpoints.keys_dir
    stub = urza_pb2_grpc.UrzaServiceStub(platform.channel(PRINCIPAL))  # type: ignore[no-untyped-call]
    library = Library(stub, keys / f"{PRINCIPAL}.key")
    judge = Judge(platform.database, platform.bell, library, keys / TRUST_FILE)
    learner, retag = Experience(platform.database, platform.bell), Retag(platform.database, platform.bell, library)
    kernels = partial(
        consume,
        platform.database,
        platform.bus,
        durable="urabrask-kernels",
        subjects=(subjects.KERNEL_READY.of(),),
        handler=partial(on_kernel, platform.bell),
    )
    reports = partial(
        consume,
        platform.database,
        platform.bus,
        durable="urabrask-reports",
        subjects=(subjects.FIELD_REPORTS.of(),),
        handler=learner.on_report,
    )
    foresee = partial(
        consume_plain,
        platform.bus,
        durable="urabrask-warm",
        subjects=(subjects.BLUEPRINT_SUBMITTED.of(),),
        handler=partial(on_wish, judge),
    )
    register = urabrask_pb2_grpc.add_UrabraskServiceServicer_to_server
    served = ServedService(SERVICE, register, UrabraskServicer(platform.database, platform.bell, library, retag))
    return Service(PRINCIPAL, (served,), (kernels, foresee, reports, judge.run, learner.run, retag.run))


async def on_kernel(bell: Bell, connection: Connection, event: Event) -> None:
    """Queue a kernel that has been built, in the transaction that also notes the event's id."""
    message: bus_pb2.KernelReady = event.message
    await evaluations.add(connection, message.kernel_id, message.interface_id)
    await bell.ring(connection, NEWS)


async def on_wish(judge: Judge, _: Event) -> None:
    """A kernel will come: have the bench ready by then, for its start takes as long as the forge's."""
    await judge.child.warm()
