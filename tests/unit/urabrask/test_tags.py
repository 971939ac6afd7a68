"""Tags follow from the figures, and move as the population does; ranks, counted one by one, are the oracle."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from esper_core.blueprint.catalogue import catalogue
from esper_core.blueprint.interface import Layout, SlotInterface
from esper_core.kernel.manifest import KernelManifest, Provenance
from esper_core.kernel.record import Measurement
from services.urabrask.retag import Standing, changes
from services.urabrask.tags import ENOUGH, FIXED, RELATIVE, RISK, Figures, bounds, retagged, tags_for

SLOT = SlotInterface(layout=Layout.FEATURES, in_width=12, out_width=7, hidden_width=3, activation="relu", foldable=True)


def measured(seconds: float = 1e-4, memory: int = 1 << 20, target: str = "here", batch: int = 64) -> Measurement:
    return Measurement(
        batch=batch,
        forward_seconds=seconds,
        forward_seconds_p99=seconds,
        backward_seconds=2 * seconds,
        peak_memory_bytes=memory,
        precision_drift=1e-7,
        gradient_norm=1.0,
        deterministic=True,
        repetitions=30,
        target=target,
    )


def kernel(number: int, seconds: float, memory: int, parameters: int, target: str, risk: float = 0.5) -> Standing:
    """Tagged as if it had been alone."""
    found = measured(seconds, memory, target)
    tags = retagged(["width:8"], Figures.of(found, parameters), FIXED, risk)
    return Standing(f"kernel-{number}", found, tuple(tags), parameters, risk)


def tier(value: float, everyone: Sequence[float]) -> str:
    """By counting who is strictly lower."""
    lower = sum(other < value for other in everyone)
    return "low" if lower < len(everyone) // 3 else "medium" if lower < 2 * len(everyone) // 3 else "high"


def oracle(of: Standing, everyone: Sequence[Standing]) -> set[str]:
    kind = [other for other in everyone if other.measurement.target == of.measurement.target]
    risk = "low" if of.risk <= 1 / 3 else "medium" if of.risk <= 2 / 3 else "high"
    if len(kind) < ENOUGH:
        return {*of.tags} - {tag for tag in of.tags if tag.startswith("risk:")} | {f"risk:{risk}"}
    tiers = {
        f"{name}:{tier(getattr(of.figures, name), [getattr(other.figures, name) for other in kind])}"
        for name in RELATIVE
    }
    return {"width:8", f"risk:{risk}", *tiers}


figures = st.tuples(
    st.floats(1e-7, 1e-2),
    st.integers(0, 1 << 30),
    st.integers(0, 10**7),
    st.sampled_from(["here", "there"]),
    st.floats(0, 1),
)


@given(st.lists(figures, min_size=1, max_size=90))
@settings(max_examples=200, deadline=None)
def test_only_what_the_oracle_would_tag_otherwise_changes_and_then_to_that(population: list) -> None:
    everyone = [kernel(number, *values) for number, values in enumerate(population)]
    changed = {change.kernel.kernel_id: set(change.tags) for change in changes(everyone)}
    for one in everyone:
        wanted = oracle(one, everyone)
        assert changed.get(one.kernel_id, set(one.tags)) == wanted
        assert (one.kernel_id in changed) == (wanted != set(one.tags))


@given(st.lists(figures, min_size=ENOUGH, max_size=60))
@settings(max_examples=50, deadline=None)
def test_retagging_twice_changes_nothing_more(population: list) -> None:
    everyone = {one.kernel_id: one for one in (kernel(n, *values) for n, values in enumerate(population))}
    for change in changes(everyone.values()):
        old = change.kernel
        everyone[old.kernel_id] = Standing(old.kernel_id, old.measurement, change.tags, old.parameters, old.risk)
        assert set(change.added) == set(change.tags) - set(old.tags)
        assert set(change.removed) == set(old.tags) - set(change.tags)
    assert changes(everyone.values()) == []


def test_another_kernel_changes_few() -> None:
    """One more among a hundred moves each of two borders of three figures by one place at most."""
    draw = random.Random(3)
    everyone = [
        kernel(n, draw.uniform(1e-6, 1e-3), draw.randrange(1 << 28), draw.randrange(10**6), "here") for n in range(100)
    ]
    settled = [
        Standing(one.kernel_id, one.measurement, tuple(sorted(oracle(one, everyone))), one.parameters, one.risk)
        for one in everyone
    ]
    assert changes(settled) == []
    newcomer = kernel(100, 5e-4, 1 << 20, 500, "here")
    moved = [change for change in changes([*settled, newcomer]) if change.kernel is not newcomer]
    assert 0 < len(moved) <= 6


def test_a_machine_of_another_kind_does_not_count() -> None:
    here = [kernel(n, 1e-6 * (n + 1), 0, 1, "here") for n in range(ENOUGH)]
    there = [kernel(99, 1.0, 1 << 30, 10**9, "there")]
    assert {c.kernel.kernel_id for c in changes([*here, *there])} == {c.kernel.kernel_id for c in changes(here)}


def tags(seconds_per_row: float, population: Sequence[float], risk: float = 0.5) -> set[str]:
    manifest = KernelManifest.describe(catalogue()["bottleneck_mlp"], SLOT, b"", Provenance(), symbols={"width": 4})
    others = [Figures(seconds, 0, 0) for seconds in population]
    return set(tags_for(manifest, measured(64 * seconds_per_row), bounds(others), risk))


def test_tags_say_what_selection_asks_for() -> None:
    low, high = FIXED["latency"]
    assert tags(low / 2, []) == {
        "layout:features", "foldable", "width:4", "latency:low", "memory:low", "parameters:low", "drift:low", "risk:medium",
    }  # fmt: skip
    assert "latency:medium" in tags((low + high) / 2, [])
    assert "latency:high" in tags(2 * high, [])
    assert "latency:high" in tags(low / 2, [low / 10] * ENOUGH)
    assert "latency:low" in tags(low / 2, [low / 10] * (ENOUGH - 1))
    assert "latency:low" in tags(2 * high, [10 * high] * ENOUGH)
    assert [next(t for t in tags(low, [], risk) if t.startswith("risk")) for risk in (0.0, *RISK, 1.0)] == [
        "risk:low", "risk:low", "risk:medium", "risk:high",
    ]  # fmt: skip
