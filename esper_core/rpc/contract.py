"""What the contracts say of every method, read from the descriptor image beside the stubs.

The only source for lists of methods and for which of them may be repeated; nothing of the kind is written by hand.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from dataclasses import dataclass

from google.protobuf.descriptor_pb2 import FileDescriptorSet, MethodOptions

MAX_MESSAGE = 4 * 1024 * 1024
"""Bytes of one message either way; anything larger is streamed in pieces."""

RETRIES = {
    "maxAttempts": 4,
    "initialBackoff": "0.1s",
    "maxBackoff": "1s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}


@dataclass(frozen=True)
class Method:
    """One RPC.

    Attributes:
        path: as on the wire, e.g. ``/esper.urza.v1.UrzaService/GetKernel``.
        repeatable: whether calling twice does no more than calling once.
        streams_in: whether the client sends a stream.
        streams_out: whether the server does.
    """

    service: str
    name: str
    repeatable: bool
    streams_in: bool
    streams_out: bool

    @property
    def path(self) -> str:
        return f"/{self.service}/{self.name}"


@functools.cache
def methods() -> dict[str, Method]:
    """Every method of Esper's own contracts by path."""
    image = FileDescriptorSet()
    image.ParseFromString(importlib.resources.files("esper_core.pb").joinpath("descriptors.binpb").read_bytes())
    found = [
        Method(
            service=f"{file.package}.{service.name}",
            name=method.name,
            repeatable=method.options.idempotency_level != MethodOptions.IDEMPOTENCY_UNKNOWN,
            streams_in=method.client_streaming,
            streams_out=method.server_streaming,
        )
        for file in image.file
        if file.package.startswith("esper.")
        for service in file.service
        for method in service.method
    ]
    return {method.path: method for method in found}


def service_config() -> str:
    """gRPC service config as JSON: methods that may be repeated are, when the server is unavailable."""
    repeatable = [method for method in methods().values() if method.repeatable]
    names = [{"service": method.service, "method": method.name} for method in repeatable]
    return json.dumps({"methodConfig": [{"name": names, "retryPolicy": RETRIES}]})
