"""What the library's commands ask for, and how they show what they are told."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from esper_core.blueprint.catalogue import catalogue
from esper_core.pb.esper.core.v1 import blueprint_pb2, kernel_pb2
from esper_core.pb.esper.urza.v1 import urza_pb2
from esper_core.rpc.convert import to_proto


def relative(letter, name, generation):
    by = "karn" if name else ""
    return urza_pb2.Relative(blueprint_id=f"blueprint-{letter * 64}", name=name, created_by=by, generation=generation)


def descent(parent, child):
    return urza_pb2.Descent(parent_id=f"blueprint-{parent * 64}", child_id=f"blueprint-{child * 64}")


FAMILY = urza_pb2.GetLineageResponse(
    blueprint_id="blueprint-" + "a" * 64,
    relatives=[
        relative("a", "me", 0), relative("b", "mother", -1), relative("c", "father", -1), relative("d", "", -2),
        relative("e", "child", 1), relative("f", "grandchild", 2),
    ],
    descents=[
        descent("b", "a"), descent("c", "a"), descent("d", "b"), descent("d", "c"), descent("a", "e"), descent("e", "f"),
        descent("a", "f"),
    ],
)  # fmt: skip


def branches(text):
    """(depth, words) of every line of a tree."""
    lines = [line for line in text.splitlines() if line.strip()]
    return [((len(line) - len(line.lstrip(" │├└─"))) // 4, line.lstrip(" │├└─").split("  ")[0]) for line in lines]


def test_lineage_is_a_tree_either_way(platform, esperctl):
    platform.on("GetLineage", lambda _: FAMILY)
    up = esperctl("blueprint", "lineage", "me", "--ancestors", "--depth", "5")
    assert (platform.asked[-1].ancestors, platform.asked[-1].descendants) == (5, 0)
    foreign = "blueprint-" + "d" * 12
    assert branches(up.stdout) == [(0, "me"), (1, "mother"), (2, foreign), (1, "father"), (2, foreign)]
    assert "not in this library" in up.stdout
    down = esperctl("blueprint", "lineage", "me", "--descendants")
    assert (platform.asked[-1].ancestors, platform.asked[-1].descendants) == (0, 16)
    assert branches(down.stdout) == [(0, "me"), (1, "child"), (2, "grandchild"), (1, "grandchild")]
    both = esperctl("blueprint", "lineage", "me")
    assert (platform.asked[-1].ancestors, platform.asked[-1].descendants) == (16, 16)
    assert branches(both.stdout) == branches(up.stdout) + branches(down.stdout)
    told = json.loads(esperctl("blueprint", "lineage", "me", "-o", "json").stdout)
    assert [one["generation"] for one in told["relatives"]] == [0, -1, -1, -2, 1, 2]


def test_a_lonely_blueprint_and_a_cut_off_one_say_so(platform, esperctl):
    alone = urza_pb2.GetLineageResponse(
        blueprint_id=FAMILY.blueprint_id, relatives=FAMILY.relatives[:1], truncated=True
    )
    platform.on("GetLineage", lambda _: alone)
    shown = esperctl("blueprint", "lineage", "me", "--ancestors", "-n", "1").stdout
    assert "nobody" in shown
    assert "cut off at 1" in shown


def test_forged_circles_are_shown_and_end(platform, esperctl):
    ring = urza_pb2.GetLineageResponse(
        blueprint_id=FAMILY.blueprint_id,
        relatives=[relative("a", "me", 0), relative("b", "mother", -1)],
        descents=[descent("b", "a"), descent("a", "b"), descent("a", "a")],
    )
    platform.on("GetLineage", lambda _: ring)
    assert "see above" in esperctl("blueprint", "lineage", "me", "--ancestors").stdout


def test_a_family_is_drawn(platform, esperctl, tmp_path):
    platform.on("GetLineage", lambda _: FAMILY)
    path = tmp_path / "family.svg"
    done = esperctl("blueprint", "lineage", "me", "--svg", str(path))
    assert done.exit_code == 0
    assert {"me", "grandchild", "not in this library"} <= set(ElementTree.parse(path).getroot().itertext())  # noqa: S314
    assert esperctl("blueprint", "lineage", "me", "--svg", str(tmp_path / "no" / "x.svg")).exit_code == 2


def test_a_design_is_drawn_from_the_library_or_a_file(platform, esperctl, tmp_path):
    design = catalogue()["low_rank"]
    answer = urza_pb2.GetBlueprintResponse(
        blueprint_id=design.id, blueprint=to_proto(design, blueprint_pb2.BlueprintIR), created_by="catalogue"
    )
    platform.on("GetBlueprint", lambda _: answer)
    path = tmp_path / "low_rank.svg"
    told = json.loads(esperctl("blueprint", "draw", "low_rank", "--out", str(path), "-o", "json").stdout)
    assert told == {"file": str(path), "blueprint_id": design.id, "nodes": 2}
    assert "out: width" in path.read_text()
    manifest = kernel_pb2.KernelManifest(
        kernel_id="kernel-" + "3" * 64, blueprint_id=design.id, blueprint=answer.blueprint, symbols={"width": 6},
        interface=blueprint_pb2.SlotInterface(layout=1, in_width=20, out_width=10, hidden_width=4),
    )  # fmt: skip
    platform.on("GetKernel", lambda _: urza_pb2.GetKernelResponse(kernel=kernel_pb2.KernelRecord(manifest=manifest)))
    told = json.loads(
        esperctl("blueprint", "draw", "low_rank", "--out", str(path), "--kernel", "333333", "-o", "json").stdout
    )
    assert told["parameters"] == 20 * 6 + 6 * 10 + 10
    assert "out: width → 6" in path.read_text()
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: mine\nlayouts: [FEATURES]\noutput: W\n"
        "nodes:\n  - {name: W, op: linear, inputs: [input], attributes: {out: out_width}}\n"
    )
    asked = len(platform.asked)
    assert esperctl("blueprint", "draw", str(file), "--out", str(path)).exit_code == 0
    assert len(platform.asked) == asked
    assert "mine" in path.read_text()


def test_query_asks_for_everything_that_was_said(platform, esperctl):
    platform.on("QueryKernels", lambda _: urza_pb2.QueryKernelsResponse())
    done = esperctl(
        "kernel", "query", "-t", "a", "-t", "b", "--not", "c", "--prefer", "d", "--prefer", "e", "--by", "interest",
        "--status", "rejected", "--interface", "interface-1", "--born-of", "karn", "--target", "cpu",
        "--max-parameters", "9", "--max-forward", "0.5", "--max-forward-p99", "0.75", "--max-memory", "7", "-n", "3",
        "--after", "0:1:kernel-",
    )  # fmt: skip
    assert done.exit_code == 0
    assert platform.asked[-1] == urza_pb2.QueryKernelsRequest(
        required_tags=["a", "b"], excluded_tags=["c"], preferred_tags=["d", "e"],
        order=urza_pb2.KERNEL_ORDER_INTEREST, status=kernel_pb2.KERNEL_STATUS_REJECTED, interface_id="interface-1",
        born_of="karn", target="cpu", max_parameters=9, max_forward_seconds=0.5, max_forward_seconds_p99=0.75,
        max_memory_bytes=7, page_size=3, page_token="0:1:kernel-",
    )  # fmt: skip


@pytest.mark.parametrize("dry", [True, False])
def test_gc_tells_what_it_did_or_would(platform, esperctl, dry):
    last = urza_pb2.CollectGarbageResponse(
        doomed=3, forgotten=3, rejected=2, unused=1, blobs=2, bytes=1234, kept=9, done=True
    )
    platform.on("CollectGarbage", lambda _: [urza_pb2.CollectGarbageResponse(doomed=3), last])
    arguments = ["library", "gc", "--keep-unused", "0", *(["--dry-run"] if dry else [])]
    shown = esperctl(*arguments).stdout
    assert platform.asked[-1] == urza_pb2.CollectGarbageRequest(dry_run=dry, keep_unused=0)
    assert ("would be forgotten" in shown) is dry
    assert "2 rejected, 0 retired, 1 never used" in shown
    assert json.loads(esperctl(*arguments, "-o", "json").stdout)["bytes"] == 1234


def test_status_tells_of_the_library_s_own_collections(platform, esperctl):
    told = urza_pb2.GetUpkeepResponse(
        every_seconds=5400, keep_unused=1000, due="2026-01-01T12:00:00+00:00", begun="2026-01-01T10:30:00+00:00",
        finished="2026-01-01T10:30:02+00:00", passes=2, forgotten=7, blobs=3, bytes=1234, kept=50,
    )  # fmt: skip
    platform.on("GetUpkeep", lambda _: told)
    lines = [line.split(maxsplit=1) for line in esperctl("library", "status").stdout.splitlines()]
    assert ["collects", "every 1.5 h"] in lines
    assert ["next", "2026-01-01 12:00:00"] in lines
    assert ["it", "7 kernels forgotten, 3 blobs, 1,234 bytes deleted; 50 kept"] in lines
    assert not any(line[0] == "failed" for line in lines)
    spoken = json.loads(esperctl("library", "status", "-o", "json").stdout)
    assert (spoken["passes"], spoken["due"]) == (2, told.due)
    off = urza_pb2.GetUpkeepResponse(keep_unused=1000, reason="the blob store is away")
    platform.on("GetUpkeep", lambda _: off)
    shown = esperctl("library", "status").stdout
    assert "never: it is turned off" in shown
    assert "the blob store is away" in shown


def test_a_file_that_is_not_there_is_not_sent(platform, esperctl, tmp_path):
    done = esperctl("library", "import", str(tmp_path / "nothing.esper"))
    assert done.exit_code == 3
    assert platform.asked == []
