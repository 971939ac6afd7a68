"""Kernels with their papers, made as the forge makes them, and the services' stubs under every identity."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import grpc.aio
from torch import Tensor

from esper_core.blueprint.build import build
from esper_core.blueprint.catalogue import catalogue
from esper_core.blueprint.interface import Layout, SlotInterface
from esper_core.bus.bus import Bus
from esper_core.config import Endpoints
from esper_core.ids import new_id
from esper_core.kernel.manifest import KernelManifest, Provenance
from esper_core.kernel.record import KernelRecord
from esper_core.kernel.sign import Attestation, sign, statement
from esper_core.pb.esper.core.v1 import kernel_pb2
from esper_core.pb.esper.tezzeret.v1 import tezzeret_pb2_grpc
from esper_core.pb.esper.urabrask.v1 import urabrask_pb2_grpc
from esper_core.pb.esper.urza.v1 import urza_pb2, urza_pb2_grpc
from esper_core.rpc.client import open_channel
from esper_core.rpc.convert import from_proto, to_proto

CHUNK = 50_000
_widths = iter(range(2, 10_000))


def interface(**changes: Any) -> SlotInterface:
    """A foldable slot in an MLP that no other test has."""
    figures = {"in_width": 16, "out_width": 10, "hidden_width": next(_widths), "activation": "relu", "foldable": True}
    return SlotInterface(**{"layout": Layout.FEATURES, **figures, **changes})


@dataclass(frozen=True)
class Kernel:
    """A kernel and its build statement."""

    manifest: KernelManifest
    blob: bytes
    attestation: Attestation


@dataclass
class Innovation:
    """The running services."""

    endpoints: Endpoints
    database: asyncpg.Pool[asyncpg.Record]
    bus: Bus
    channels: dict[str, grpc.aio.Channel] = field(default_factory=dict)

    @classmethod
    async def connect(cls, endpoints: Endpoints) -> Innovation:
        probe = open_channel(endpoints.grpc_address, tls_dir=endpoints.tls_dir, principal="operator")
        async with asyncio.timeout(20):
            await probe.channel_ready()
        await probe.close()
        pool = await asyncpg.create_pool(endpoints.postgres_dsn.get_secret_value(), min_size=1, max_size=3)
        return cls(endpoints, pool, await Bus.join(endpoints, "oona", "test"))

    async def close(self) -> None:
        for channel in self.channels.values():
            await channel.close()
        await self.bus.close()
        await self.database.close()

    def channel(self, principal: str) -> grpc.aio.Channel:
        if principal not in self.channels:
            self.channels[principal] = open_channel(
                self.endpoints.grpc_address, tls_dir=self.endpoints.tls_dir, principal=principal
            )
        return self.channels[principal]

    def urza(self, principal: str = "operator") -> Any:
        return urza_pb2_grpc.UrzaServiceStub(self.channel(principal))

    def tezzeret(self, principal: str = "operator") -> Any:
        return tezzeret_pb2_grpc.TezzeretServiceStub(self.channel(principal))

    def urabrask(self, principal: str = "operator") -> Any:
        return urabrask_pb2_grpc.UrabraskServiceStub(self.channel(principal))

    def key(self, principal: str) -> bytes:
        return (self.endpoints.keys_dir / f"{principal}.key").read_bytes()

    def make(
        self,
        slot: SlotInterface,
        name: str = "bottleneck_mlp",
        *,
        symbols: Mapping[str, int] | None = None,
        spoil: Callable[[dict[str, Tensor]], None] | None = None,
        signer: str = "tezzeret",
    ) -> Kernel:
        """A kernel, honest unless ``spoil`` changes its weights, with papers that fit it in any case."""
        import safetensors.torch

        ir = catalogue()[name]
        state = {key: tensor.clone() for key, tensor in build(ir, slot, symbols, seed=1).state_dict().items()}
        if spoil:
            spoil(state)
        blob = safetensors.torch.save(state)
        manifest = KernelManifest.describe(ir, slot, blob, Provenance(compiler="test"), symbols=symbols, seed=1)
        return self.signed(manifest, blob, signer)

    def signed(self, manifest: KernelManifest, blob: bytes, signer: str = "tezzeret") -> Kernel:
        return Kernel(manifest, blob, sign(statement(manifest, "build", {}), self.key(signer)))

    async def upload(self, kernel: Kernel, principal: str = "tezzeret") -> bool:
        """Whether it was new."""
        answer = await self.urza(principal).UploadKernel(parts(kernel))
        assert answer.kernel_id == kernel.manifest.kernel_id
        return bool(answer.created)

    async def record(self, kernel_id: str) -> KernelRecord:
        answer = await self.urza().GetKernel(urza_pb2.GetKernelRequest(kernel_id=kernel_id))
        return from_proto(answer.kernel, KernelRecord)


async def parts(kernel: Kernel) -> AsyncIterator[urza_pb2.UploadKernelRequest]:
    """An upload, piece by piece."""
    header = urza_pb2.KernelHeader(
        manifest=to_proto(kernel.manifest, kernel_pb2.KernelManifest),
        attestation=to_proto(kernel.attestation, kernel_pb2.Attestation),
    )
    yield urza_pb2.UploadKernelRequest(header=header)
    for start in range(0, len(kernel.blob), CHUNK):
        yield urza_pb2.UploadKernelRequest(chunk=kernel.blob[start : start + CHUNK])


async def until(condition: Callable[[], Awaitable[Any]], seconds: float = 150.0) -> Any:
    """Wait until ``condition`` is true and return what it said."""
    async with asyncio.timeout(seconds):
        while not (said := await condition()):  # noqa: ASYNC110 - what is awaited happens in a server
            await asyncio.sleep(0.03)
        return said


def run_id() -> str:
    return f"run-{new_id()[-12:]}"
