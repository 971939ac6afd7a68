"""The lifecycle table against the design's, written down here a second time, for all 121 ordered pairs."""

from __future__ import annotations

import itertools

import pytest

from esper_core.errors import Conflict, IllegalTransition
from esper_core.lifecycle import BLENDED, EDGES, IN_FLIGHT, TABLE, State, check, targets
from esper_core.pb.esper.core.v1 import lifecycle_pb2

DESIGN = """
DORMANT       -> GERMINATED
GERMINATED    -> LOADING CULLED
LOADING       -> TRAINING GRAFTING CULLED
TRAINING      -> GRAFTING CULLED
GRAFTING      -> STABILIZATION ROLLED_BACK
STABILIZATION -> EVALUATING ROLLED_BACK
EVALUATING    -> FINE_TUNING FOSSILIZED CULLED ROLLED_BACK
FINE_TUNING   -> FOSSILIZED CULLED ROLLED_BACK
FOSSILIZED    ->
CULLED        -> DORMANT
ROLLED_BACK   -> DORMANT
"""
ALLOWED = {
    (source.strip(), target)
    for source, _, rest in (line.partition("->") for line in DESIGN.strip().splitlines())
    for target in rest.split()
}
GUARDED = [edge for edge in EDGES if edge.guards]


@pytest.mark.parametrize(("source", "target"), list(itertools.product(State, repeat=2)))
def test_every_ordered_pair(source: State, target: State) -> None:
    edge = TABLE.get((source, target))
    assert (edge is not None) == ((source.name, target.name) in ALLOWED)
    if edge is not None:
        assert check(source, target, dict.fromkeys(edge.guards, True)) is edge
        return
    everything = {guard: True for each in EDGES for guard in each.guards}
    with pytest.raises(IllegalTransition) as caught:
        check(source, target, everything)
    assert isinstance(caught.value, Conflict)
    assert source.name in caught.value.message
    assert all(state.name in caught.value.hint for state in targets(source))


def test_there_are_eleven_states_and_121_pairs() -> None:
    assert len(State) == 11
    assert len(list(itertools.product(State, repeat=2))) == 121
    assert len(TABLE) == len(EDGES) == len(ALLOWED) == 21


@pytest.mark.parametrize(
    ("source", "target", "guard"), [(edge.source, edge.target, guard) for edge in GUARDED for guard in edge.guards]
)
def test_every_guard_must_be_a_measured_truth(source: State, target: State, guard: str) -> None:
    facts = dict.fromkeys(TABLE[source, target].guards, True)
    check(source, target, facts)
    with pytest.raises(IllegalTransition, match=rf"{guard} \(false\)"):
        check(source, target, facts | {guard: False})
    del facts[guard]
    with pytest.raises(IllegalTransition, match=rf"{guard} \(not measured\)"):
        check(source, target, facts)


def test_without_facts_only_unguarded_edges_are_open() -> None:
    open_edges = set()
    for source, target in TABLE:
        try:
            open_edges.add((check(source, target).source, target))
        except IllegalTransition:
            continue
    assert {target for _, target in open_edges} == {State.CULLED, State.ROLLED_BACK}
    assert len(open_edges) == 5 + 4  # cancelling, and emergencies


@pytest.mark.parametrize("guard", ["kernel_validated", "kernel_fits", "not_embargoed", "within_budget", "graft_free"])
def test_germination_is_guarded_as_designed(guard: str) -> None:
    assert guard in TABLE[State.DORMANT, State.GERMINATED].guards


def test_numbers_are_those_of_the_wire() -> None:
    wire = {name: number for name, number in lifecycle_pb2.SeedState.items() if number}
    assert wire == {f"SEED_STATE_{state.name}": int(state) for state in State}
    assert lifecycle_pb2.SeedState.Value("SEED_STATE_UNSPECIFIED") == 0
    assert [int(state) for state in State] == list(range(1, 12))


def test_only_a_kept_seed_is_final() -> None:
    assert [state for state in State if not targets(state)] == [State.FOSSILIZED]


def test_every_state_can_be_reached_and_every_seed_can_end() -> None:
    reached = {State.DORMANT}
    while True:
        further = reached | {target for state in reached for target in targets(state)}
        if further == reached:
            break
        reached = further
    assert reached == set(State)
    for state in IN_FLIGHT:
        assert {State.CULLED, State.ROLLED_BACK} & set(targets(state))


def test_emergencies_reach_exactly_the_blended() -> None:
    assert frozenset(state for state in State if State.ROLLED_BACK in targets(state)) == BLENDED
    assert BLENDED < IN_FLIGHT
    assert frozenset(State) - IN_FLIGHT == {State.DORMANT, State.FOSSILIZED, State.CULLED, State.ROLLED_BACK}
