"""Kernels on their way: into the library, out of it again, and into a run that checks every byte and both signatures."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import grpc.aio

from esper_core.blueprint.catalogue import catalogue
from esper_core.ids import sha256
from esper_core.kernel.manifest import KernelManifest, Provenance
from esper_core.nn.cache import KernelCache
from esper_core.pb.esper.core.v1 import kernel_pb2
from esper_core.pb.esper.urza.v1 import urza_pb2
from esper_core.rpc.convert import to_proto
from esper_core.store.blobs import Blobs
from services.tezzeret.upload import CHUNK_BYTES
from services.tolaria.remote import RemoteKernels
from tests.bench.bench import Pace, Table
from tests.bench.figures import Row, Sample, ratio_row
from tests.bench.ground import visit
from tests.service.innovation.papers import Innovation, Kernel, interface
from tests.service.platform import Stage

BIG = 16 << 20  # bytes
TIMEOUT = 120.0


@dataclass
class Line:
    """The part of a run's link that fetching kernels uses, on the bench's own event loop."""

    channel: grpc.aio.Channel
    loop: asyncio.AbstractEventLoop
    connected: bool = True

    def submit(self, call: Callable[[], Coroutine[Any, Any, Any]]) -> concurrent.futures.Future[Any]:
        return asyncio.run_coroutine_threadsafe(call(), self.loop)


def run(pace: Pace) -> list[Table]:
    endpoints = pace.ground.platform()

    async def all_of_it() -> list[Table]:
        async with visit(endpoints) as stage:
            made = Innovation(endpoints, stage.database, stage.bus, stage.channels)
            pace.say("16 MiB there and back")
            rate, over = await _large(stage, made, pace.rounds(8, 3))
            pace.say("a small kernel into a run")
            return [
                Table(
                    "A 16 MiB kernel, through TLS, digests checked on both sides",
                    rate,
                    (
                        f"Random bytes in chunks of {CHUNK_BYTES >> 10} KiB up and the library's own size down, client and "
                        "server on the same cores. Streams in turn with a bare read of the same object from S3.",
                    ),
                ),
                Table("Streaming / reading the same object straight from S3", [over]),
                Table(
                    "A small kernel from request to verified weights",
                    await _small(stage, made, pace.rounds(40, 10)),
                    (
                        "Cold: stream, both signatures against the trust list, digest, tensors. At hand: the same run asks "
                        "again and finds it in its cache.",
                    ),
                ),
            ]

    return pace.ground.run(all_of_it())


async def _large(stage: Stage, made: Innovation, rounds: int) -> tuple[list[Row], Row]:
    urza = stage.stub("urza", "tezzeret")
    blobs = await Blobs.open(stage.endpoints)
    up, down, bare = [], [], []
    try:
        for number in range(rounds):
            kernel = _heavy(made, number)
            began = time.perf_counter()
            await urza.UploadKernel(_parts(kernel), timeout=TIMEOUT)
            up.append(time.perf_counter() - began)
            down.append(await _streamed(stage, kernel))
            began = time.perf_counter()
            await blobs.get(kernel.manifest.blob_sha256)
            bare.append(time.perf_counter() - began)
    finally:
        await blobs.close()
    rows = [
        Sample(tuple(BIG / 1e6 / seconds for seconds in found)).row(what, "MB/s")
        for what, found in (("upload", up), ("stream", down), ("S3 read, no gRPC", bare))
    ]
    return rows, ratio_row("stream / S3 read", down, bare)


def _heavy(made: Innovation, number: int) -> Kernel:
    """Papers in order, contents random: nobody runs it."""
    blob = os.urandom(BIG)
    manifest = KernelManifest.describe(
        catalogue()["bottleneck_mlp"],
        interface(),
        blob,
        Provenance(compiler="bench"),
        symbols={"width": 4},
        seed=number,
    )
    return made.signed(manifest, blob)


async def _parts(kernel: Kernel) -> AsyncIterator[urza_pb2.UploadKernelRequest]:
    header = urza_pb2.KernelHeader(
        manifest=to_proto(kernel.manifest, kernel_pb2.KernelManifest),
        attestation=to_proto(kernel.attestation, kernel_pb2.Attestation),
    )
    yield urza_pb2.UploadKernelRequest(header=header)
    for start in range(0, len(kernel.blob), CHUNK_BYTES):
        yield urza_pb2.UploadKernelRequest(chunk=kernel.blob[start : start + CHUNK_BYTES])


async def _streamed(stage: Stage, kernel: Kernel) -> float:
    """Seconds to read it whole, every chunk checked."""
    request = urza_pb2.StreamKernelRequest(kernel_id=kernel.manifest.kernel_id)
    blob = bytearray()
    began = time.perf_counter()
    async for piece in stage.stub("urza", "tolaria").StreamKernel(request, timeout=TIMEOUT):
        if piece.HasField("chunk"):
            if sha256(piece.chunk.data) != piece.chunk.sha256:
                raise RuntimeError(f"a chunk at {piece.chunk.offset} is damaged")
            blob += piece.chunk.data
    seconds = time.perf_counter() - began
    if blob != kernel.blob:
        raise RuntimeError("what came back is not what went in")
    return seconds


async def _small(stage: Stage, made: Innovation, rounds: int) -> list[Row]:
    slot = interface()
    kernel = made.make(slot, symbols={"width": 8})
    await made.upload(kernel)
    await stage.judge(kernel.manifest)
    stage.stub("urza", "tolaria")
    line = Line(stage.channels["tolaria"], asyncio.get_running_loop())
    trust = stage.endpoints.keys_dir / "trust.json"
    kernel_id = kernel.manifest.kernel_id

    def fetch() -> tuple[float, float]:
        source = RemoteKernels(line, trust, KernelCache(), TIMEOUT)
        found = []
        for _ in range(2):
            began = time.perf_counter()
            source.request(kernel_id, slot)
            if source.poll(kernel_id) is None:
                raise RuntimeError("the kernel did not come")
            found.append(time.perf_counter() - began)
        return found[0], found[1]

    pairs = [await asyncio.to_thread(fetch) for _ in range(rounds + 1)][1:]
    size = f"{len(kernel.blob) / 1024:.1f} KiB"
    return [
        Sample(tuple(cold for cold, _ in pairs)).row(f"{size}, cold", "ms", 1e3),
        Sample(tuple(again for _, again in pairs)).row(f"{size}, at hand", "ms", 1e3),
    ]
