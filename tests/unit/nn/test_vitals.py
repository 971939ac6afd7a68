"""Vital signs against their definitions."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from esper_core.blueprint.interface import Layout
from esper_core.errors import InvalidInput
from esper_core.nn.vitals import Units, Vitals


def vitals(inner: torch.Tensor, descent: torch.Tensor, layout: Layout = Layout.FEATURES, parts: int = 1) -> Vitals:
    units = Units()
    for piece, gradient in zip(inner.chunk(parts), descent.chunk(parts), strict=True):
        units.add(piece, gradient, layout)
    return units.conclude()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(8, 40), st.integers(1, 4))
def test_figures_are_those_of_numpy(seed: int, width: int, rows: int, parts: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inner = (
        torch.randn(rows, width, generator=generator).double() @ torch.randn(width, width, generator=generator).double()
    )
    descent = torch.randn(rows, 3, generator=generator).double()
    found = vitals(inner, descent, parts=parts)
    values = inner.numpy()
    covariance = np.cov(values.T, bias=True)
    assert found.activation_variance == pytest.approx(values.var(axis=0).mean(), rel=1e-6)
    correlation = np.abs(np.corrcoef(values.T))
    assert found.mean_correlation == pytest.approx((correlation.sum() - width) / (width * (width - 1)), rel=1e-6)
    shares = np.linalg.eigvalsh(covariance).clip(0) / np.trace(covariance)
    shares = shares[shares > 1e-15]
    assert found.effective_rank == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
    assert found.gradient_norm == pytest.approx(math.sqrt((descent**2).mean().item()), rel=1e-9)
    assert found.dead_unit_ratio == 0


def test_units_that_never_speak_are_dead() -> None:
    inner = torch.randn(10, 4).abs()
    inner[:, 1] = 0
    assert vitals(inner, torch.ones(10, 2)).dead_unit_ratio == 0.25


def test_constant_units_have_no_variance_and_no_rank() -> None:
    found = vitals(torch.ones(10, 3), torch.ones(10, 2))
    assert (found.activation_variance, found.mean_correlation, found.effective_rank) == (0, 0, 0)
    assert found.dead_unit_ratio == 0


@pytest.mark.parametrize(("copies", "rank"), [(1, 4.0), (4, 1.0)])
def test_effective_rank_counts_independent_directions(copies: int, rank: float) -> None:
    directions = torch.eye(4).repeat(25, 1) if copies == 1 else torch.randn(100, 1).repeat(1, 4)
    signs = torch.ones(100, 1)
    signs[::2] = -1  # mean zero
    found = vitals((directions * torch.cat([signs[:52], -signs[:48]]) if copies == 1 else directions).double(), signs)
    assert found.effective_rank == pytest.approx(rank, rel=0.02)
    assert found.mean_correlation == pytest.approx(0.0 if copies == 1 else 1.0, abs=0.02)


def test_channels_are_the_units_of_images() -> None:
    inner = torch.randn(5, 3, 4, 2)
    inner[:, 2] = 0
    found = vitals(inner, torch.ones(5, 2, 4, 2), Layout.IMAGE)
    assert found.dead_unit_ratio == pytest.approx(1 / 3)
    assert found.activation_variance == pytest.approx(
        inner.transpose(0, 1).flatten(1).var(1, correction=0).mean().item(), rel=1e-5
    )


def test_nothing_counted_is_not_healthy() -> None:
    with pytest.raises(InvalidInput):
        Units().conclude()
