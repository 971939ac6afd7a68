"""Finding kernels: every answer equals a brute-force search, in order, page by page, whatever is asked."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_core.blueprint.catalogue import catalogue
from esper_core.bus.database import Pool
from esper_core.config import Endpoints
from esper_core.errors import InvalidInput
from esper_core.kernel.record import KernelStatus
from services.urza.library import Library
from services.urza.query import Order, Query
from tests.service.innovation.shelf import Row, manifests, put, scratch

POOL = manifests(14)
BLUEPRINTS = [catalogue()[name].id for name in ("low_rank", "linear_bypass")]
TAGS, INTERFACES, PRINCIPALS, TARGETS = "abcd", ("interface-a", "interface-b"), ("karn", "catalogue"), ("here", "there")
FIGURES = (1e-4, 1e-3, 2e-3)
FIRST_SERIAL = {manifest.kernel_id: place for place, manifest in enumerate(POOL)}


@pytest.fixture(scope="module")
async def pool(stack: Endpoints) -> AsyncIterator[Pool]:
    async with scratch(stack) as pool:
        yield pool


def library(pool: Pool) -> Library:
    return Library(pool, None, Path("unused"))  # type: ignore[arg-type]  # searching reads no blob


@st.composite
def populations(draw: st.DrawFn) -> list[Row]:
    few = st.integers(1, 3)
    rows = st.builds(
        Row,
        manifest=st.just(POOL[0]),
        parameters=few,
        status=st.sampled_from(KernelStatus).filter(lambda status: status is not KernelStatus.VALIDATED),
        tags=st.lists(st.sampled_from(TAGS), unique=True).map(tuple),
        interface_id=st.sampled_from(INTERFACES),
        blueprint_id=st.sampled_from(BLUEPRINTS),
        born_of=st.sampled_from(PRINCIPALS),
        interest=st.sampled_from([-math.inf, 0.0, 1.5]),
        forward=st.none() | st.sampled_from(FIGURES),
        memory=few,
        target=st.sampled_from(TARGETS),
    )
    drawn = draw(st.lists(rows, max_size=len(POOL)))
    return [replace(row, manifest=manifest) for row, manifest in zip(drawn, POOL, strict=False)]


@st.composite
def queries(draw: st.DrawFn) -> Query:
    tags = st.lists(st.sampled_from(TAGS), max_size=2, unique=True)
    return Query(
        interface_id=draw(st.sampled_from(("", "", *INTERFACES))),
        status=draw(st.sampled_from((0, 0, 1, 3))),
        required_tags=draw(tags),
        excluded_tags=draw(tags),
        preferred_tags=draw(st.lists(st.sampled_from(TAGS), max_size=3, unique=True)),
        max_parameters=draw(st.sampled_from((0, 0, 2, 2**64 - 1))),
        max_forward_seconds=draw(st.sampled_from((0.0, 0.0, 1e-3))),
        max_forward_seconds_p99=draw(st.sampled_from((0.0, 0.0, 2e-3))),
        max_memory_bytes=draw(st.sampled_from((0, 0, 2, 2**64 - 1))),
        target=draw(st.sampled_from(("", "", *TARGETS))),
        blueprint_id=draw(st.sampled_from(("", "", *BLUEPRINTS))),
        born_of=draw(st.sampled_from(("", "", *PRINCIPALS))),
        order=draw(st.sampled_from(Order)),
        size=draw(st.integers(1, 5)),
    )


def fits(row: Row, query: Query) -> bool:
    """Whether ``row`` is asked for, said without SQL."""
    measured = row.forward is not None
    return (
        query.interface_id in ("", row.interface_id)
        and query.status in (0, row.status)
        and set(query.required_tags) <= set(row.tags)
        and not set(query.excluded_tags) & set(row.tags)
        and (not query.max_parameters or row.parameters <= query.max_parameters)
        and (not query.max_forward_seconds or (measured and row.forward <= query.max_forward_seconds))
        and (not query.max_forward_seconds_p99 or (measured and 2 * row.forward <= query.max_forward_seconds_p99))
        and (not query.max_memory_bytes or (measured and row.memory <= query.max_memory_bytes))
        and (not query.target or (measured and row.target == query.target))
        and query.blueprint_id in ("", row.blueprint_id)
        and query.born_of in ("", row.born_of)
    )


def place(row: Row, query: Query) -> Any:
    """What ``row`` is sorted by."""
    lacks = tuple(tag not in row.tags for tag in query.preferred_tags)
    turned = tuple(-ord(letter) for letter in row.kernel_id)
    return {
        Order.PARAMETERS: (lacks, row.parameters, row.kernel_id),
        Order.FORWARD: (lacks, math.inf if row.forward is None else row.forward, row.kernel_id),
        Order.INTEREST: (lacks, -row.interest, turned),
        Order.NEWEST: (lacks, -FIRST_SERIAL[row.kernel_id]),
    }[query.order]


def expected(rows: list[Row], query: Query) -> list[str]:
    return [
        row.kernel_id for row in sorted((row for row in rows if fits(row, query)), key=lambda row: place(row, query))
    ]


async def page_after(pool: Pool, query: Query, token: str) -> tuple[list[str], str]:
    found, more = await library(pool).query(replace(query, token=token))
    ids = [one.record.manifest.kernel_id for one in found]
    assert len(ids) == query.size or (not more and len(ids) < query.size)
    return ids, found[-1].token if more else ""


@settings(max_examples=120, deadline=None)
@given(rows=populations(), query=queries())
async def test_an_answer_equals_a_brute_force_search(pool: Pool, rows: list[Row], query: Query) -> None:
    await pool.execute("DELETE FROM urza.kernels")
    await put(pool, rows)
    found, token = await page_after(pool, query, "")
    while token:
        ids, token = await page_after(pool, query, token)
        found += ids
    assert found == expected(rows, query)


@settings(max_examples=40, deadline=None)
@given(rows=populations(), query=queries(), chance=st.randoms(use_true_random=False))
async def test_what_stays_is_listed_once_whatever_comes_and_goes(
    pool: Pool, rows: list[Row], query: Query, chance: Any
) -> None:
    await pool.execute("DELETE FROM urza.kernels")
    chance.shuffle(rows)
    there, coming = rows[::2], rows[1::2]
    if query.order is Order.NEWEST:  # which comes when is then part of the answer
        query = replace(query, order=Order.PARAMETERS)
    await put(pool, there)
    stays = {row.kernel_id for row in there}
    found, token = await page_after(pool, query, "")
    while token:
        if coming:
            await put(pool, [coming.pop()])
        gone = chance.choice(there)
        stays.discard(gone.kernel_id)
        await pool.execute("DELETE FROM urza.kernels WHERE kernel_id = $1", gone.kernel_id)
        ids, token = await page_after(pool, query, token)
        found += ids
    assert len(found) == len(set(found))
    assert [one for one in found if one in stays] == [one for one in expected(there, query) if one in stays]


@pytest.mark.parametrize(
    ("order", "tokens"),
    [
        (
            Order.PARAMETERS,
            ["x", "1:", ":kernel-", "0:" + "9" * 30 + ":kernel-a", "1:1:kernel-a", "0:-1:kernel-a", "::"],
        ),
        (Order.FORWARD, ["x", "0:nan:kernel-a", "0:0x1p99999:kernel-a", "-1:1:kernel-a", "0:1:blueprint-a"]),
    ],
)
async def test_a_token_that_is_none_of_ours_is_refused(pool: Pool, order: Order, tokens: list[str]) -> None:
    for token in tokens:
        with pytest.raises(InvalidInput, match="token"):
            await library(pool).query(Query(token=token, order=order))


async def test_too_many_preferred_tags_are_refused() -> None:
    with pytest.raises(InvalidInput, match="5 preferred"):
        Query(preferred_tags="abcde")
