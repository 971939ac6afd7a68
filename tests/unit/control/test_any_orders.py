"""Whatever is ordered and whatever goes wrong: no illegal change, no broken host, every order obeyed at most once."""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from esper_core.control.boundary import BoundaryReport
from esper_core.control.packet import Budget
from esper_core.control.settings import GrowthSettings, HeuristicSettings
from esper_core.lifecycle import BLENDED, IN_FLIGHT, TABLE, State
from tests.unit.control.growing import Late, Run, germinate, held, order, owned
from tests.unit.nn.hosts import equal

SLOTS = ("0:2", "2:4", "4:6")
BRIEF = GrowthSettings(
    warmup_epochs=0,
    evaluate_every=3,
    widths=(2,),
    embargo_epochs=1,
    loading_epochs=2,
    training_epochs=1,
    training_patience=4,
    training_steps=15,
    training_learning_rate=2e-2,
    training_batch=16,
    min_reconstruction=-1e9,
    ramp_epochs=2,
    settle_epochs=0,
    settle_patience=1,
    settle_sigmas=100.0,
    fine_tune_epochs=1,
    rent=0.0,
)
slots = st.sampled_from([*SLOTS, "2:4", "2:4", "no:slot"])
ids = st.integers(0, 99).map(str)


class Orders(RuleBasedStateMachine):
    """A tiny run under arbitrary orders."""

    @initialize(
        in_flight=st.integers(1, 3),
        budget=st.sampled_from([None, 40, 200]),
        heuristic=st.booleans(),
        lessons=st.integers(1, 3),
    )
    def begin(self, in_flight: int, budget: int | None, heuristic: bool, lessons: int) -> None:
        changes = {"policy": HeuristicSettings(in_flight=in_flight), "training_epochs": lessons}
        self.settings = BRIEF.model_copy(update=changes)
        self.open = True
        self.budget = Budget(parameters=budget)
        self.heuristic = heuristic
        self.run = self.fresh()
        self.number = 0
        self.initial = self.run.host.parameter_count
        germinate(self.run.grower, "2:4", command_id="first")
        self.live(3)

    def fresh(self) -> Run:
        options = {"controller": None} if self.heuristic else {}
        self.source = Late(self.open, BRIEF.widths)
        run = Run(seed=3, settings=self.settings, budget=self.budget, source=self.source, **options)
        run.data = run.data[:2]
        return run

    @rule(slot=slots, number=st.integers(0, 9), command_id=ids)
    def germinate(self, slot: str, number: int, command_id: str) -> None:
        place = self.run.host.slots.get(slot)
        offers = self.run.grower.source.candidates(place.interface) if place else ()
        kernel = offers[number % len(offers)].kernel_id if offers and number < 9 else "kernel-unknown"
        self.send(slot, State.GERMINATED, command_id, kernel)

    @rule()
    def the_library_comes_and_goes(self) -> None:
        self.open = self.source.open = not self.open

    @rule(slot=slots, state=st.sampled_from(State), command_id=ids)
    def other(self, slot: str, state: State, command_id: str) -> None:
        self.send(slot, state, command_id, "")

    def send(self, slot: str, target: State, command_id: str, kernel: str) -> None:
        self.run.grower.command(order(slot, target, command_id=command_id, kernel_id=kernel))

    @rule(count=st.sampled_from([1, 2, 4, 8]))
    def live(self, count: int) -> None:
        for _ in range(count):
            self.after(self.run.epoch(self.number))

    @rule(loss=st.sampled_from([math.nan, math.inf, 1e6]))
    def alarm(self, loss: float) -> None:
        self.after(self.run.epoch(self.number, loss))

    @precondition(lambda self: any(slot.graft for slot in self.run.host.slots.values()))
    @rule(value=st.sampled_from([math.nan, math.inf, 1e3]))
    def poison(self, value: float) -> None:
        graft = next(slot.graft for slot in self.run.host.slots.values() if slot.graft)
        with torch.no_grad():
            next(graft.kernel.parameters()).fill_(value)

    @rule()
    def resume(self) -> None:
        state = copy.deepcopy(self.run.grower.state_dict())
        again = self.fresh()
        again.grower.load_state_dict(state)
        again.events, again.refused = self.run.events, self.run.refused
        assert equal(again.grower.state_dict()["plot"], state["plot"])
        self.run = again

    def after(self, report: BoundaryReport) -> None:
        self.number += 1
        for event in report.events:
            assert (event.source, event.target) in TABLE
            assert event.reason
        ended = [
            event for event in report.events if event.target in (State.FOSSILIZED, State.CULLED, State.ROLLED_BACK)
        ]
        assert [told.seed_id for told in report.reports] == [event.seed_id for event in ended]

    @invariant()
    def not_too_many_at_once(self) -> None:
        busy = [seed for seed in self.run.grower.seeds if seed.state in IN_FLIGHT]
        assert len(busy) <= self.settings.policy.in_flight

    @invariant()
    def each_seed_goes_from_where_it_was(self) -> None:
        for _, events in itertools.groupby(sorted(self.run.events, key=lambda e: e.seed_id), key=lambda e: e.seed_id):
            chain = list(events)
            assert chain[0].source is State.DORMANT
            assert all(before.target is after.source for before, after in itertools.pairwise(chain))
            assert [event.epoch for event in chain] == sorted(event.epoch for event in chain)

    @invariant()
    def each_order_is_obeyed_or_refused_at_most_once(self) -> None:
        obeyed = Counter(event.command_id for event in self.run.events if event.command_id)
        refused = Counter(command.command_id for command, _ in self.run.refused)
        assert all(count == 1 for count in (obeyed + refused).values())

    @invariant()
    def the_host_is_finite_and_runs(self) -> None:
        assert all(bool(parameter.isfinite().all()) for parameter in self.run.host.parameters())
        with torch.no_grad(), self.run.host.evaluating():
            assert bool(self.run.host(self.run.data[0][0]).isfinite().all())

    @invariant()
    def kernels_are_where_the_states_say(self) -> None:
        trained = set(held(self.run.optimizer))
        expected = set(owned(self.run.host))
        for seed in self.run.grower.seeds:
            graft = self.run.host.slots[seed.slot].graft
            kept = seed.state in BLENDED or seed.state is State.FOSSILIZED
            assert (graft is not None) == (kept or seed.state is State.TRAINING)
            if graft is not None:
                assert graft.attached == kept
                expected |= set(owned(graft.kernel)) if kept else set()
            snapshots = self.run.grower._ledger.snapshots
            assert (seed.slot in snapshots) == (seed.state in BLENDED)
        assert trained == expected

    @invariant()
    def nothing_holds_still_without_a_fresh_graft(self) -> None:
        fresh = {State.GRAFTING, State.STABILIZATION, State.EVALUATING}
        if not any(seed.state in fresh for seed in self.run.grower.seeds):
            assert all(parameter.requires_grad for parameter in self.run.host.parameters())

    @invariant()
    def the_budget_holds(self) -> None:
        if self.budget.parameters is not None and not any(s.state in IN_FLIGHT for s in self.run.grower.seeds):
            assert self.run.grower.plot.parameters - self.initial <= self.budget.parameters

    def teardown(self) -> None:
        if hasattr(self, "run"):
            plain, report = self.run.grower.finish()
            with torch.no_grad():
                assert bool(plain.eval()(self.run.data[0][0]).isfinite().all())
            assert report.fossilized == sum(event.target is State.FOSSILIZED for event in self.run.events)


Orders.TestCase.settings = settings(
    max_examples=8,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking a run of many epochs takes longer than reading it
)
TestOrders = Orders.TestCase
