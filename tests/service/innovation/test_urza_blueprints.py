"""Blueprints: the built-in ones are there, good ones are kept once, bad ones never."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from esper_core.blueprint.catalogue import catalogue
from esper_core.blueprint.ir import BlueprintIR
from esper_core.errors import EsperError, Forbidden, InvalidInput, NotFound
from esper_core.pb.esper.core.v1 import blueprint_pb2
from esper_core.pb.esper.urza.v1 import urza_pb2
from esper_core.rpc.convert import from_proto, to_proto
from tests.service.innovation.papers import Innovation


def wire(ir: BlueprintIR) -> blueprint_pb2.BlueprintIR:
    return to_proto(ir, blueprint_pb2.BlueprintIR)


def variant(name: str) -> BlueprintIR:
    """A blueprint of that name that descends from ``low_rank``."""
    parent = catalogue()["low_rank"]
    return parent.model_copy(update={"name": name, "parent_ids": (parent.id,)})


async def get(innovation: Innovation, wanted: str) -> urza_pb2.GetBlueprintResponse:
    answer: urza_pb2.GetBlueprintResponse = await innovation.urza("karn").GetBlueprint(
        urza_pb2.GetBlueprintRequest(blueprint_id=wanted)
    )
    return answer


async def test_the_catalogue_is_on_the_shelf(innovation: Innovation) -> None:
    for name, ir in catalogue().items():
        for wanted in (name, ir.id, ir.id[:22]):
            found = await get(innovation, wanted)
            assert (found.blueprint_id, found.created_by) == (ir.id, "catalogue")
            assert from_proto(found.blueprint, BlueprintIR) == ir
    with pytest.raises(NotFound) as caught:
        await get(innovation, "botleneck_mlp")
    assert "bottleneck_mlp" in caught.value.hint
    with pytest.raises(NotFound):
        await get(innovation, "blueprint-0000")
    with pytest.raises(NotFound):
        await get(innovation, "blueprint-")


async def test_a_blueprint_is_kept_once(innovation: Innovation) -> None:
    ir = variant("kept_once")
    request = urza_pb2.UploadBlueprintRequest(blueprint=wire(ir))
    answers = await asyncio.gather(*(innovation.urza("karn").UploadBlueprint(request) for _ in range(6)))
    assert {answer.blueprint_id for answer in answers} == {ir.id}
    assert sum(answer.created for answer in answers) == 1
    assert (await get(innovation, "kept_once")).created_by == "karn"
    lineage = await innovation.database.fetchval("SELECT parent_id FROM urza.lineage WHERE child_id = $1", ir.id)
    assert lineage == catalogue()["low_rank"].id
    with pytest.raises(Forbidden):
        await innovation.urza("tezzeret").UploadBlueprint(request)


async def test_of_several_with_one_name_the_newest_is_meant(innovation: Innovation) -> None:
    older = variant("namesake")
    newer = older.model_copy(update={"symbols": {"width": 9}})
    for ir in (older, newer):
        await innovation.urza().UploadBlueprint(urza_pb2.UploadBlueprintRequest(blueprint=wire(ir)))
    assert (await get(innovation, "namesake")).blueprint_id == newer.id
    assert (await get(innovation, older.id)).blueprint_id == older.id


def spoiled(**changes: Any) -> blueprint_pb2.BlueprintIR:
    message = wire(variant("spoiled"))
    for name, value in changes.items():
        if name == "op":
            message.nodes[0].op = value
        elif name == "out":
            message.nodes[0].attributes["out"] = value
        elif name == "inputs":
            message.nodes[0].inputs[:] = value
        elif name == "nodes":
            message.nodes.extend([message.nodes[0]] * value)
        else:
            setattr(message, name, value)
    return message


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (spoiled(op="os.system"), "unknown op"),
        (spoiled(op="liner"), "unknown op"),
        (spoiled(out="__import__('os')"), "width expression"),
        (spoiled(out="width ** 99"), "width expression"),
        (spoiled(out="depth"), "unknown symbol"),
        (spoiled(inputs=["B"]), "before it is computed"),
        (spoiled(inputs=[]), "inputs"),
        (spoiled(output="input"), "no node"),
        (spoiled(nodes=300), "nodes"),
        (spoiled(name="UPPER CASE"), "name"),
    ],
)
async def test_a_bad_blueprint_is_refused_with_a_reason(
    innovation: Innovation, message: blueprint_pb2.BlueprintIR, said: str
) -> None:
    with pytest.raises(EsperError, match=said) as caught:
        await innovation.urza().UploadBlueprint(urza_pb2.UploadBlueprintRequest(blueprint=message))
    assert isinstance(caught.value, InvalidInput)
    with pytest.raises(NotFound):
        await get(innovation, "spoiled")


async def test_all_are_listed_newest_first(innovation: Innovation) -> None:
    await innovation.urza().UploadBlueprint(urza_pb2.UploadBlueprintRequest(blueprint=wire(variant("the_newest"))))
    names, token = [], ""
    while True:
        request = urza_pb2.ListBlueprintsRequest(page_size=3, page_token=token)
        answer = await innovation.urza().ListBlueprints(request)
        names += [stored.blueprint.name for stored in answer.blueprints]
        if not (token := answer.next_page_token):
            break
    assert names[0] == "the_newest"
    assert set(catalogue()) <= set(names)
    count = await innovation.database.fetchval("SELECT count(*) FROM urza.blueprints")
    assert len(names) == count
