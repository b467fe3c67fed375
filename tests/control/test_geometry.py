"""Ranks, mass and stability of differences against numpy, and the window that no other run beats."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from steering.control.geometry import best_window, eigengap, entropy_rank, leading, stability
from tests.tolerances import CONTROL


def planted(n: int, width: int, sizes: tuple[float, ...], noise: float = 0.01, seed: int = 0) -> torch.Tensor:
    """Rows that vary along the first axes with these sizes, in a rotated frame."""
    generator = torch.Generator().manual_seed(seed)
    x = noise * torch.randn(n, width, generator=generator, dtype=torch.float64)
    for i, size in enumerate(sizes):
        x[:, i] += size * torch.randn(n, generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    return x @ Q


@pytest.mark.parametrize("s", [[3.0], [1.0, 1.0], [5.0, 3.0, 0.1], [2.0, 0.0, 0.0], [4.0, 3.0, 2.0, 1.0]])
def test_the_entropy_rank_is_the_exponential_of_the_entropy(s: list[float]) -> None:
    assert entropy_rank(torch.tensor(s, dtype=torch.float64)) == pytest.approx(
        float(np.exp(entropy(np.square(s)))), rel=1e-12
    )


def test_alike_directions_count_whole_and_nothing_counts_nothing() -> None:
    assert entropy_rank(torch.ones(7)) == pytest.approx(7)
    assert entropy_rank(torch.zeros(3)) == 0


@pytest.mark.parametrize(
    ("s", "gap"), [([5.0, 4.0, 1.0, 0.9], 2), ([9.0, 1.0, 0.9], 1), ([1.0], 1), ([3.0, 2.9, 0.0], 1), ([1.0, 1e-12], 1)]
)
def test_the_gap_is_before_the_largest_ratio_of_what_holds_anything(s: list[float], gap: int) -> None:
    assert eigengap(torch.tensor(s)) == gap


@pytest.mark.parametrize("sizes", [(3.0,), (2.0, 1.9), (2.0, 1.9, 1.8)])
def test_the_planted_directions_are_found(sizes: tuple[float, ...]) -> None:
    delta = planted(200, 12, sizes)
    found = leading(delta, most=12)
    _, s, V = np.linalg.svd(delta.numpy(), full_matrices=False)
    r = len(sizes)
    assert len(found.basis) == r == found.eigengap
    assert found.mass == pytest.approx(float((s[:r] ** 2).sum() / (s**2).sum()), rel=CONTROL["identity"])
    projector = V[:r].T @ V[:r]
    assert np.allclose(found.basis.mT.numpy() @ found.basis.numpy(), projector, atol=1e-10)
    assert found.stability > 0.99


def test_the_rank_is_bounded_by_entropy_gap_and_the_caller() -> None:
    delta = planted(300, 10, (4.0, 1.0, 0.95, 0.9))
    found = leading(delta, most=10)
    assert (found.eigengap, len(found.basis)) == (4, 2)  # four are above the noise, but less than two are in use
    flat = planted(300, 10, (2.0, 1.9, 1.8, 1.7))
    assert [len(leading(flat, most=most).basis) for most in (1, 3, 10)] == [1, 3, 4]
    assert len(leading(torch.ones(3, 5), most=12).basis) == 1


def test_stability_is_the_median_overlap_of_projectors_formed_explicitly() -> None:
    delta, rank = planted(40, 6, (1.0, 0.5, 0.4), noise=0.4), 2
    generator = torch.Generator().manual_seed(3)
    projectors = []
    for _ in range(5):
        V = np.linalg.svd(delta[torch.randint(40, (40,), generator=generator)].numpy(), full_matrices=False)[2][:rank]
        projectors.append(V.T @ V)
    overlaps = sorted(float(np.trace(a @ b)) / rank for a, b in combinations(projectors, 2))
    assert stability(delta, rank, bootstraps=5, seed=3) == pytest.approx(overlaps[(len(overlaps) - 1) // 2], rel=1e-9)


def test_noise_is_less_stable_than_a_direction() -> None:
    noise = torch.randn(60, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shifted = noise + 3.0 * torch.ones(30, dtype=torch.float64)
    assert stability(noise, 1, bootstraps=20, seed=0) < 0.5 < stability(shifted, 1, bootstraps=20, seed=0)


@pytest.mark.parametrize(
    ("score", "layers", "window"),
    [
        ([1.0, 1.0, 1.0, 1.0], (2, 3, 4, 5), (2, 3, 4, 5)),
        ([0.1, 0.9, 0.9, 0.9, 0.0, 0.0], (0, 1, 2, 3, 4, 5), (0, 1, 2, 3)),
        ([0.0, 0.9, 0.9, 0.9, 0.0, 0.0], (0, 1, 2, 3, 4, 5), (1, 2, 3)),
        ([9.0, 0.1, 0.1, 0.1, 0.2], (1, 5, 6, 7, 8), (5, 6, 7, 8)),
        ([1.0, 2.0], (3, 7), (7,)),
        ([1.0] * 9, tuple(range(9)), (0, 1, 2, 3, 4, 5)),
    ],
)
def test_the_window_is_the_best_run_of_neighbours(
    score: list[float], layers: tuple[int, ...], window: tuple[int, ...]
) -> None:
    assert best_window(score, layers) == window
