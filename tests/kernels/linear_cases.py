"""Inputs for the linear map that skips columns, and the dense product in float64 that it must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.tolerances import KERNELS

SHAPES = [(1, 8, 8), (3, 200, 33), (2, 2304, 192), (4, 1, 70)]
"""(T, D, E)."""


def case(
    T: int, D: int, E: int, *, dtype: torch.dtype = torch.float32, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x with gaps between its rows and from none to all of a row zero, W with contiguous columns, b."""
    generator = torch.Generator().manual_seed(T * 131 + D * 17 + E)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x_TD = normal(T, D + 3)[:, :D]
    x_TD[torch.rand(T, D, generator=generator) < torch.linspace(0.9, 0.3, T)[:, None]] = 0.0
    if T > 2:
        x_TD[1], x_TD[2] = -0.0, normal(D)
    weight_ED = (normal(D, E) / D**0.5).to(dtype).mT
    return x_TD.to(dtype), weight_ED, normal(E).to(dtype) if bias else None


def assert_agrees(y_TE: Tensor, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, stored: str = "stored") -> None:
    """Equality with the dense product; the error of a sum is relative to its terms' magnitudes."""
    b_E = torch.zeros(len(weight_ED)).double() if bias_E is None else bias_E.double()
    want = x_TD.double() @ weight_ED.double().mT + b_E
    terms = x_TD.double().abs() @ weight_ED.double().abs().mT + b_E.abs()
    unit = KERNELS["float64" if x_TD.dtype == torch.float64 else "float32"]
    rounding = KERNELS[stored][str(x_TD.dtype).removeprefix("torch.")]
    assert y_TE.dtype == x_TD.dtype
    assert ((y_TE.double() - want).abs() <= rounding * want.abs() + unit * terms).all()
