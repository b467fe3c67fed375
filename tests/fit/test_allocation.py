"""Greedy shares are the best of all of a separable problem, tails are formed explicitly, and a level is met."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from steering.fit.allocation import (
    CEILING,
    along_steps,
    along_tails,
    bisect,
    greedy_steps,
    overall,
    tail_errors,
    uniform,
)
from tests.plans import noise
from tests.tolerances import CORE

SIZE = torch.tensor([1.0, 2.0, 4.0])


def separable(share_S: torch.Tensor) -> float:
    """Convex in each share: greedy is then optimal."""
    return float((torch.tensor([1.0, 3.0, 8.0], dtype=torch.float64) * share_S.square()).sum())


def test_greedy_is_the_best_allocation_of_a_separable_error() -> None:
    """Every split of k steps over three sites is tried."""
    steps = greedy_steps(separable, SIZE, step=0.2, most=0.35)
    rise = 0.2 / SIZE.double()
    for k, share in enumerate(steps):
        splits = [n for n in product(range(k + 1), repeat=3) if sum(n) == k]
        best = min(
            separable(rise * torch.tensor(n)) for n in splits if max(a * b for a, b in zip(n, rise, strict=True)) < 1
        )
        assert separable(share) == pytest.approx(best, rel=1e-12), k


def test_every_step_takes_as_many_weights_until_a_site_is_empty() -> None:
    steps = greedy_steps(separable, SIZE, step=0.2, most=0.95)
    taken = (steps @ SIZE.double()).diff()
    assert float(taken.max()) == pytest.approx(0.2)
    assert float(steps.max()) == CEILING
    assert bool((steps.diff(dim=0) >= 0).all())
    assert overall(steps[-1:], SIZE) >= 0.95


def test_an_error_that_is_no_number_does_not_hang() -> None:
    assert len(greedy_steps(lambda share: float("nan"), SIZE, step=0.5, most=0.9)) < 50


def test_a_path_of_steps_has_the_overall_sparsity_asked_for() -> None:
    path = along_steps([greedy_steps(separable, SIZE, step=0.1, most=0.9)] * 2, SIZE)
    for level in (0.0, 0.13, 0.5, 0.9):
        assert overall(path(level), SIZE) == pytest.approx(level, abs=1e-9)
    assert torch.equal(uniform(2, 3)(0.25), torch.full((2, 3), 0.25, dtype=torch.float64))


def test_tails_are_formed_explicitly() -> None:
    h, W = noise(7, 12, seed=1), noise(5, 12, seed=2)
    norms = np.linalg.norm(W.numpy(), axis=0)
    thresholds = torch.tensor([0.0, 0.4, 1.0, 2.5, 100.0], dtype=torch.float64)
    expected, highest = [], 0.0
    for threshold in thresholds.numpy():
        ratios = []
        for token in h.numpy():
            tail = np.array(
                [value if abs(value) * norm <= threshold else 0.0 for value, norm in zip(token, norms, strict=True)]
            )
            ratios.append(np.linalg.norm(W.numpy() @ tail) / np.linalg.norm(W.numpy() @ token))
        highest = max(highest, float(np.mean(ratios)))
        expected.append(highest)
    found = tail_errors(h, W, thresholds)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), **CORE["law"])
    assert (float(found[0]), float(found[-1])) == (0.0, pytest.approx(1.0))


def test_one_tail_error_for_all_blocks() -> None:
    shares = torch.linspace(0, 1, 5)
    tables = torch.tensor([[0.0, 0.1, 0.2, 0.4, 1.0], [0.0, 0.0, 0.5, 0.5, 1.0]])
    path = along_tails(tables, shares)
    torch.testing.assert_close(path(0.3)[:, 0], torch.tensor([0.625, 0.4], dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(path(1.0)[:, 0], torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-6)
    # Where an error stands still, the whole of it belongs to the path.
    u, found = bisect(lambda u: float(path(u)[1, 0]), 0.63, steps=80, tolerance=1e-6)
    assert (u, found) == (pytest.approx(0.5, abs=1e-6), pytest.approx(0.63, abs=1e-5))


def test_bisection() -> None:
    assert bisect(lambda u: u**2, 0.25, steps=50, tolerance=1e-10)[0] == pytest.approx(0.5)
    assert bisect(lambda u: u, 3.0, steps=50, tolerance=0.0) == (1.0, 1.0)
