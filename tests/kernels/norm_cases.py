"""Norms and laws for `kernels.norm`, and the formula in float64 that it must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.norm import FORMS, Form
from tests.kernels.cases import Batch, batch, clone

SHAPES = [(1, 8), (7, 192), (16, 33), (3, 2304)]
EPS: dict[Form, float] = dict(zip(FORMS, (1e-6, 1e-5, 1e-6, 1e-5), strict=True))
ROUNDINGS: dict[Form, int] = dict(zip(FORMS, (2, 1, 1, 1), strict=True))
"""How often a form rounds to the dtype of y."""


def weights(form: Form, E: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A weight around what leaves rows as they are, and a bias where the form has one."""
    generator = torch.Generator().manual_seed(E)
    drawn_2E = torch.randn(2, E, generator=generator)
    weight_E = (0.3 * drawn_2E[0] + (form != "rms_plus_one")).to(dtype)
    return weight_E, drawn_2E[1].to(dtype) if form == "layer" else None


def case(T: int, E: int, dtype: torch.dtype, R: int = 2, **kwargs: object) -> Batch:
    """A law's batch with rows of all sizes and means, the first ones small enough for ε to count."""
    args = batch(T, E, R, dtype=dtype, **kwargs)  # type: ignore[arg-type]
    size_T1 = (10.0 ** (torch.arange(T) % 5 - 3))[:, None].to(dtype)
    args["y_TE"] = (args["y_TE"] + 0.5 * args["y_TE"][:, :1]) * size_T1
    return args


def law_of(args: Batch) -> list[Tensor]:
    """The arguments of `feedback_` behind y."""
    return list(args.values())[1:]


def reading_itself(args: Batch) -> Batch:
    """The same batch, whose x is y."""
    same = clone(args)
    same["x_TD"] = same["y_TE"]
    return same


def assert_agrees(
    got: Tensor, y_TE: Tensor, weight_E: Tensor, bias_E: Tensor | None, form: Form, rounding: float, unit: float
) -> None:
    """Equality with the formula in float64; `rounding` and `unit` as in `tests.kernels.cases.assert_agrees`."""
    y = y_TE.double()
    centred = y - y.mean(-1, keepdim=True) if form == "layer" else y
    scale_T1 = 1 / (centred.square().mean(-1, keepdim=True) + EPS[form]).sqrt()
    gain_E = weight_E.double() + (form == "rms_plus_one")
    want = centred * scale_T1 * gain_E
    largest = (y.abs().amax(-1, keepdim=True) if form == "layer" else y.abs()) * scale_T1 * gain_E.abs()
    if bias_E is not None:
        want, largest = want + bias_E.double(), largest + bias_E.double().abs()
    assert got.dtype == y_TE.dtype
    least = 2 * torch.finfo(got.dtype).tiny  # a subnormal is rounded by as much as the least normal number
    assert ((got.double() - want).abs() <= ROUNDINGS[form] * rounding * (want.abs() + least) + unit * largest).all()
