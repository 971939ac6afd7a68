"""Karn's dealings with others: blueprints to the library, wishes to the forge, and what became of them. As principal `karn`."""

from __future__ import annotations

from typing import Any

from esper_core.kernel.record import KernelRecord
from esper_core.pb.esper.core.v1 import blueprint_pb2
from esper_core.pb.esper.tezzeret.v1 import tezzeret_pb2
from esper_core.pb.esper.urza.v1 import urza_pb2
from esper_core.rpc.convert import from_proto, to_proto
from services.karn.nursery import Row


class Trade:
    """Urza and Tezzeret, from here.

    Args:
        urza, tezzeret: stubs on Karn's channel.
    """

    def __init__(self, urza: Any, tezzeret: Any) -> None:
        self._urza, self._tezzeret = urza, tezzeret

    async def submit(self, row: Row) -> str:
        """Store the design and order its kernel; the build's id. May be repeated.

        Raises:
            InvalidInput: library or forge refuse it.
            Unavailable: one of them is away.
        """
        design = row.design
        blueprint_id = design.source_id
        if not blueprint_id:
            upload = urza_pb2.UploadBlueprintRequest(blueprint=to_proto(design.ir, blueprint_pb2.BlueprintIR))
            blueprint_id = (await self._urza.UploadBlueprint(upload)).blueprint_id
        wish = tezzeret_pb2.SubmitBuildRequest(
            blueprint_id=blueprint_id,
            interface=to_proto(design.interface, blueprint_pb2.SlotInterface),
            symbols=row.symbols,
        )
        answer: tezzeret_pb2.SubmitBuildResponse = await self._tezzeret.SubmitBuild(wish)
        return answer.build.build_id

    async def look(self, row: Row) -> tuple[KernelRecord | None, str]:
        """The kernel once there is one, or why there will be none.

        Raises:
            NotFound: the forge or the library do not know it any more.
            Unavailable: one of them is away.
        """
        answer: tezzeret_pb2.GetBuildResponse = await self._tezzeret.GetBuild(
            tezzeret_pb2.GetBuildRequest(build_id=row.build_id)
        )
        if answer.build.state == tezzeret_pb2.BUILD_STATE_FAILED:
            return None, answer.build.reason or "it could not be built"
        if answer.build.state != tezzeret_pb2.BUILD_STATE_DONE:
            return None, ""
        return await self.kernel(answer.build.kernel_id), ""

    async def kernel(self, kernel_id: str) -> KernelRecord:
        """Raises: NotFound, Unavailable."""
        answer: urza_pb2.GetKernelResponse = await self._urza.GetKernel(urza_pb2.GetKernelRequest(kernel_id=kernel_id))
        return from_proto(answer.kernel, KernelRecord)
