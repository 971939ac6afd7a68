"""Designs in files: what may be written, and what is refused with the place."""

import json

import pytest

from esper_core.blueprint.catalogue import catalogue
from esper_core.cli.blueprint import read_design
from esper_core.errors import InvalidInput, NotFound
from esper_core.pb.esper.core.v1.blueprint_pb2 import BlueprintIR as Wire
from esper_core.pb.esper.urza.v1 import urza_pb2
from esper_core.rpc.convert import to_proto

DESIGNS = catalogue()


def written(tmp_path, text: str):
    path = tmp_path / "design.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", DESIGNS)
def test_what_the_library_has_can_be_written_down_and_read_again(tmp_path, name):
    design = DESIGNS[name]
    as_json = tmp_path / "design.json"
    as_json.write_text(design.model_dump_json())
    assert read_design(as_json).id == design.id


def test_layouts_by_name_and_numbers_as_attributes(tmp_path):
    design = next(iter(DESIGNS.values()))
    document = design.model_dump(mode="json")
    document["layouts"] = [layout.name.lower() for layout in design.layouts]
    for node in document["nodes"]:
        node["attributes"] = {k: int(v) if v.isdecimal() else v for k, v in node["attributes"].items()}
    assert read_design(written(tmp_path, json.dumps(document))).id == design.id


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("name: x\nnodes: []\n", "layouts", "list"),
        ("name: x\nlayouts: [FEATURS]\nnodes: []\n", "FEATURS", "FEATURES"),
        ("name: x\nlayout: [FEATURES]\n", "'layout'", "layouts"),
        ("name: x\nlayouts: [FEATURES]\nnodes: [1]\n", "nodes.0", "op"),
        ("name: x\nlayouts: [FEATURES]\nnodes: [{nme: a}]\n", "'nme'", "name"),
        ("name: x\nlayouts: [FEATURES]\nnodes: [{name: a, attributes: [1]}]\n", "nodes.0.attributes", "name: value"),
        (
            "name: x\nlayouts: [FEATURES]\noutput: a\nnodes: [{name: a, op: linaer, inputs: [input]}]",
            "linaer",
            "linear",
        ),
        ("name: [\n", "line", ""),
    ],
)
def test_refused_with_place_and_hint(tmp_path, text, said, hint):
    with pytest.raises(InvalidInput) as caught:
        read_design(written(tmp_path, text))
    assert said in caught.value.message
    assert hint in caught.value.hint


def test_no_such_file(tmp_path):
    with pytest.raises(NotFound):
        read_design(tmp_path / "none.yaml")


def test_submit_sends_the_design(platform, esperctl, tmp_path):
    design = next(iter(DESIGNS.values()))
    answer = urza_pb2.UploadBlueprintResponse(blueprint_id=design.id, created=True)
    platform.on("UploadBlueprint", lambda _: answer)
    done = esperctl("blueprint", "submit", str(written(tmp_path, design.model_dump_json())), "-o", "json")
    assert json.loads(done.stdout) == {"blueprint_id": design.id, "created": True, "name": design.name}
    assert platform.asked[0].blueprint == to_proto(design, Wire)


def test_list_and_show(platform, esperctl):
    stored = [
        urza_pb2.GetBlueprintResponse(blueprint_id=design.id, blueprint=to_proto(design, Wire), created_by="karn")
        for design in DESIGNS.values()
    ]
    platform.on("ListBlueprints", lambda _: urza_pb2.ListBlueprintsResponse(blueprints=stored))
    platform.on("GetBlueprint", lambda _: stored[0])
    page = esperctl("blueprint", "list").stdout
    for design in DESIGNS.values():
        assert design.name in page
        assert design.id[:22] in page
    page = esperctl("blueprint", "show", stored[0].blueprint.name).stdout
    for node in stored[0].blueprint.nodes:
        assert node.name in page
        assert node.op in page
