"""The heuristic policy on hand-made packets: thresholds, evidence held twice, caps, choice of kernel, and why it waits."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from esper_core.blueprint.interface import Layout, SlotInterface
from esper_core.control.heuristic import HeuristicController, HeuristicPolicy
from esper_core.control.packet import (
    AdaptationSignal,
    Budget,
    GrowthSignal,
    HealthSignal,
    KernelCandidate,
    ReasonCode,
    SlotState,
    SystemStatePacket,
)
from esper_core.control.settings import HeuristicSettings
from esper_core.lifecycle import IN_FLIGHT, State, check

INTERFACE = SlotInterface(
    layout=Layout.FEATURES, in_width=8, out_width=8, hidden_width=2, activation="relu", foldable=True
)
UNIT = 17
"""Parameters of one more unit: 8 in, 8 out, a bias."""


def signal(confidence: float = 0.9, gain: float = 1.0, **changes: Any) -> GrowthSignal:
    values: dict[str, Any] = {
        "gain": gain,
        "gain_relative": 0.5,
        "share": 0.8,
        "score": 1.0,
        "gain_of_loss": 0.1,
        "spectrum": (8.0, 1.0, 0.5, 0.5),
        "samples": 1024,
        "unit_parameters": UNIT,
    }
    return GrowthSignal(confidence=confidence, **(values | changes))


def offer(width: int, name: str = "bottleneck_mlp", **changes: Any) -> KernelCandidate:
    values: dict[str, Any] = {"parameters": width * UNIT + 8, "foldable": True} | changes
    return KernelCandidate(
        kernel_id=f"kernel-{name}-{width}", blueprint_id=f"blueprint-{name}", blueprint_name=name, width=width, **values
    )


OFFERS = (offer(4), offer(1), offer(2))


def slot(name: str = "a:b", health: float | None = 0.1, **changes: Any) -> SlotState:
    evidence = changes.pop("evidence", (signal(), signal()))
    dead = changes.pop("dead", 0.0)
    values: dict[str, Any] = {"interface": INTERFACE, "state": State.DORMANT, "candidates": OFFERS} | changes
    last = evidence[-1] if evidence else None
    told = HealthSignal(slot=name, health=health, signal=None if health is None else last, dead_unit_ratio=dead)
    return SlotState(slot=name, health=told, evidence=evidence, **values)


def decide(*slots: SlotState, budget: Budget | None = None, epoch: int = 10, **changes: Any) -> AdaptationSignal:
    packet = SystemStatePacket(run_id="run", epoch=epoch, slots=slots, budget=budget or Budget())
    return HeuristicPolicy(HeuristicSettings(**changes)).decide(packet)


def codes(found: AdaptationSignal) -> list[ReasonCode]:
    return [reason.code for reason in found.abstentions]


def test_a_slot_in_need_grows_and_the_reasons_are_told() -> None:
    (action,) = decide(slot()).actions
    assert (action.command.slot, action.command.target) == ("a:b", State.GERMINATED)
    assert action.command.run_id == "run"
    assert action.command.issued_by == "tamiyo"
    assert [reason.code for reason in action.reasons] == [
        ReasonCode.UNHEALTHY,
        ReasonCode.CONFIDENT,
        ReasonCode.BEST_PLACE,
        ReasonCode.KERNEL_FITS_SPECTRUM,
    ]
    assert all(reason.detail and reason.value is not None for reason in action.reasons)
    assert action.confidence == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("second", "widths"),
    [(0.5, [2, 2]), (0.41, [2, 2]), (0.39, [4])],
    ids=["equal", "nearly", "less good"],
)
def test_places_that_are_about_as_good_share_the_budget(second: float, widths: list[int]) -> None:
    needy = signal(spectrum=(1.0, 1.0, 1.0, 1.0), gain_relative=0.5)
    other = needy.model_copy(update={"gain_relative": second})
    found = decide(
        slot("a:b", evidence=(needy, needy)),
        slot("c:d", evidence=(other, other)),
        budget=Budget(parameters=4 * UNIT),
        in_flight=2,
    )
    assert [int(action.command.kernel_id.rpartition("-")[2]) for action in found.actions] == widths


@pytest.mark.parametrize(("health", "acts"), [(0.29, True), (0.3, False), (0.9, False)])
def test_the_health_threshold(health: float, acts: bool) -> None:
    found = decide(slot(health=health))
    assert bool(found.actions) == acts
    assert acts or codes(found) == [ReasonCode.HEALTHY]


@pytest.mark.parametrize(
    ("before", "now", "acts"), [(0.71, 0.71, True), (0.7, 0.99, False), (0.99, 0.7, False), (0.2, 0.99, False)]
)
def test_the_weaker_of_two_evaluations_must_be_sure(before: float, now: float, acts: bool) -> None:
    found = decide(slot(evidence=(signal(0.99), signal(before), signal(now))))
    assert bool(found.actions) == acts
    assert acts or codes(found) == [ReasonCode.NOT_CONFIDENT]
    if not acts:
        assert found.abstentions[0].value == min(before, now)


def test_evidence_seen_once_is_not_enough() -> None:
    assert codes(decide(slot(evidence=(signal(1.0),)))) == [ReasonCode.NOT_CONFIDENT]


@pytest.mark.parametrize("changes", [{"evidence": ()}, {"health": None}])
def test_unmeasured_is_no_reason_to_act(changes: dict[str, Any]) -> None:
    assert codes(decide(slot(**changes))) == [ReasonCode.NOT_MEASURED]


def test_an_embargoed_slot_rests() -> None:
    assert codes(decide(slot(embargo_until_epoch=11), epoch=10)) == [ReasonCode.EMBARGOED]
    assert decide(slot(embargo_until_epoch=10), epoch=10).actions


@pytest.mark.parametrize("state", [state for state in State if state is not State.DORMANT])
def test_only_dormant_slots_are_acted_on(state: State) -> None:
    found = decide(slot(state=state))
    assert found.actions == ()
    assert codes(found) == ([ReasonCode.GRAFT_IN_FLIGHT] if state in IN_FLIGHT else [])


def test_one_graft_at_a_time() -> None:
    found = decide(slot("a:b"), slot("c:d", state=State.TRAINING))
    assert found.actions == ()
    assert codes(found) == [ReasonCode.GRAFT_IN_FLIGHT]
    assert len(decide(slot("a:b"), slot("c:d", state=State.TRAINING), in_flight=2).actions) == 1


@pytest.mark.parametrize(
    ("in_flight", "per_epoch", "budget", "actions"),
    [(1, 2, 2, 1), (8, 2, 2, 2), (8, 1, 2, 1), (8, 2, 1, 1), (8, 0, 2, 0), (8, 2, 0, 0), (8, 2, 9, 2)],
)
def test_caps(in_flight: int, per_epoch: int, budget: int, actions: int) -> None:
    found = decide(
        *[slot(name) for name in ("a:b", "c:d", "e:f")],
        budget=Budget(adaptations=budget),
        in_flight=in_flight,
        adaptations_per_epoch=per_epoch,
    )
    assert len(found.actions) == actions
    assert (codes(found) == [ReasonCode.NO_BUDGET]) == (actions == 0)
    assert len({action.command.slot for action in found.actions}) == actions


def test_the_best_place_is_gain_times_share_per_parameter() -> None:
    found = decide(
        slot("raw", evidence=(signal(), signal(gain=9.0))),
        slot("relative", evidence=(signal(), signal(gain_relative=0.9))),
        slot("share", evidence=(signal(), signal(share=1.0))),
        slot("cheap", evidence=(signal(), signal(unit_parameters=5))),
        slot("dear", evidence=(signal(), signal(gain_relative=0.9, unit_parameters=200))),
        in_flight=2,
    )
    assert [action.command.slot for action in found.actions] == ["cheap", "relative"]


@pytest.mark.parametrize(
    ("spectrum", "width", "coverage"),
    [
        *[(spectrum, width, {"coverage": 0.9}) for spectrum, width in [((9.0, 1.0), 1), ((8.9, 1.1), 2)]],
        *[(spectrum, width, {}) for spectrum, width in [((99.0, 1.0), 1), ((98.9, 1.1), 2), ((9.0, 1.0), 2)]],
        *[((5.0, 5.0), 2, {}), ((4.0, 3.0, 2.0, 1.0), 4, {}), ((1.0,) * 8, 4, {})],
    ],
)
def test_the_cheapest_kernel_that_covers_the_spectrum(
    spectrum: tuple[float, ...], width: int, coverage: dict[str, float]
) -> None:
    """0.99 of the gain if nothing else is said; where none covers that much, the one that covers most."""
    (action,) = decide(slot(evidence=(signal(), signal(spectrum=spectrum))), **coverage).actions
    assert action.command.kernel_id == f"kernel-bottleneck_mlp-{width}"
    assert action.expected_gain == pytest.approx(sum(spectrum[:width]))


def test_at_equal_cost_the_kernel_with_more_to_learn_with() -> None:
    rich = offer(2, "rich", parameters=90)
    (action,) = decide(slot(candidates=(offer(2), rich))).actions
    assert action.command.kernel_id == rich.kernel_id


def test_what_cannot_be_folded_is_the_last_resort() -> None:
    beside = offer(4, "beside", foldable=False, parameters=3)
    assert decide(slot(candidates=(beside, offer(4)))).actions[0].command.kernel_id != beside.kernel_id
    assert decide(slot(candidates=(beside,))).actions[0].command.kernel_id == beside.kernel_id


@pytest.mark.parametrize(("left", "width"), [(4 * UNIT, 4), (4 * UNIT - 1, 2), (UNIT, 1), (UNIT - 1, None)])
def test_the_budget_bounds_what_the_host_gains(left: int, width: int | None) -> None:
    found = decide(slot(evidence=(signal(), signal(spectrum=(1.0,) * 4))), budget=Budget(parameters=left))
    assert [a.command.kernel_id for a in found.actions] == ([] if width is None else [f"kernel-bottleneck_mlp-{width}"])
    assert width or codes(found) == [ReasonCode.NO_KERNEL]


def test_two_actions_share_the_budget() -> None:
    needy = (signal(), signal(spectrum=(1.0,) * 4))
    found = decide(
        slot("a:b", evidence=needy), slot("c:d", evidence=needy), budget=Budget(parameters=5 * UNIT), in_flight=2
    )
    assert [action.command.kernel_id for action in found.actions] == [
        "kernel-bottleneck_mlp-2",
        "kernel-bottleneck_mlp-2",
    ]


def test_barred_blueprints_are_left_out() -> None:
    other = offer(4, "low_rank")
    needy = (signal(), signal(spectrum=(1.0,) * 4))
    both = {"candidates": (offer(4), other), "evidence": needy}
    (action,) = decide(slot(barred_blueprint_ids=("blueprint-bottleneck_mlp",), **both)).actions
    assert action.command.kernel_id == other.kernel_id
    found = decide(slot(barred_blueprint_ids=("blueprint-bottleneck_mlp", "blueprint-low_rank"), **both))
    assert codes(found) == [ReasonCode.NO_KERNEL]


def test_a_place_without_a_kernel_gives_way_to_the_next() -> None:
    found = decide(slot("best", evidence=(signal(), signal(gain_relative=0.9)), candidates=()), slot("next"))
    assert [action.command.slot for action in found.actions] == ["next"]
    assert codes(found) == [ReasonCode.NO_KERNEL]


MUTE = (signal(0.0, gain=0.0, share=0.0, gain_of_loss=0.0, spectrum=(0.0, 0.0)),)


def mute(name: str, dead: float = 1.0, **changes: Any) -> SlotState:
    return slot(name, health=1.0, evidence=MUTE, dead=dead, **changes)


def test_dead_layers_take_turns_when_every_signal_is_mute() -> None:
    found = decide(mute("a:b", generation=1), mute("c:d"), mute("e:f", dead=0.5))
    assert [action.command.slot for action in found.actions] == ["c:d"]
    assert ReasonCode.TURN in [reason.code for reason in found.actions[0].reasons]
    assert decide(mute("a:b", generation=1), mute("c:d", generation=2)).actions[0].command.slot == "a:b"


def test_a_turn_that_cannot_be_taken_passes_to_the_next() -> None:
    assert decide(mute("a:b", candidates=()), mute("c:d", generation=3)).actions[0].command.slot == "c:d"
    assert decide(mute("a:b", embargo_until_epoch=99), mute("c:d", generation=3)).actions[0].command.slot == "c:d"


@pytest.mark.parametrize("living", [slot("x:y", health=0.9), slot("x:y", health=0.1)])
def test_no_turns_while_anything_speaks(living: SlotState) -> None:
    reasons = [reason.code for action in decide(mute("a:b"), living).actions for reason in action.reasons]
    assert ReasonCode.TURN not in reasons


def test_at_equal_cost_the_kernel_that_learned_better_is_taken() -> None:
    good = offer(4, "good", learned=0.8)
    poor = offer(4, "poor", learned=0.2, parameters=4 * UNIT + 80)
    cheap = offer(2, "cheap", learned=0.1)

    def taken(*offers: KernelCandidate, spectrum: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)) -> str:
        needy = signal(spectrum=spectrum)
        (action,) = decide(slot(candidates=offers, evidence=(needy, needy))).actions
        return action.command.kernel_id

    assert taken(poor, good) == good.kernel_id
    assert taken(offer(4), good) == good.kernel_id  # one that was never taught counts as one that learned nothing
    assert taken(good, cheap, spectrum=(1.0, 1.0)) == cheap.kernel_id


def test_a_dead_layer_grows_though_its_signal_is_weak() -> None:
    weak = signal(0.0, share=0.1)
    (action,) = decide(slot("a:b", health=0.6, evidence=(weak, weak), dead=1.0), slot("c:d", health=0.9)).actions
    assert action.command.slot == "a:b"
    assert ReasonCode.DEAD in [reason.code for reason in action.reasons]
    for living in (slot(health=0.6, evidence=(weak, weak), dead=0.99), slot(health=0.6, evidence=(weak,), dead=1.0)):
        assert decide(living).actions == ()


@pytest.mark.parametrize(
    ("losses", "waits"),
    [
        # (1/2)^7 of 0.4 is left in seven epochs, a third of a hundredth; at a standstill all of it
        ((1.6, 0.8, 0.4), True),
        ((0.4, 0.4, 0.4), False),
        ((0.3, 0.2, 0.4), False),
        # already under a twentieth
        ((0.04, 0.04, 0.04), True),
        # two losses have no pace yet
        ((0.04, 0.04), False),
    ],
)
def test_a_run_that_solves_its_task_by_itself_is_left_alone(losses: tuple[float, ...], waits: bool) -> None:
    packet = SystemStatePacket(run_id="run", epoch=10, slots=(slot(),), loss_window=losses, first_loss=1.0)
    found = HeuristicPolicy().decide(packet)
    assert bool(found.actions) != waits
    assert (codes(found) == [ReasonCode.ON_ITS_WAY]) == waits
    assert HeuristicPolicy(HeuristicSettings(solved=0.0)).decide(packet).actions
    assert HeuristicPolicy().decide(packet.model_copy(update={"first_loss": None})).actions


def test_silence_without_death_is_health() -> None:
    found = decide(mute("a:b", dead=0.0), mute("c:d", dead=0.9))
    assert found.actions == ()
    assert codes(found) == [ReasonCode.HEALTHY, ReasonCode.HEALTHY]


def test_the_version_names_the_settings() -> None:
    assert HeuristicPolicy().version == HeuristicPolicy(HeuristicSettings()).version
    assert HeuristicPolicy().version != HeuristicPolicy(HeuristicSettings(coverage=0.5)).version
    assert decide(slot()).policy_version == HeuristicPolicy().version


def test_in_process_it_decides_alike() -> None:
    packet = SystemStatePacket(run_id="run", epoch=10, slots=(slot(),))
    (action,) = HeuristicController(HeuristicSettings()).decide(packet).actions
    assert action.command.kernel_id == decide(slot()).actions[0].command.kernel_id
    assert action.command.issued_by == "library"


# -- any packet whatever --------------------------------------------------------------------------------------------

unit = st.floats(0, 1)
gains = st.sampled_from([0.0, 1e-3, 1.0, 1e6])
signals = st.builds(
    signal,
    confidence=unit,
    gain=gains,
    gain_relative=gains,
    share=unit,
    spectrum=st.lists(gains, max_size=6).map(tuple),
    unit_parameters=st.integers(0, 100),
)
offers = st.builds(
    offer,
    st.integers(0, 8),
    st.sampled_from(["bottleneck_mlp", "low_rank", "other"]),
    parameters=st.integers(0, 500),
    foldable=st.booleans(),
)


@st.composite
def packets(draw: st.DrawFn) -> SystemStatePacket:
    names = draw(st.lists(st.sampled_from("abcdef"), unique=True, max_size=6))
    slots = [
        slot(
            name,
            health=draw(st.none() | unit),
            evidence=tuple(draw(st.lists(signals, max_size=3))),
            dead=draw(st.sampled_from([0.0, 0.5, 1.0])),
            state=draw(st.sampled_from([State.DORMANT, State.DORMANT, *State])),
            generation=draw(st.integers(0, 3)),
            embargo_until_epoch=draw(st.integers(0, 20)),
            barred_blueprint_ids=tuple(
                draw(st.lists(st.sampled_from(["blueprint-other", "blueprint-low_rank"]), max_size=2))
            ),
            candidates=tuple(draw(st.lists(offers, max_size=4, unique_by=lambda o: o.kernel_id))),
        )
        for name in names
    ]
    budget = Budget(parameters=draw(st.none() | st.integers(0, 400)), adaptations=draw(st.integers(0, 3)))
    return SystemStatePacket(run_id="run", epoch=draw(st.integers(0, 20)), slots=tuple(slots), budget=budget)


@settings(deadline=None, max_examples=100)
@given(packets(), st.integers(1, 4), st.integers(0, 2))
def test_no_packet_makes_it_overstep(packet: SystemStatePacket, in_flight: int, per_epoch: int) -> None:
    policy = HeuristicPolicy(HeuristicSettings(in_flight=in_flight, adaptations_per_epoch=per_epoch))
    found = policy.decide(packet)
    busy = sum(each.state in IN_FLIGHT for each in packet.slots)
    assert len(found.actions) <= min(per_epoch, packet.budget.adaptations, max(0, in_flight - busy))
    by_name = {each.slot: each for each in packet.slots}
    spent = 0
    for action in found.actions:
        place = by_name.pop(action.command.slot)  # each slot at most once
        assert place.state is State.DORMANT
        assert place.embargo_until_epoch <= packet.epoch
        chosen = {each.kernel_id: each for each in place.candidates}[action.command.kernel_id]
        assert chosen.blueprint_id not in place.barred_blueprint_ids
        spent += chosen.cost(place.evidence[-1].unit_parameters if place.evidence else 0)
        facts = ("kernel_validated", "kernel_fits", "not_embargoed", "within_budget", "graft_free")
        check(place.state, action.command.target, dict.fromkeys(facts, True))
        assert action.reasons
    assert packet.budget.parameters is None or spent <= packet.budget.parameters
    again = policy.decide(packet)
    assert [(a.command.slot, a.command.kernel_id, a.reasons) for a in again.actions] == [
        (a.command.slot, a.command.kernel_id, a.reasons) for a in found.actions
    ]
    assert again.abstentions == found.abstentions
