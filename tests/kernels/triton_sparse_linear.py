"""The Triton kernels of `sparse_linear` against the dense product and against their own promises.

`test_edits.py` runs this file in Triton's interpreter, in a process of its own. On a machine with a GPU it runs the
compiled kernels: `python -m pytest tests/kernels/triton_sparse_linear.py`.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from kernels import sparse_linear
from tests.kernels.cases import DTYPES, same_bits
from tests.kernels.linear_cases import SHAPES, assert_agrees, case

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from kernels._sparse_linear import launch  # noqa: E402


def run(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    if INTERPRETED:
        return launch(x_TD, weight_ED, bias_E)
    wide = torch.empty_strided(weight_ED.shape, weight_ED.stride(), dtype=weight_ED.dtype, device="cuda")
    return sparse_linear(x_TD.cuda(), wide.copy_(weight_ED), None if bias_E is None else bias_E.cuda()).cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_dense_product(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    args = case(*shape, dtype=dtype, bias=shape[0] > 1)
    assert_agrees(run(*args), *args, stored="stored_interpreted" if INTERPRETED else "stored")


def test_token_alone_equals_token_in_a_batch() -> None:
    x_TD, weight_ED, bias_E = case(3, 1500, 70, dtype=torch.bfloat16)
    whole = run(x_TD, weight_ED, bias_E)
    for t in range(3):
        assert same_bits(run(x_TD[t : t + 1].clone(), weight_ED, bias_E), whole[t : t + 1])


def test_columns_that_a_token_does_not_use_are_not_read() -> None:
    x_TD, weight_ED, bias_E = case(2, 200, 40)
    want = run(x_TD, weight_ED, bias_E)
    weight_ED[:, x_TD[0] == 0] = torch.nan
    got = run(x_TD, weight_ED, bias_E)
    assert same_bits(got[0], want[0])
    assert torch.isnan(got[1]).all()


def test_wide_outputs_take_the_wide_block() -> None:
    args = case(1, 20, 8200)
    assert_agrees(run(*args), *args)


def test_columns_with_gaps_are_refused() -> None:
    x_TD, weight_ED, bias_E = case(3, 20, 8)
    with pytest.raises(ValueError, match="columns must be contiguous"):
        launch(x_TD, weight_ED.contiguous(), bias_E)
