"""Karn: what to serve, what to listen to, and the gardener that breeds."""

from __future__ import annotations

from functools import partial
from typing import Any

from esper_core.bus import subjects
from esper_core.bus.inbox import consume
from esper_core.pb.esper.karn.v1 import karn_pb2_grpc
from esper_core.pb.esper.tezzeret.v1 import tezzeret_pb2_grpc
from esper_core.pb.esper.urza.v1 import urza_pb2_grpc
from esper_core.rpc.server import ServedService
from services.karn.gardener import Gardener
from services.karn.hearing import Hearing
from services.karn.nursery import Nursery
from services.karn.searches import Searches
from services.karn.servicer import KarnServicer
from services.karn.trade import Trade
from services.runtime import Platform, Service

SERVICE = "esper.karn.v1.KarnService"
PRINCIPAL = "karn"
UrzaStub: Any = urza_pb2_grpc.UrzaServiceStub  # generated without types
TezzeretStub: Any = tezzeret_pb2_grpc.TezzeretServiceStub


async def build(platform: Platform) -> Service:
    """The architect, over the schema ``karn``."""
    channel = platform.channel(PRINCIPAL)
    trade = Trade(UrzaStub(channel), TezzeretStub(channel))
    nursery, searches = Nursery(platform.database), Searches(platform.database)
    patience = platform.endpoints.upkeep.verdict_seconds
    gardener = Gardener(platform.database, platform.bell, nursery, searches, trade, patience)
    hearing = Hearing(nursery, trade, platform.bell)
    take = partial(consume, platform.database, platform.bus)
    heard = (
        partial(take, durable="karn-runs", subjects=(subjects.RUN_EVENTS.all,), handler=hearing.on_run),
        partial(
            take, durable="karn-verdicts", subjects=(subjects.KERNEL_CHARACTERIZED.of(),), handler=hearing.on_verdict
        ),
        partial(take, durable="karn-reports", subjects=(subjects.FIELD_REPORTS.of(),), handler=hearing.on_report),
    )
    servicer = KarnServicer(platform.database, platform.bell, nursery, searches, gardener)
    register = karn_pb2_grpc.add_KarnServiceServicer_to_server
    return Service(PRINCIPAL, (ServedService(SERVICE, register, servicer),), (*heard, gardener.run))
