"""What goes wrong on the server arrives at the client as what it was."""

from __future__ import annotations

import re
from typing import Any

import grpc
import pytest

from esper_core import errors
from esper_core.errors import EsperError
from esper_core.pb.esper.urza.v1 import urza_pb2
from esper_core.rpc.status import MAX_HINT, MAX_MESSAGE, to_status

KINDS = [cls for cls in errors.every() if cls is not EsperError]


def _get(kernel_id: str) -> Any:
    return urza_pb2.GetKernelRequest(kernel_id=kernel_id)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not errors.Unavailable])
async def test_error_comes_back_as_its_own_class_with_its_hint(site: Any, kind: type[EsperError]) -> None:
    stub = await (await site()).stub()
    with pytest.raises(EsperError) as caught:
        await stub.GetKernel(_get(f"raise:{kind.__name__}"))
    assert type(caught.value) is kind
    assert caught.value.message == f"{kind.__name__} happened to ünïcode"
    assert caught.value.hint == f"do something about {kind.__name__}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_that_knows_only_grpc_gets_the_right_code(kind: type[EsperError]) -> None:
    status = to_status(kind("why"))
    assert status.code is grpc.StatusCode[kind.status]
    assert status.details == "why"


async def test_an_error_within_a_stream_follows_what_was_sent(site: Any) -> None:
    stub = await (await site()).stub()
    call = stub.StreamKernel(urza_pb2.StreamKernelRequest(kernel_id="kernel-" + "0" * 64, offset=3))
    responses = aiter(call)
    assert [(await anext(responses)).chunk.offset for _ in range(3)] == [0, 1, 2]
    with pytest.raises(errors.Corrupt, match="damaged") as caught:
        await anext(responses)
    assert caught.value.hint == "fetch it again"


@pytest.mark.parametrize("size", [333, 500, 501, 100_000])
async def test_a_long_message_is_cut_not_lost(site: Any, size: int) -> None:
    stub = await (await site()).stub()
    with pytest.raises(errors.NotFound) as caught:
        await stub.GetKernel(_get(f"long:{size}"))
    for text, limit, letter in ((caught.value.message, MAX_MESSAGE, "ß"), (caught.value.hint, MAX_HINT, "ä")):
        assert len(text.encode()) <= limit
        assert text == letter * size or re.fullmatch(f"{letter}+…", text)


def test_text_that_is_no_unicode_does_not_break_the_status() -> None:
    assert to_status(errors.NotFound("file \udcff", hint="\ud800")).details == "file ?"


async def test_an_unexpected_exception_is_an_incident_and_tells_the_client_nothing(
    site: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = await (await site()).stub()
    with pytest.raises(errors.Internal) as caught:
        await stub.GetKernel(_get("boom"))
    told = caught.value.message + caught.value.hint
    assert "4711" not in told
    assert "RuntimeError" not in told
    incident = re.search(r"[0-9a-f-]{36}", told)
    assert incident
    out, err = capsys.readouterr()
    assert incident.group() in err
    assert "RuntimeError" in err
    assert out == ""


async def test_a_method_nobody_wrote_is_unsupported(site: Any) -> None:
    stub = await (await site()).stub()
    with pytest.raises(errors.Unsupported, match="GetBlueprint"):
        await stub.GetBlueprint(urza_pb2.GetBlueprintRequest(blueprint_id="x"))


async def test_a_method_no_contract_has_is_unsupported(site: Any) -> None:
    channel = await (await site()).channel()
    with pytest.raises(errors.Unsupported, match="Nonsense"):
        await channel.unary_unary("/esper.urza.v1.UrzaService/Nonsense")(b"")


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (urza_pb2.StreamKernelRequest(kernel_id="k"), "kernel_id"),
        (urza_pb2.UpdateKernelStatusRequest(kernel_id="kernel-" + "0" * 64, status=2, tags=["ok", "NO"]), "tags[1]"),
        (urza_pb2.UploadBlueprintRequest(), "blueprint"),
    ],
)
async def test_a_violation_names_the_field(site: Any, request_: Any, field: str) -> None:
    method = type(request_).__name__.removesuffix("Request")
    call = getattr(await (await site()).stub(), method)(request_)
    with pytest.raises(errors.InvalidInput) as caught:
        await (call.read() if method == "StreamKernel" else call)
    assert f"{field}: " in caught.value.message
    assert caught.value.hint


async def test_many_violations_are_counted_not_listed(site: Any) -> None:
    request = urza_pb2.UpdateKernelStatusRequest(kernel_id="kernel-" + "0" * 64, status=2, tags=["NO"] * 20)
    with pytest.raises(errors.InvalidInput, match="and 12 more"):
        await (await (await site()).stub()).UpdateKernelStatus(request)


async def test_every_message_of_a_stream_is_validated(site: Any) -> None:
    stub = await (await site()).stub("tezzeret")
    good = urza_pb2.UploadKernelRequest(chunk=b"x")
    assert (await stub.UploadKernel(iter([good] * 3))).kernel_id == "3"
    with pytest.raises(errors.InvalidInput, match="exactly one field"):
        await stub.UploadKernel(iter([good, urza_pb2.UploadKernelRequest()]))


async def test_bytes_that_are_no_message_are_invalid_input(site: Any) -> None:
    channel = await (await site()).channel()
    with pytest.raises(errors.InvalidInput, match="no message"):
        await channel.unary_unary("/esper.urza.v1.UrzaService/GetKernel")(b"\xff\xff\xff")


async def test_a_server_that_is_away_is_no_defect_and_its_words_stay_here(site: Any) -> None:
    stub = await (await site(away=(RuntimeError,))).stub()
    with pytest.raises(errors.Unavailable, match="away") as caught:
        await stub.GetKernel(_get("boom"), timeout=5)
    assert "esperctl status" in caught.value.hint
    assert "4711" not in caught.value.message + caught.value.hint
