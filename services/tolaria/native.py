"""Native parts of kernels, fetched by a run that was told to trust them.

Everything that could make it unwise to load one makes the kernel run eagerly instead, and its seed says so: none for this
machine and torch, a signature that does not hold, other bytes, another kernel, code that does not compute what the kernel does.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from esper_core.errors import Corrupt, EsperError, Untrusted
from esper_core.kernel.manifest import NativeFigures
from esper_core.kernel.native import NativeRecord, convention, verify_native
from esper_core.kernel.sign import Attestation
from esper_core.kernel.trust import TrustList
from esper_core.log import get
from esper_core.nn.native import Native
from esper_core.pb.esper.urza.v1 import native_pb2, urza_pb2_grpc
from esper_core.rpc.convert import from_proto
from services.sandbox import target
from services.tolaria.link import Link

log = get(__name__)
STREAM_SECONDS = 60.0


async def native_of(link: Link, trust_path: Path, kernel_id: str, figures: NativeFigures | None) -> Native | str:
    """The kernel's native part, loaded, or why there is none that may be trusted here.

    Args:
        link: the run's connection.
        trust_path: the trust list.
        kernel_id: the kernel.
        figures: what its papers say came of compiling it.
    """
    if figures is None:
        return "the forge was not asked to compile this kernel"
    if not figures.shipped:
        return f"the forge ships no compiled code for this kernel: {figures.reason}"
    try:
        record, attestation, blob = await _stream(link, kernel_id)
        trusted(kernel_id, record, attestation, blob, TrustList.load(trust_path))
        return await asyncio.to_thread(Native, blob)
    except EsperError as error:
        log.warning("native.declined", kernel_id=kernel_id, reason=error.message)
        return error.message


def trusted(kernel_id: str, record: NativeRecord, attestation: Attestation, blob: bytes, trust: TrustList) -> None:
    """Return only when ``blob`` is code for this kernel, machine and torch by a listed build key.

    Raises:
        Untrusted: the papers are of something else, or nobody who counts signed them.
        Corrupt: the bytes are not those of the papers.
    """
    if record.kernel_id != kernel_id:
        raise Untrusted(f"asked for the native part of {kernel_id}, was sent that of {record.kernel_id}")
    if (record.target, record.toolchain) != (target(), convention()):
        raise Untrusted(f"the native part of {kernel_id} is for {record.target} with {record.toolchain}")
    verify_native(record, attestation, trust)
    record.check(blob)


async def _stream(link: Link, kernel_id: str) -> tuple[NativeRecord, Attestation, bytes]:
    stub = urza_pb2_grpc.UrzaServiceStub(link.channel)  # type: ignore[no-untyped-call]
    request = native_pb2.StreamNativeRequest(kernel_id=kernel_id, target=target(), toolchain=convention())
    header: native_pb2.NativeHeader | None = None
    record: NativeRecord | None = None
    blob = bytearray()
    async for answer in stub.StreamNative(request, timeout=STREAM_SECONDS):
        if answer.HasField("header"):
            header, record = answer.header, from_proto(answer.header.record, NativeRecord)
        elif record is None or len(blob) + len(answer.chunk) > record.blob_bytes:
            raise Corrupt(f"the stream of {kernel_id}'s native part is not as its papers say")
        else:
            blob += answer.chunk
    if header is None or record is None:
        raise Corrupt(f"the stream of {kernel_id}'s native part was empty")
    return record, from_proto(header.attestation, Attestation), bytes(blob)
