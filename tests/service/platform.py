"""A platform to test services on: the real composition root on free ports, with a database of its own.

``Stage`` tells facts as a training process would (straight onto the bus, with sequences of its run) and dials as any
principal. Kernels come into the library the hard way: uploaded by Tezzeret's identity, judged by Urabrask's.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import asyncpg
import grpc
from google.protobuf.message import Message
from pydantic import SecretStr

from esper_core.blueprint.catalogue import catalogue
from esper_core.blueprint.interface import Layout, SlotInterface
from esper_core.bus import subjects
from esper_core.bus.bus import Bus
from esper_core.bus.envelope import wrap
from esper_core.config import Endpoints
from esper_core.errors import EsperError
from esper_core.kernel.manifest import KernelManifest, Provenance
from esper_core.kernel.sign import Role, sign, statement
from esper_core.lifecycle import State
from esper_core.pb.esper.bus.v1 import bus_pb2
from esper_core.pb.esper.core.v1 import blueprint_pb2, kernel_pb2, lifecycle_pb2, run_pb2, telemetry_pb2
from esper_core.pb.esper.emrakul.v1 import emrakul_pb2_grpc
from esper_core.pb.esper.kasmina.v1 import kasmina_pb2_grpc
from esper_core.pb.esper.nissa.v1 import nissa_pb2_grpc
from esper_core.pb.esper.tamiyo.v1 import tamiyo_pb2_grpc
from esper_core.pb.esper.tolaria.v1 import tolaria_pb2_grpc
from esper_core.pb.esper.urza.v1 import urza_pb2, urza_pb2_grpc
from esper_core.rpc.client import open_channel
from esper_core.rpc.convert import to_proto
from esper_core.store.postgres import open_pool
from services import composition

NAMES = ("oona", "urza", "tamiyo", "kasmina", "tolaria", "nissa", "emrakul")
INTERFACE = SlotInterface(
    layout=Layout.FEATURES, in_width=16, out_width=12, hidden_width=4, activation="relu", foldable=True
)
OTHER_INTERFACE = INTERFACE.model_copy(update={"in_width": 17})
SLOT = "fc1:fc2"
STUBS: dict[str, Any] = {
    "urza": urza_pb2_grpc.UrzaServiceStub,
    "tamiyo": tamiyo_pb2_grpc.TamiyoServiceStub,
    "kasmina": kasmina_pb2_grpc.KasminaServiceStub,
    "tolaria": tolaria_pb2_grpc.TolariaServiceStub,
    "emrakul": emrakul_pb2_grpc.EmrakulServiceStub,
    "nissa": nissa_pb2_grpc.NissaServiceStub,
}
T = TypeVar("T")


@dataclass
class Stage:
    """A running platform and the roles that tests play on it."""

    endpoints: Endpoints
    bus: Bus
    database: asyncpg.Pool[asyncpg.Record]
    channels: dict[str, grpc.aio.Channel] = field(default_factory=dict)
    sequences: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def stub(self, service: str, principal: str = "operator") -> Any:
        """Dial a service as ``principal``."""
        if principal not in self.channels:
            self.channels[principal] = open_channel(
                self.endpoints.grpc_address, tls_dir=self.endpoints.tls_dir, principal=principal
            )
        return STUBS[service](self.channels[principal])

    async def hang_up(self) -> None:
        while self.channels:
            await self.channels.popitem()[1].close()

    def seal(self, message: Message, run_id: str, epoch: int = 0, sequence: int | None = None) -> bus_pb2.EventEnvelope:
        """An envelope as the run's training process would make it; the next sequence unless given."""
        if sequence is None:
            self.sequences[run_id] += 1
            sequence = self.sequences[run_id]
        return wrap(message, producer="tolaria", run_id=run_id, epoch=epoch, sequence=sequence)

    async def send(self, subject: subjects.Subject, envelope: bus_pb2.EventEnvelope) -> None:
        await self.bus.publish(subject.of(envelope.run_id if subject.per_run else ""), envelope)

    async def register(self, run_id: str, slots: tuple[str, ...] = (SLOT,), epoch: int = 0) -> None:
        """Tell that a run begins, or comes back at ``epoch``."""
        await self.send(subjects.RUN_EVENTS, self.seal(registration(run_id, slots, epoch), run_id, epoch))

    async def epoch(self, run_id: str, epoch: int, loss: float = 1.0) -> None:
        await self.send(subjects.EPOCH_EVENTS, self.seal(epoch_completed(run_id, epoch, loss), run_id, epoch))

    async def seed(self, run_id: str, source: State, target: State, epoch: int, **fields: Any) -> None:
        event = seed_event(run_id, source, target, epoch, **fields)
        await self.send(subjects.SEED_EVENTS, self.seal(event, run_id, epoch))

    async def end(self, run_id: str, state: int = run_pb2.RUN_STATE_FINISHED, reason: str = "") -> None:
        ended = bus_pb2.RunEnded(run_id=run_id, state=state, results={"test_accuracy": 0.75}, reason=reason)
        await self.send(subjects.RUN_EVENTS, self.seal(ended, run_id))

    async def kernel(
        self, interface: SlotInterface = INTERFACE, *, seed: int = 0, width: int = 4, judge: bool = True
    ) -> str:
        """Bring a kernel into the library, VALIDATED unless ``judge`` is off; returns its id."""
        manifest = KernelManifest.describe(
            catalogue()["bottleneck_mlp"],
            interface,
            f"weights {seed}".encode(),
            Provenance(compiler="test"),
            symbols={"width": width},
            seed=seed,
        )
        header = urza_pb2.KernelHeader(
            manifest=to_proto(manifest, kernel_pb2.KernelManifest), attestation=self._signed(manifest, "build")
        )
        parts = [
            urza_pb2.UploadKernelRequest(header=header),
            urza_pb2.UploadKernelRequest(chunk=f"weights {seed}".encode()),
        ]
        await self.stub("urza", "tezzeret").UploadKernel(_each(parts))
        if judge:
            await self.judge(manifest)
        return manifest.kernel_id

    async def judge(self, manifest: KernelManifest) -> None:
        request = urza_pb2.UpdateKernelStatusRequest(
            kernel_id=manifest.kernel_id,
            status=kernel_pb2.KERNEL_STATUS_VALIDATED,
            reason="measured in a test",
            measurement=kernel_pb2.Measurement(batch=8, forward_seconds=1e-4, repetitions=3, deterministic=True),
            attestation=self._signed(manifest, "validation"),
        )
        await self.stub("urza", "urabrask").UpdateKernelStatus(request)
        verdict = bus_pb2.KernelCharacterized(
            kernel_id=manifest.kernel_id,
            status=kernel_pb2.KERNEL_STATUS_VALIDATED,
            interface_id=manifest.interface_id,
        )
        await self.send(subjects.KERNEL_CHARACTERIZED, wrap(verdict, producer="urabrask"))

    def _signed(self, manifest: KernelManifest, role: Role) -> kernel_pb2.Attestation:
        signer = {"build": "tezzeret", "validation": "urabrask"}[role]
        key = (self.endpoints.keys_dir / f"{signer}.key").read_bytes()
        predicate = {"verdict": "VALIDATED"} if role == "validation" else {}
        return to_proto(sign(statement(manifest, role, predicate), key), kernel_pb2.Attestation)


def registration(run_id: str, slots: tuple[str, ...] = (SLOT,), epoch: int = 0) -> bus_pb2.RunRegistered:
    run = run_pb2.Run(
        run_id=run_id,
        host="mlp",
        dataset="digits",
        epochs=30,
        seed=7,
        morphogenetic=True,
        slots=[run_pb2.Slot(slot=slot, interface=to_proto(INTERFACE, blueprint_pb2.SlotInterface)) for slot in slots],
    )
    return bus_pb2.RunRegistered(run=run, epoch=epoch)


def epoch_completed(run_id: str, epoch: int, loss: float = 1.0) -> bus_pb2.EpochCompleted:
    metrics = run_pb2.EpochMetrics(epoch=epoch, step=10 * epoch, train_loss=loss, validation_accuracy=0.5)
    return bus_pb2.EpochCompleted(run_id=run_id, metrics=metrics)


def seed_event(
    run_id: str, source: State, target: State, epoch: int, *, slot: str = SLOT, generation: int = 0, **fields: Any
) -> lifecycle_pb2.SeedEvent:
    return lifecycle_pb2.SeedEvent(
        seed_id=f"{run_id}/{slot}/{generation}",
        run_id=run_id,
        slot=slot,
        generation=generation,
        source=lifecycle_pb2.SeedState.Name(source),
        target=lifecycle_pb2.SeedState.Name(target),
        epoch=epoch,
        **fields,
    )


def telemetry(run_id: str, epoch: int, health: float | None, slot: str = SLOT) -> bus_pb2.SeedTelemetry:
    signal = telemetry_pb2.HealthSignal(slot=slot, epoch=epoch, health=health)
    return bus_pb2.SeedTelemetry(run_id=run_id, epoch=epoch, signals=[signal])


async def until(condition: Callable[[], Awaitable[T]], seconds: float = 10.0) -> T:
    """Wait until ``condition`` says something true, and return it; an Esper error counts as not yet."""
    last: EsperError | None = None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while True:
                try:
                    if said := await condition():
                        return said
                except EsperError as error:
                    last = error
                await asyncio.sleep(0.02)
    raise AssertionError(f"not within {seconds} s") from last


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on_free_ports(stack: Endpoints, dsn: str) -> Endpoints:
    """The stack's endpoints with free ports for the services, and another database."""
    address, metrics = f"127.0.0.1:{free_port()}", free_port()
    return stack.model_copy(
        update={
            "postgres_dsn": SecretStr(dsn),
            "grpc_address": address,
            "grpc_listen": address,
            "metrics_port": metrics,
            "metrics_url": f"http://127.0.0.1:{metrics}/metrics",
        }
    )


async def empty_streams(bus: Bus) -> None:
    """Forget what other tests have said and who listened."""
    await bus.provision()
    for stream in subjects.STREAMS:
        for consumer in await bus.jetstream.consumers_info(stream.name):
            await bus.jetstream.delete_consumer(stream.name, consumer.name)
        await bus.jetstream.purge_stream(stream.name)


@contextlib.asynccontextmanager
async def visiting(endpoints: Endpoints) -> AsyncIterator[Stage]:
    """The outside of a platform that somebody else starts; its streams are emptied first."""
    async with contextlib.AsyncExitStack() as stack:
        bus = await Bus.join(endpoints, "oona", "test")
        stack.push_async_callback(bus.close)
        await empty_streams(bus)
        pool = await open_pool(endpoints.postgres_dsn.get_secret_value(), size=4)
        stack.push_async_callback(pool.close)
        stage = Stage(endpoints, bus, pool)
        stack.push_async_callback(stage.hang_up)
        yield stage


@contextlib.asynccontextmanager
async def staged(endpoints: Endpoints) -> AsyncIterator[Stage]:
    """A running platform; stopped in order afterwards."""
    async with visiting(endpoints) as stage:
        running = asyncio.create_task(composition.run(endpoints, NAMES))
        try:
            await until(lambda: _up(stage, running))
            yield stage
        finally:
            await stage.hang_up()
            await _stop(running)


async def _stop(running: asyncio.Task[None]) -> None:
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def _up(stage: Stage, running: asyncio.Task[None]) -> bool:
    if running.done():
        running.result()  # why it did not start
    host, _, port = stage.endpoints.grpc_address.partition(":")
    try:  # a channel that finds nobody would wait a second before it dials again
        _, writer = await asyncio.open_connection(host, int(port))
    except ConnectionError:
        return False
    writer.close()
    await writer.wait_closed()
    return bool(await stage.stub("urza").ListBlueprints(urza_pb2.ListBlueprintsRequest()))


async def _each(parts: list[urza_pb2.UploadKernelRequest]) -> AsyncIterator[urza_pb2.UploadKernelRequest]:
    for part in parts:
        yield part
