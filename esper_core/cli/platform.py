"""The running platform as the command line sees it: one channel, one stub per service."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc.aio

from esper_core.config import Endpoints, read_endpoints
from esper_core.pb.esper.emrakul.v1 import emrakul_pb2, emrakul_pb2_grpc
from esper_core.pb.esper.karn.v1 import karn_pb2, karn_pb2_grpc
from esper_core.pb.esper.kasmina.v1 import kasmina_pb2, kasmina_pb2_grpc
from esper_core.pb.esper.nissa.v1 import nissa_pb2, nissa_pb2_grpc
from esper_core.pb.esper.tamiyo.v1 import tamiyo_pb2, tamiyo_pb2_grpc
from esper_core.pb.esper.tezzeret.v1 import tezzeret_pb2, tezzeret_pb2_grpc
from esper_core.pb.esper.tolaria.v1 import tolaria_pb2, tolaria_pb2_grpc
from esper_core.pb.esper.urabrask.v1 import urabrask_pb2, urabrask_pb2_grpc
from esper_core.pb.esper.urza.v1 import urza_pb2, urza_pb2_grpc
from esper_core.rpc.client import open_channel

SERVICES: tuple[str, ...] = tuple(
    service.full_name
    for module in (
        urza_pb2,
        tezzeret_pb2,
        urabrask_pb2,
        tamiyo_pb2,
        kasmina_pb2,
        tolaria_pb2,
        nissa_pb2,
        karn_pb2,
        emrakul_pb2,
    )
    for service in module.DESCRIPTOR.services_by_name.values()
)
"""Full names of the services a whole platform serves, e.g. ``esper.urza.v1.UrzaService``."""


def stub(cls: Callable[[grpc.aio.Channel], Any], channel: grpc.aio.Channel) -> Any:
    """A generated stub, whose class carries no types."""
    return cls(channel)


class Platform:
    """One stub per service. Calls raise the ``EsperError`` the server raised."""

    def __init__(self, endpoints: Endpoints, channel: grpc.aio.Channel) -> None:
        self.endpoints = endpoints
        self.channel = channel
        self.urza = stub(urza_pb2_grpc.UrzaServiceStub, channel)
        self.tezzeret = stub(tezzeret_pb2_grpc.TezzeretServiceStub, channel)
        self.urabrask = stub(urabrask_pb2_grpc.UrabraskServiceStub, channel)
        self.tamiyo = stub(tamiyo_pb2_grpc.TamiyoServiceStub, channel)
        self.kasmina = stub(kasmina_pb2_grpc.KasminaServiceStub, channel)
        self.tolaria = stub(tolaria_pb2_grpc.TolariaServiceStub, channel)
        self.karn = stub(karn_pb2_grpc.KarnServiceStub, channel)
        self.emrakul = stub(emrakul_pb2_grpc.EmrakulServiceStub, channel)
        self.nissa = stub(nissa_pb2_grpc.NissaServiceStub, channel)


@contextlib.asynccontextmanager
async def dial(data_dir: Path) -> AsyncIterator[Platform]:
    """The platform under ``data_dir``, as principal ``operator``.

    Raises:
        NotFound: nothing was ever started there.
        Corrupt: what describes it is damaged.
    """
    endpoints = read_endpoints(data_dir)
    channel = open_channel(endpoints.grpc_address, tls_dir=endpoints.tls_dir, principal="operator")
    try:
        yield Platform(endpoints, channel)
    finally:
        await channel.close()
