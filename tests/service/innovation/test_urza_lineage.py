"""Lineage: ancestors and descendants to a depth, by the shortest way, and no forged row makes a query go round."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator

import pytest

from esper_core.blueprint.catalogue import catalogue
from esper_core.blueprint.ir import BlueprintIR
from esper_core.bus.database import Pool
from esper_core.config import Endpoints
from esper_core.errors import NotFound
from esper_core.pb.esper.core.v1 import blueprint_pb2
from esper_core.pb.esper.urza.v1 import urza_pb2
from esper_core.rpc.convert import to_proto
from services.urza.blueprints import Blueprints
from services.urza.lineage import DEEPEST, lineage
from tests.service.innovation.papers import Innovation
from tests.service.innovation.shelf import scratch

FOREIGN = "blueprint-" + "f" * 64


@pytest.fixture(scope="module")
async def pool(stack: Endpoints) -> AsyncIterator[Pool]:
    async with scratch(stack) as pool:
        yield pool


def child(name: str, *parents: BlueprintIR | str) -> BlueprintIR:
    ids = tuple(parent if isinstance(parent, str) else parent.id for parent in parents)
    return catalogue()["low_rank"].model_copy(update={"name": name, "parent_ids": ids})


async def test_a_family_over_the_wire(innovation: Innovation) -> None:
    root = child("family-root", FOREIGN)
    left, right = child("family-left", root), child("family-right", root)
    heir = child("family-heir", left, right)
    shortcut = child("family-shortcut", heir, root)
    for ir in (root, left, right, heir, shortcut):
        request = urza_pb2.UploadBlueprintRequest(blueprint=to_proto(ir, blueprint_pb2.BlueprintIR))
        await innovation.urza("karn").UploadBlueprint(request)

    async def asked(**wanted: int) -> urza_pb2.GetLineageResponse:
        request = urza_pb2.GetLineageRequest(blueprint_id="family-left", **wanted)
        answer: urza_pb2.GetLineageResponse = await innovation.urza("tamiyo").GetLineage(request)
        assert answer.blueprint_id == left.id
        return answer

    def generations(answer: urza_pb2.GetLineageResponse) -> dict[str, int]:
        return {one.name: one.generation for one in answer.relatives}

    assert generations(await asked()) == {"family-left": 0}
    assert generations(await asked(ancestors=1)) == {"family-left": 0, "family-root": -1}
    everyone = await asked(ancestors=9, descendants=9)
    assert generations(everyone) == {
        "family-left": 0, "family-root": -1, "": -2, "family-heir": 1, "family-shortcut": 2,
    }  # fmt: skip
    assert {one.name: one.created_by for one in everyone.relatives}["family-heir"] == "karn"
    edges = {(one.parent_id, one.child_id) for one in everyone.descents}
    assert edges == {
        (FOREIGN, root.id), (root.id, left.id), (left.id, heir.id), (heir.id, shortcut.id), (root.id, shortcut.id),
    }  # fmt: skip
    few = await asked(ancestors=9, descendants=9, limit=3)
    assert few.truncated
    assert generations(few) == {"family-left": 0, "family-root": -1, "family-heir": 1}
    with pytest.raises(NotFound):
        await innovation.urza("tamiyo").GetLineage(urza_pb2.GetLineageRequest(blueprint_id="family-nobody"))


async def test_the_shorter_way_counts(pool: Pool) -> None:
    shelf = Blueprints(pool)
    chain = [child("link-0")]
    for number in range(1, 6):
        chain.append(child(f"link-{number}", chain[-1]))
    last = child("link-last", chain[-1], chain[1])
    for ir in (*chain, last):
        await shelf.put(ir, "karn")
    found = await lineage(pool, last.id, DEEPEST, 0)
    distances = {one.name: one.generation for one in found.relatives}
    assert distances == {
        "link-last": 0,
        "link-5": -1,
        "link-1": -1,
        "link-4": -2,
        "link-0": -2,
        "link-3": -3,
        "link-2": -4,
    }


async def test_forged_rows_that_go_in_circles_are_walked_once(pool: Pool) -> None:
    """Content addressing rules a cycle out; a database that was written to by hand does not."""
    ring = [child(f"ring-{number}") for number in range(3)]
    for ir in ring:
        await Blueprints(pool).put(ir, "karn")
    circle = [(ring[0].id, ring[2].id), (ring[1].id, ring[0].id), (ring[2].id, ring[1].id), (ring[0].id, ring[0].id)]
    await pool.executemany("INSERT INTO urza.lineage (child_id, parent_id) VALUES ($1, $2)", circle)
    async with asyncio.timeout(5):
        found = await lineage(pool, ring[0].id, DEEPEST, DEEPEST)
    assert {one.name: one.generation for one in found.relatives} == {"ring-0": 0, "ring-2": -1, "ring-1": 1}
    assert set(found.descents) == {(parent, one) for one, parent in circle}
    assert not found.truncated


async def test_a_web_of_generations_is_walked_in_time(pool: Pool) -> None:
    """Ten generations of twelve, each a child of all before it: 12^10 ways, 120 blueprints."""
    layers = [[f"blueprint-{generation:02x}{number:02x}{'0' * 60}" for number in range(12)] for generation in range(10)]
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("ALTER TABLE urza.lineage DROP CONSTRAINT lineage_child_id_fkey")
        await connection.executemany(
            "INSERT INTO urza.lineage (child_id, parent_id) VALUES ($1, $2)",
            [(one, parent) for older, newer in itertools.pairwise(layers) for one in newer for parent in older],
        )
    found = await lineage(pool, layers[-1][0], DEEPEST, DEEPEST)
    assert len(found.relatives) == 1 + 9 * 12
    assert {one.generation for one in found.relatives} == set(range(-9, 1))
