"""Random control problems: layers near the identity, as a residual network's are, and layers far from it."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from steering.control import Weights


def jacobians(n_layers: int, width: int, seed: int, spread: float = 0.2) -> Tensor:
    """A_t = I + spread · noise of unit spectral scale (L, D, D), float64."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n_layers, width, width, generator=generator, dtype=torch.float64) / width**0.5
    return torch.eye(width, dtype=torch.float64) + spread * noise


def directions(n_rows: int, width: int, seed: int) -> Tensor:
    """Unit directions (n_rows, D), float64."""
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.nn.functional.normalize(torch.randn(n_rows, width, generator=generator, dtype=torch.float64), dim=1)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    return float((actual - expected).abs().max() / expected.abs().max())


Problem = tuple[int, int, int, float]
"""(L, D, seed, spread)."""

weights = st.builds(Weights, q=st.floats(0.01, 100), r=st.floats(0.01, 100), q_f=st.floats(0.01, 100))
problems = st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(0, 2**31), st.sampled_from([0.0, 0.2, 1.0, 3.0]))
"""A spread of 3 is far from the identity and unstable."""
