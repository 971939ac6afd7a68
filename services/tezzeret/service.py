"""Tezzeret: what to serve, which events order builds, and the worker that carries them out."""

from __future__ import annotations

import os
from functools import partial

from esper_core.bus import subjects
from esper_core.bus.inbox import consume
from esper_core.pb.esper.tezzeret.v1 import tezzeret_pb2_grpc
from esper_core.pb.esper.urza.v1 import urza_pb2_grpc
from esper_core.rpc.server import ServedService
from services.runtime import Platform, Service
from services.tezzeret.designs import Designs
from services.tezzeret.orders import Orders
from services.tezzeret.servicer import TezzeretServicer
from services.tezzeret.worker import POLITE, PRINCIPAL, Worker

SERVICE = "esper.tezzeret.v1.TezzeretService"


async def build(platform: Platform) -> Service:
    """The forge over the schema ``tezzeret``; it reads and stores by way of Urza like everybody else."""
    urza = urza_pb2_grpc.UrzaServiceStub(platform.channel(PRINCIPAL))  # type: ignore[no-untyped-call]
    designs = Designs(urza)
    orders = Orders(platform.database, platform.bell, designs)
    key = platform.endpoints.keys_dir / f"{PRINCIPAL}.key"
    worker = Worker(platform.database, platform.bell, urza, designs, key, polite=os.environ.get(POLITE) != "0")
    take = partial(consume, platform.database, platform.bus)
    runs = partial(take, durable="tezzeret-runs", subjects=(subjects.RUN_EVENTS.all,), handler=orders.on_run)
    wishes = partial(
        take, durable="tezzeret-builds", subjects=(subjects.BLUEPRINT_SUBMITTED.of(),), handler=orders.on_wish
    )
    register = tezzeret_pb2_grpc.add_TezzeretServiceServicer_to_server
    served = ServedService(SERVICE, register, TezzeretServicer(platform.database, orders))
    return Service(PRINCIPAL, (served,), (runs, wishes, worker.run))
