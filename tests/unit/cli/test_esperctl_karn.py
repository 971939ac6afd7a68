"""`esperctl karn` and `blueprint propose` against a platform that answers by script."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest

from esper_core.blueprint.catalogue import catalogue
from esper_core.blueprint.interface import Layout, SlotInterface
from esper_core.errors import Conflict
from esper_core.pb.esper.core.v1 import blueprint_pb2, run_pb2
from esper_core.pb.esper.karn.v1 import karn_pb2
from esper_core.pb.esper.tolaria.v1 import tolaria_pb2
from esper_core.rpc.convert import to_proto

SLOT = SlotInterface(layout=Layout.FEATURES, in_width=16, out_width=8, hidden_width=2, activation="relu")
ID = SLOT.id


def search(generation: int, best: float, state: str = "RUNNING") -> karn_pb2.Search:
    found = karn_pb2.Search(
        search_id="search-1", interface_ids=[ID], generations=2, population=4, seed=3, generation=generation,
        state=f"SEARCH_STATE_{state}", proposed=4 * generation, waiting=0, unfit=1, created="2026-01-01T00:00:00",
    )  # fmt: skip
    if generation:
        found.progress.add(interface_id=ID, level=1, best=best, coverage=0.25, score=3.5, measured=4 * generation)
    return found


def proposal(**changes: object) -> karn_pb2.Proposal:
    told = {
        "blueprint_id": "blueprint-" + "a" * 64, "blueprint_name": "<b>low_rank-g1", "interface_id": ID, "operator": "size",
        "why": "size of low_rank", "units": 4.5, "worth": 0.61, "learned": 0.63, "forward_seconds": 2e-6,
        "expected": karn_pb2.Guess(mean=0.6, half_width=0.05), "state": "PROPOSAL_STATE_MEASURED",
        "blueprint": to_proto(catalogue()["low_rank"], blueprint_pb2.BlueprintIR), "kernel_id": "kernel-" + "b" * 64,
    } | changes  # fmt: skip
    return karn_pb2.Proposal(**told)


def archive() -> karn_pb2.GetArchiveResponse:
    known = karn_pb2.KnownInterface(
        interface_id=ID, interface=to_proto(SLOT, blueprint_pb2.SlotInterface), level=1, measured=9
    )
    elites = [
        karn_pb2.Elite(cost_cell=3, leaning_cell=4, units=4.5, leaning=0.44, proposal=proposal(), grafts=2, kept=1),
        karn_pb2.Elite(
            cost_cell=0, leaning_cell=0, units=0.3, leaning=0.05, proposal=proposal(worth=-0.1, blueprint_name="x")
        ),
    ]
    standing = karn_pb2.Progress(interface_id=ID, level=1, best=0.61, coverage=2 / 120, score=0.61, measured=9)
    return karn_pb2.GetArchiveResponse(
        interface=known, cost_cells=12, leaning_cells=10, cost_low=-2, cost_high=6.5, progress=standing, elites=elites
    )


def test_a_search_for_a_run_s_slots_is_followed_to_its_end(platform, esperctl) -> None:
    run = run_pb2.Run(run_id="digits-1")
    run.slots.add(slot="a:b", interface=to_proto(SLOT, blueprint_pb2.SlotInterface))
    run.slots.add(slot="c:d", interface=to_proto(SLOT, blueprint_pb2.SlotInterface))
    platform.on("GetRun", lambda _: tolaria_pb2.GetRunResponse(run=run))
    platform.on("StartSearch", lambda _: karn_pb2.StartSearchResponse(search=search(0, 0)))
    news = [search(0, 0), search(1, 0.5), search(1, 0.5), search(2, 0.625, "FINISHED")]
    platform.on("WatchSearch", lambda _: [karn_pb2.WatchSearchResponse(search=each) for each in news])
    result = esperctl("karn", "run", "--run", "digits-1", "-g", "2", "-p", "4", "--seed", "3")
    assert result.exit_code == 0, result.output
    asked = platform.asked[1]
    assert (list(asked.interface_ids), asked.generations, asked.population, asked.seed) == ([ID], 2, 4, 3)
    assert result.stdout.count("generation 1/2") == 1
    assert "best 0.625  coverage 25 %" in result.stdout
    assert "FINISHED" in result.stdout
    lines = esperctl("karn", "watch", "-o", "json").stdout.splitlines()
    assert [json.loads(line)["generation"] for line in lines] == [0, 1, 1, 2]
    assert json.loads(lines[-1])["progress"][0]["best"] == 0.625


def test_without_any_interface_one_is_told_what_to_do(platform, esperctl) -> None:
    def refuse(_: object) -> karn_pb2.StartSearchResponse:
        raise Conflict("no slot interface is known yet", hint="train a run first")

    platform.on("StartSearch", refuse)
    platform.on("ListInterfaces", lambda _: karn_pb2.ListInterfacesResponse())
    refused = esperctl("karn", "run")
    assert (refused.exit_code, "hint: train a run first" in refused.stderr) == (5, True)
    assert "esperctl train digits" in esperctl("karn", "interfaces").stdout
    both = esperctl("karn", "run", "--run", "x", "--interface", "y")
    assert (both.exit_code, "stands alone" in both.stderr) == (2, True)


@pytest.mark.parametrize("name", ["archive.svg", "archive.html"])
def test_the_archive_is_shown_and_drawn(platform, esperctl, tmp_path, name: str) -> None:
    platform.on("GetArchive", lambda _: archive())
    path = tmp_path / name
    result = esperctl("karn", "archive", "-i", ID[:20], "--svg", str(path))
    assert result.exit_code == 0, result.output
    assert platform.asked[0].interface_id == ID[:20]
    assert "2 of 120" in result.stdout
    assert "x width=8" in result.stdout
    text = path.read_text()
    assert "<b>low_rank" not in text
    picture = ET.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])  # noqa: S314 - ours
    names = [title.text or "" for title in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert [name.split(":")[0] for name in names] == ["<b>low_rank-g1", "x"]
    filled = [rect.get("fill") for rect in picture.iter("{http://www.w3.org/2000/svg}rect")][-2:]
    assert filled == ["#fde725", "#440154"]
    refused = esperctl("karn", "archive", "--svg", str(tmp_path / "no" / "x.svg"))
    assert (refused.exit_code, "choose another file" in refused.stderr) == (2, True)


def test_proposals_say_what_was_expected_and_why(platform, esperctl) -> None:
    fresh = proposal(state="PROPOSAL_STATE_PROPOSED")
    fresh.ClearField("worth")
    refused = proposal(state="PROPOSAL_STATE_REJECTED", reason="it explodes")
    platform.on("ListProposals", lambda _: karn_pb2.ListProposalsResponse(proposals=[proposal(), fresh, refused]))
    result = esperctl("karn", "proposals", "--search", "latest", "--state", "measured")
    assert (platform.asked[0].search_id, platform.asked[0].state) == ("latest", karn_pb2.PROPOSAL_STATE_MEASURED)
    lines = result.stdout.splitlines()
    assert "0.600 ± 0.050" in lines[1]
    assert lines[1].startswith("<b>low_rank-g1  MEASURED")
    assert lines[1].split()[-4:] == ["4.5", "size", "of", "low_rank"]
    assert lines[3].endswith("it explodes")
    told = json.loads(esperctl("karn", "proposals", "-o", "json").stdout)
    assert [each["worth"] for each in told] == [0.61, None, 0.61]


def test_designs_are_proposed_for_an_interface(platform, esperctl) -> None:
    platform.on("Propose", lambda _: karn_pb2.ProposeResponse(proposals=[proposal()]))
    result = esperctl("blueprint", "propose", ID[:22], "--count", "3", "--only-say", "--seed", "9", "-o", "json")
    asked = platform.asked[0]
    assert (asked.interface_id, asked.count, asked.only_say, asked.seed) == (ID[:22], 3, True, 9)
    assert json.loads(result.stdout)[0]["blueprint"]["name"] == "low_rank"


def test_searches_are_listed_and_stopped(platform, esperctl) -> None:
    platform.on("ListSearches", lambda _: karn_pb2.ListSearchesResponse(searches=[search(1, 0.5)]))
    platform.on("StopSearch", lambda _: karn_pb2.StopSearchResponse(search=search(1, 0.5, "STOPPED")))
    assert "1/2" in esperctl("karn", "searches").stdout
    assert json.loads(esperctl("karn", "stop", "-o", "json").stdout)["state"] == "STOPPED"
    assert platform.asked[-1].search_id == "latest"


def test_a_search_that_gave_up_says_why_and_fails(platform, esperctl) -> None:
    gone = search(1, 0.5, "GAVE_UP")
    gone.unjudged, gone.reason = 4, "Urabrask judged nothing for 5 s"
    platform.on("WatchSearch", lambda _: [karn_pb2.WatchSearchResponse(search=gone)])
    done = esperctl("karn", "watch")
    assert done.exit_code == 9
    assert [line.split() for line in done.stdout.splitlines() if "unjudged" in line] == [["unjudged", "4"]]
    assert "gave up: Urabrask judged nothing for 5 s" in done.stderr
    assert "still enters the archive" in done.stderr
    spoken = esperctl("karn", "watch", "-o", "json")
    assert spoken.exit_code == 9
    assert json.loads(spoken.stdout)["state"] == "GAVE_UP"
