"""The innovation plane closed in a loop, on the real platform: a run tells what its slots are like, Karn designs for the one that
grew, Tezzeret builds, Urabrask measures, the controller chooses among more than before, and what Karn invented becomes part of the
next network.
"""

from __future__ import annotations

import json

import pytest

from tests.e2e.living import NARROW, Grown, Living

pytestmark = pytest.mark.timeout(400)  # on a machine that is busy with other things
GENERATIONS, POPULATION = 2, 6


async def test_what_karn_invents_takes_root_in_the_next_network(platform: Living, grown: Grown) -> None:
    rival = await platform.read("kernel", "show", grown.seed["kernel_id"])
    search = ("-g", str(GENERATIONS), "-p", str(POPULATION), "--seed", "1", "--interface", rival["interface_id"])
    news = platform.esperctl("karn", "run", *search, "-o", "json").stdout
    told = [json.loads(line) for line in news.splitlines()]
    first, last = told[0], told[-1]
    assert (last["state"], last["generation"]) == ("FINISHED", GENERATIONS)
    assert last["proposed"] == GENERATIONS * POPULATION
    assert last["waiting"] == 0
    (progress,) = last["progress"]
    before = first["progress"][0] if first["progress"] else {"measured": 0, "coverage": 0.0}
    assert progress["coverage"] > before["coverage"]

    proposals = await platform.read("karn", "proposals", "--limit", "1000")
    ours = [proposal for proposal in proposals if proposal["search_id"] == last["search_id"]]
    assert len(ours) == last["proposed"]
    assert all(proposal["why"] and proposal["operator"] for proposal in ours)
    children = [proposal for proposal in ours if proposal["parent_ids"]]
    assert children
    lineage = await platform.read("blueprint", "lineage", children[0]["blueprint_id"])
    assert set(children[0]["parent_ids"]) <= {relative["blueprint_id"] for relative in lineage["relatives"]}

    training = platform.train("invention")
    assert await training.ends() == 0, training.stderr
    seed = await platform.read("seed", "show", NARROW, "--run", "invention")
    record = await platform.read("kernel", "show", seed["kernel_id"])
    assert (seed["state"], record["born_of"]) == ("FOSSILIZED", "karn")
    assert record["manifest"]["blueprint_id"] in {proposal["blueprint_id"] for proposal in ours}
    assert record["manifest"]["parameters"] < rival["manifest"]["parameters"]
