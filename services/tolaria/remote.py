"""Tamiyo and Urza as seen from an epoch boundary: the two remote roles of growing.

Both ask in the background and wait at a boundary no longer than they were told to. What comes late is used at a later
boundary; while the platform does not answer, boundaries do not wait for it at all.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from pathlib import Path

from esper_core.blueprint.interface import SlotInterface
from esper_core.control.packet import AdaptationSignal, KernelCandidate, SystemStatePacket
from esper_core.control.roles import LoadedKernel
from esper_core.errors import (
    Corrupt,
    DeadlineExceeded,
    EsperError,
    Exhausted,
    InvalidInput,
    Unavailable,
    Untrusted,
)
from esper_core.ids import sha256
from esper_core.kernel.manifest import KernelManifest
from esper_core.kernel.pack import unpack
from esper_core.kernel.record import KernelRecord, KernelStatus
from esper_core.kernel.trust import TrustList, verify_kernel
from esper_core.log import get
from esper_core.nn.cache import KernelCache
from esper_core.nn.native import Native
from esper_core.pb.esper.core.v1 import telemetry_pb2
from esper_core.pb.esper.tamiyo.v1 import tamiyo_pb2, tamiyo_pb2_grpc
from esper_core.pb.esper.urza.v1 import urza_pb2, urza_pb2_grpc
from esper_core.rpc.convert import from_proto, to_proto
from services.tolaria.link import Link
from services.tolaria.native import native_of

log = get(__name__)
STEP_SECONDS = 1.0
STREAM_SECONDS = 60.0
PAUSE, LONGEST_PAUSE = 0.2, 5.0
DAMAGED_TRIES = 3
RETURN_SECONDS = 10.0
"""How long a resumed run that trusts native code waits, once, for that of a kernel: from its first step on, it then equals a run
that was never interrupted."""
_PASSING = (Unavailable, DeadlineExceeded, Exhausted)


class RemoteController:
    """Asks Tamiyo.

    Args:
        link: the run's connection.
        wait_seconds: how long a boundary may wait for the answer.

    Attributes:
        away: why there was no answer last time; empty when there was.
    """

    def __init__(self, link: Link, wait_seconds: float) -> None:
        self._link = link
        self._wait = wait_seconds
        self._late: list[concurrent.futures.Future[AdaptationSignal]] = []
        self.away = ""

    def decide(self, packet: SystemStatePacket) -> AdaptationSignal | None:
        """Tamiyo's answer when it comes in time; None when not."""
        self._collect()
        try:
            future = self._link.submit(lambda: self._step(packet))
        except Exhausted as error:
            self.away = error.message
            return None
        try:
            signal = future.result(0 if self.away else self._wait)
        except concurrent.futures.TimeoutError:
            self.away = self.away or f"no answer within {self._wait:g} s"
            self._late.append(future)
            return None
        except EsperError as error:
            if not self.away:
                log.warning("tamiyo.away", run_id=packet.run_id, epoch=packet.epoch, reason=error.message)
            self.away = error.message
            return None
        self.away = ""
        return signal

    async def _step(self, packet: SystemStatePacket) -> AdaptationSignal:
        stub = tamiyo_pb2_grpc.TamiyoServiceStub(self._link.channel)  # type: ignore[no-untyped-call]
        request = tamiyo_pb2.StepRequest(packet=to_proto(packet, telemetry_pb2.SystemStatePacket))
        response = await stub.Step(request, timeout=max(STEP_SECONDS, self._wait))
        return from_proto(response.signal, AdaptationSignal)

    def _collect(self) -> None:
        """Give the orders of answers that came late to the run; the bus brings them too, and ids make them one."""
        waiting = []
        for future in self._late:
            if not future.done():
                waiting.append(future)
            elif future.exception() is None:
                self.away = ""
                for action in future.result().actions:
                    self._link.orders.keep(action.command)
        self._late = waiting


class RemoteKernels:
    """Fetches kernels from Urza; only what both signatures vouch for ever becomes weights.

    Args:
        link: the run's connection.
        trust_path: the trust list.
        cache: where verified weights are kept.
        wait_seconds: how long a boundary may wait for a kernel that is on its way.
        native: whether code that the forge has compiled and signed may be loaded into this process.
    """

    def __init__(
        self, link: Link, trust_path: Path, cache: KernelCache, wait_seconds: float, *, native: bool = False
    ) -> None:
        self._link = link
        self._trust_path = trust_path
        self._cache = cache
        self._wait = wait_seconds
        self._fetching: dict[str, concurrent.futures.Future[KernelManifest]] = {}
        self._native = native
        self._natives: dict[str, Native | str] = {}

    def candidates(self, interface: SlotInterface) -> tuple[KernelCandidate, ...]:  # noqa: ARG002 - Tamiyo asks the library
        """None of its own."""
        return ()

    def request(self, kernel_id: str, interface: SlotInterface) -> None:  # noqa: ARG002 - the plot checks the fit
        """Begin to fetch a kernel."""
        future = self._fetching.get(kernel_id)
        if future is None or (future.done() and future.exception() is not None):
            self._fetching[kernel_id] = self._link.submit(lambda: self._fetch(kernel_id))

    def poll(self, kernel_id: str) -> LoadedKernel | None:
        """The kernel, once it is here and verified.

        Raises:
            EsperError: it can never be had: unknown, untrusted, damaged at its source, too large.
        """
        future = self._fetching.get(kernel_id)
        wait = self._wait if self._link.connected else 0
        if future is None:  # asked for before the run was interrupted
            future = self._fetching[kernel_id] = self._link.submit(lambda: self._fetch(kernel_id))
            wait = RETURN_SECONDS if self._native else wait
        try:
            manifest = future.result(wait)
        except concurrent.futures.TimeoutError:
            return None
        except EsperError:
            del self._fetching[kernel_id]
            raise
        weights = self._cache.get(kernel_id)
        if weights is None:  # made room for others since
            del self._fetching[kernel_id]
            return None
        found = self._natives.get(kernel_id, "")
        native, eager = (None, found) if isinstance(found, str) else (found, "")
        return LoadedKernel(kernel_id, manifest.blueprint, manifest.interface, manifest.symbols, weights, native, eager)

    async def _fetch(self, kernel_id: str) -> KernelManifest:
        """Stream, check and cache one kernel, going on from where a broken stream ended, for as long as it takes."""
        blob, damaged, pause = bytearray(), 0, PAUSE
        manifest: KernelManifest | None = None
        while manifest is None or len(blob) < manifest.blob_bytes:
            try:
                before = len(blob)
                manifest = await self._stream(kernel_id, blob)
                if len(blob) == before and len(blob) < manifest.blob_bytes:
                    raise Unavailable(f"the stream of {kernel_id} ended early", hint="it is tried again")
            except _PASSING as error:
                log.info("kernel.waiting", kernel_id=kernel_id, have=len(blob), reason=error.message)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            except Corrupt:
                damaged += 1
                if damaged >= DAMAGED_TRIES:
                    raise
        self._cache.put(kernel_id, unpack(bytes(blob), manifest))
        if self._native and not isinstance(self._natives.get(kernel_id), Native):
            figures = manifest.provenance.native
            self._natives[kernel_id] = await native_of(self._link, self._trust_path, kernel_id, figures)
        return manifest

    async def _stream(self, kernel_id: str, blob: bytearray) -> KernelManifest:
        """Read one stream from where ``blob`` ends; every chunk is checked before it is added."""
        stub = urza_pb2_grpc.UrzaServiceStub(self._link.channel)  # type: ignore[no-untyped-call]
        manifest: KernelManifest | None = None
        request = urza_pb2.StreamKernelRequest(kernel_id=kernel_id, offset=len(blob))
        async for response in stub.StreamKernel(request, timeout=STREAM_SECONDS):
            if response.HasField("record"):
                manifest = self._vouched(kernel_id, from_proto(response.record, KernelRecord))
                continue
            if manifest is None:
                raise InvalidInput(f"the stream of {kernel_id} does not begin with its record")
            chunk = response.chunk
            if chunk.offset != len(blob) or sha256(chunk.data) != chunk.sha256:
                raise Corrupt(f"{kernel_id}: a chunk at {chunk.offset} does not match its digest or place")
            if len(blob) + len(chunk.data) > manifest.blob_bytes:
                raise Corrupt(f"{kernel_id}: more than the {manifest.blob_bytes} bytes of its manifest")
            blob += chunk.data
        if manifest is None:
            raise Unavailable(f"the stream of {kernel_id} was empty", hint="it is tried again")
        return manifest

    def _vouched(self, kernel_id: str, record: KernelRecord) -> KernelManifest:
        """The manifest, if it is the kernel asked for and both parties signed it."""
        if record.manifest.kernel_id != kernel_id:
            raise Untrusted(f"asked for {kernel_id}, was sent {record.manifest.kernel_id}")
        if int(record.status) != KernelStatus.VALIDATED:
            raise Untrusted(f"{kernel_id} is {record.status.name}, not VALIDATED", hint="choose another kernel")
        verify_kernel(record.manifest, record.attestations, TrustList.load(self._trust_path))
        return record.manifest
