"""Blueprints as the library has them, read once: they never change."""

from __future__ import annotations

from collections import OrderedDict

from esper_core.blueprint.ir import BlueprintIR
from esper_core.pb.esper.urza.v1 import urza_pb2, urza_pb2_grpc
from esper_core.rpc.convert import from_proto

REMEMBERED = 256


class Designs:
    """A reader of the library's blueprints that remembers the last ones."""

    def __init__(self, urza: urza_pb2_grpc.UrzaServiceStub) -> None:
        self._urza = urza
        self._known: OrderedDict[str, BlueprintIR] = OrderedDict()

    async def get(self, blueprint_id: str) -> BlueprintIR:
        """The blueprint of that id.

        Raises:
            NotFound: the library has none.
            Unavailable: the library is away.
        """
        found = self._known.get(blueprint_id)
        if found is None:
            answer = await self._urza.GetBlueprint(urza_pb2.GetBlueprintRequest(blueprint_id=blueprint_id))
            found = self._known[blueprint_id] = from_proto(answer.blueprint, BlueprintIR)
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return found
