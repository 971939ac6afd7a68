"""``esperctl forge status``: what people see of the forges, and what programs read."""

from __future__ import annotations

import json
from typing import Any

from esper_core.pb.esper.tezzeret.v1 import tezzeret_pb2


def answer(_: Any) -> tezzeret_pb2.GetForgeStatusResponse:
    forge = tezzeret_pb2.Forge(
        forge="forge-0198f0aa", host="here", pid=77, target="linux/x86_64", toolchain="esper-forge/2", up_seconds=60,
        silent_seconds=1.5, done=12, failed=1, alive=True,
    )  # fmt: skip
    dead = tezzeret_pb2.Forge(forge="forge-0198f0ab", host="there", pid=78, silent_seconds=900)
    running = tezzeret_pb2.RunningBuild(
        build_id="build-" + "a" * 64, blueprint_name="low_rank", pipeline="fast", forge="forge-0198f0aa", age_seconds=3,
        lapsed=True,
    )  # fmt: skip
    figures = tezzeret_pb2.PipelineFigures(
        pipeline="aggressive", done=9, failed=1, median_seconds=17, compiled=9, shipped=4, median_native_ratio=0.82
    )
    return tezzeret_pb2.GetForgeStatusResponse(
        forges=[forge, dead],
        queued=5,
        postponed=2,
        stranded=3,
        running=[running],
        done=12,
        failed=1,
        pipelines=[figures],
    )


def test_people_see_forges_queue_and_pipelines(esperctl, platform) -> None:
    platform.on("GetForgeStatus", answer)
    said = esperctl("forge", "status")
    assert said.exit_code == 0, said.output
    for words in ("here:77", "low_rank", "lapsed", "5 (2 for their surroundings)", "no living forge", "4 of 9", "0.82"):
        assert words in said.output
    lines = {line.split()[0]: line for line in said.output.splitlines() if line.startswith("forge-")}
    assert sorted(line.split()[1] for line in lines.values()) == ["no", "yes"]


def test_programs_read_the_contract(esperctl, platform) -> None:
    platform.on("GetForgeStatus", answer)
    document = json.loads(esperctl("forge", "status", "-o", "json").output)
    assert document["queued"] == 5
    assert [forge["alive"] for forge in document["forges"]] == [True, False]
    assert document["pipelines"][0]["median_native_ratio"] == 0.82


def test_an_idle_platform_says_so(esperctl, platform) -> None:
    platform.on("GetForgeStatus", lambda _: tezzeret_pb2.GetForgeStatusResponse())
    said = esperctl("forge", "status")
    assert "no forge was heard of lately" in said.output
    assert "PIPELINE" not in said.output
