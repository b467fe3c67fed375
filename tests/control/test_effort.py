"""Caps and budget: respected, minimal, and free where they do not bite."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steering.control import project, spend
from steering.errors import ControlError, DimensionMismatch

bounds = st.one_of(st.just(math.inf), st.just(0.0), st.floats(1e-3, 10))


def sequence(seed: int, n_layers: int = 5, rank: int = 3, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(n_layers, rank, generator=generator, dtype=torch.float64)
    gain = torch.randn(n_layers, rank, width, generator=generator, dtype=torch.float64)
    return raw, gain, torch.rand(n_layers, generator=generator, dtype=torch.float64) * 4 + 0.5


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), cap=bounds, budget=bounds)
def test_caps_and_budget_hold_and_the_report_is_true(seed: int, cap: float, budget: float) -> None:
    raw, gain, norm = sequence(seed)
    spent = project(raw, gain, norm, torch.full_like(raw, cap), budget)
    torch.testing.assert_close(spent.effort, spent.u.norm(dim=1) / norm, rtol=1e-12, atol=1e-15)
    assert float(spent.effort.sum()) <= budget * (1 + 1e-12)
    assert bool((spent.effort <= 3 * cap * (1 + 1e-12)).all())


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), cap=bounds, budget=bounds)
def test_one_channel_is_the_euclidean_projection_on_a_ball(seed: int, cap: float, budget: float) -> None:
    raw, gain, norm = sequence(seed, n_layers=1, rank=1)
    wanted = raw[0, 0] * gain[0, 0]
    radius = min(cap, budget) * norm[0]
    expected = wanted * min(1.0, float(radius / wanted.norm()))
    torch.testing.assert_close(project(raw, gain, norm, torch.full_like(raw, cap), budget).u[0], expected)


def test_without_bounds_nothing_changes() -> None:
    raw, gain, norm = sequence(3)
    spent = project(raw, gain, norm, torch.full_like(raw, math.inf))
    torch.testing.assert_close(spent.u, torch.einsum("lr,lre->le", raw, gain), rtol=1e-14, atol=1e-14)
    assert not spent.saturated.any()


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), cap=bounds, budget=bounds)
def test_saturated_says_exactly_where_a_control_was_changed(seed: int, cap: float, budget: float) -> None:
    raw, gain, norm = sequence(seed)
    spent = project(raw, gain, norm, torch.full_like(raw, cap), budget)
    changed = (spent.u - torch.einsum("lr,lre->le", raw, gain)).abs().amax(dim=1) > 1e-13
    assert torch.equal(spent.saturated, changed)


def test_a_cap_shrinks_its_own_channel_alone() -> None:
    raw, gain, norm = sequence(4, n_layers=1)
    cap = torch.tensor([[0.01, math.inf, math.inf]])
    change = project(raw, gain, norm, cap).u[0] - raw[0] @ gain[0]
    left_over = change - (change @ gain[0, 0]) / (gain[0, 0] @ gain[0, 0]) * gain[0, 0]
    assert float(left_over.abs().max()) < 1e-14 < float(change.abs().max())


def test_budget_is_spent_first_come_first_served_then_nothing() -> None:
    raw, gain, norm = torch.ones(4, 1), torch.eye(2)[:1].expand(4, 1, 2), torch.tensor([2.0, 2.0, 2.0, 2.0])
    spent = project(raw, gain, norm, torch.full((4, 1), math.inf), budget=1.2)
    torch.testing.assert_close(spent.effort, torch.tensor([0.5, 0.5, 0.2, 0.0], dtype=torch.float64))
    assert spent.saturated.tolist() == [False, False, True, True]


def test_budget_bounds_each_channel_and_then_shrinks_their_sum_as_a_whole() -> None:
    gain, free = torch.eye(2), torch.full((2,), math.inf)
    within = spend(torch.tensor([0.8, 0.8]), gain, 1.0, free, avail=1.0)
    torch.testing.assert_close(within.u, torch.full((2,), 0.5**0.5, dtype=torch.float64))
    assert within.saturated
    above = spend(torch.tensor([10.0, 0.5]), gain, 1.0, free, avail=1.0)
    torch.testing.assert_close(above.u, torch.tensor([1.0, 0.5], dtype=torch.float64) / 1.25**0.5)


def test_an_infinite_error_is_held_by_a_finite_bound_and_visible_without() -> None:
    raw, gain = torch.tensor([math.inf]), torch.ones(1, 4)
    assert float(spend(raw, gain, 2.0, torch.tensor([0.5])).effort) == pytest.approx(0.5)
    budgeted = spend(raw, gain, 2.0, torch.tensor([math.inf]), 0.25)
    torch.testing.assert_close(budgeted.u, torch.full((4,), 0.25, dtype=torch.float64))
    assert float(budgeted.effort) == pytest.approx(0.25)
    assert float(spend(raw, gain, 2.0, torch.tensor([math.inf])).effort) == math.inf


def test_degenerate_states_and_gains() -> None:
    cap = torch.tensor([0.5, 0.5])
    nothing = spend(torch.tensor([3.0, math.inf]), torch.zeros(2, 3), 1.0, cap)
    assert not nothing.u.any()
    assert not nothing.saturated
    at_zero = spend(torch.tensor([3.0, 4.0]), torch.ones(2, 3), 0.0, cap)
    assert not at_zero.u.any()
    assert at_zero.saturated
    unbound = spend(torch.tensor([3.0, 4.0]), torch.ones(2, 3), 0.0, torch.full((2,), math.inf))
    assert unbound.u.tolist() == [7.0, 7.0, 7.0]
    assert not spend(torch.tensor([3.0, 4.0]), torch.ones(2, 3), 1.0, cap, avail=-1.0).u.any()


def test_what_is_wrong_is_refused() -> None:
    raw, gain, norm = sequence(0)
    with pytest.raises(DimensionMismatch, match="number of layers"):
        project(raw, gain, norm[:2], torch.ones_like(raw))
    with pytest.raises(DimensionMismatch, match="gains"):
        spend(raw[0, :2], gain[0], 1.0, torch.ones(2))
    for norm_of_x, cap, avail in ((-1.0, 1.0, 1.0), (1.0, -1.0, 1.0), (1.0, math.nan, 1.0), (1.0, 1.0, math.nan)):
        with pytest.raises(ControlError):
            spend(raw[0], gain[0], norm_of_x, torch.full((3,), cap), avail)
