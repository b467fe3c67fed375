"""The linear map that skips columns: its definition, what it never reads, and its registration."""

from __future__ import annotations

import pytest
import torch

from kernels import sparse_linear
from tests.kernels.cases import DTYPES, same_bits
from tests.kernels.linear_cases import SHAPES, assert_agrees, case

ALL = [*DTYPES, torch.float64]


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_dense_product(shape: tuple[int, int, int], bias: bool, dtype: torch.dtype) -> None:
    args = case(*shape, dtype=dtype, bias=bias)
    assert_agrees(sparse_linear(*args), *args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_alone_equals_token_in_any_batch(dtype: torch.dtype) -> None:
    x_TD, weight_ED, bias_E = case(9, 700, 130, dtype=dtype)
    whole = sparse_linear(x_TD, weight_ED, bias_E)
    for start, stop in ((0, 1), (3, 5), (2, 9), (8, 9)):
        assert same_bits(sparse_linear(x_TD[start:stop].clone(), weight_ED, bias_E), whole[start:stop])


def test_columns_that_nobody_uses_are_not_read() -> None:
    x_TD, weight_ED, bias_E = case(2, 200, 40)
    want = sparse_linear(x_TD, weight_ED, bias_E)
    unused = (x_TD == 0).all(0)
    assert unused.any()
    weight_ED[:, unused] = torch.nan
    assert same_bits(sparse_linear(x_TD, weight_ED, bias_E), want)


def test_columns_of_other_tokens_do_no_harm() -> None:
    x_TD, weight_ED, _ = case(2, 200, 40)
    weight_ED[:, (x_TD[0] == 0) & (x_TD[1] != 0)] = torch.nan
    got = sparse_linear(x_TD, weight_ED)
    assert torch.isfinite(got[0]).all()
    assert torch.isnan(got[1]).all()


def test_layout_of_the_weight_does_not_matter_on_a_cpu() -> None:
    x_TD, weight_ED, bias_E = case(3, 200, 40)
    assert weight_ED.stride(0) == 1
    assert same_bits(sparse_linear(x_TD, weight_ED.contiguous(), bias_E), sparse_linear(x_TD, weight_ED, bias_E))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_input_that_is_not_finite_stays_visible(value: float) -> None:
    x_TD, weight_ED, bias_E = case(2, 50, 8)
    x_TD[0, 3] = value
    got = sparse_linear(x_TD, weight_ED, bias_E)
    assert not torch.isfinite(got[0]).any()
    assert torch.isfinite(got[1]).all()


@pytest.mark.parametrize("bias", [True, False])
def test_registration_passes_opcheck(bias: bool) -> None:
    torch.library.opcheck(torch.ops.setpoint.sparse_linear.default, case(3, 20, 8, bias=bias))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, w, b: (x[:, :-1], w, b), "x and weight must be"),
        (lambda x, w, b: (x, w, b[:-1]), "bias must be"),
        (lambda x, w, b: (x.bfloat16(), w, b), "one dtype"),
    ],
)
def test_wrong_shape_is_named(wrong: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparse_linear(*wrong(*case(3, 20, 8)))  # type: ignore[operator]
