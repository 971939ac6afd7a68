"""Proposing: the least worth per parameter first, within every room."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_core.control.carve.papers import CarveSurvey, Standing
from esper_core.control.carve.rules import most, propose


def standing(name: str, importance: list[float], **facts: Any) -> Standing:
    candidates = {"candidates": tuple(range(len(importance))), "importance": tuple(importance)}
    change = {"change": tuple(-value for value in importance)}
    return Standing(
        cluster=name,
        **({"units": len(importance), "unit_parameters": 10, "unit_flops": 20} | facts),
        **candidates,
        **change,
    )


def survey(*clusters: Standing, **facts: Any) -> CarveSurvey:
    given = {"room_parameters": 1000, "room_loss": 1.0, "room_share": 1.0} | facts
    return CarveSurvey(run_id="r", epoch=3, loss=1.0, parameters=5000, flops=9000, clusters=clusters, **given)


def chosen(found: CarveSurvey, **room: Any) -> dict[str, tuple[int, ...]]:
    proposal = propose(found, **room)
    return {cut.cluster: cut.units for cut in proposal.cuts} if proposal else {}


def test_the_least_worthy_go_first_and_the_figures_add_up() -> None:
    found = survey(standing("a", [0.3, 0.0, 0.5, 0.1]), room_loss=0.2)
    proposal = propose(found)
    assert proposal is not None
    assert chosen(found) == {"a": (1, 3)}
    assert (proposal.parameters, proposal.flops) == (20, 40)
    assert proposal.expected_change == pytest.approx(-0.1)


def test_worth_counts_per_parameter() -> None:
    dear = standing("dear", [0.2, 9.0], unit_parameters=100)
    cheap = standing("cheap", [0.1, 9.0], unit_parameters=10)
    assert chosen(survey(dear, cheap, room_loss=0.2)) == {"dear": (0,)}


def test_a_cluster_keeps_its_least_and_its_share() -> None:
    assert chosen(survey(standing("a", [0.0, 0.0, 0.0]))) == {"a": (0, 1)}
    assert chosen(survey(standing("kernel s", [0.0], least=0))) == {"kernel s": (0,)}
    assert chosen(survey(standing("a", [0.0] * 8), room_share=0.25)) == {"a": (0, 1)}
    assert most(standing("a", [0.0]), 1.0) == 0


def test_an_obstacle_bars_a_cluster_or_everything() -> None:
    assert chosen(survey(standing("a", [0.0, 0.0], obstacle="LayerNorm"), standing("b", [0.0, 0.0]))) == {"b": (0,)}
    assert propose(survey(standing("a", [0.0, 0.0]), obstacle="the budget is used up")) is None
    assert propose(survey(standing("a", [5.0, 5.0]))) is None


def test_one_may_ask_for_less_or_more() -> None:
    found = survey(standing("a", [0.0, 0.1, 0.2, 0.3]), room_parameters=20, room_loss=0.05)
    assert chosen(found) == {"a": (0,)}
    assert chosen(found, max_loss=1.0) == {"a": (0, 1)}
    assert chosen(found, max_loss=1.0, max_parameters=30) == {"a": (0, 1, 2)}


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=6), min_size=1, max_size=4),
    st.integers(0, 100),
    st.floats(0, 2),
    st.floats(0.01, 1),
)
def test_no_room_is_ever_exceeded(importance: list[list[float]], parameters: int, loss: float, share: float) -> None:
    clusters = [standing(f"c{number}", values) for number, values in enumerate(importance)]
    found = survey(*clusters, room_parameters=parameters, room_loss=loss, room_share=share)
    proposal = propose(found)
    if proposal is None:
        return
    assert proposal.parameters <= parameters
    by_name = {cluster.cluster: cluster for cluster in clusters}
    spent = sum(by_name[cut.cluster].importance[unit] for cut in proposal.cuts for unit in cut.units)
    assert spent <= loss + 1e-9
    assert all(len(cut.units) < by_name[cut.cluster].units for cut in proposal.cuts)
    assert all(len(cut.units) <= max(1, share * by_name[cut.cluster].units) for cut in proposal.cuts)
