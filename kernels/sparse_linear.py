"""A linear map of few tokens that reads only the columns of its weight where the input is not 0.

    y_t = Σ_{i : x_ti ≠ 0} x_ti W_:i + b

Behind `kernels.sparse` most of x is exactly 0, and a decode step is bound by reading W: at half of the columns it reads
half of the bytes (TEAL, arXiv:2408.14690). A column must therefore lie in one piece: W is stored transposed, as
`weight.mT.contiguous().mT`.

Sums are in float32 (float64 where x is float64), y is rounded once. Promised: a column that no token asks for is never
read; a token's result does not depend on the other tokens; two runs give the same bits (no atomics: one program owns a
block of outputs and adds the columns in order).

Shapes: T tokens · D inputs · E outputs.   Cost: T·E·(columns used) multiply-adds; every token reads its own columns, so
above some ten tokens the dense product wins. `reference` defines the operator and is its implementation on a CPU; the
Triton kernels are in `kernels._sparse_linear`. There is no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._library import define


def sparse_linear(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """y (T, E) in the dtype of x.

    x_TD       rows with any stride
    weight_ED  in the dtype of x; on a GPU columns must be contiguous, weight.stride(0) == 1
    bias_E     or None

    Raises ValueError when shapes or dtypes disagree, or, on a GPU, when columns are not contiguous.
    """
    result: Tensor = _sparse_linear(x_TD, weight_ED, bias_E)
    return result


def reference(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    """The operator in plain torch, on any device; arguments as `sparse_linear`.

    One product of a matrix and a vector a token, so that no blocking depends on how many there are.
    """
    check_shapes(x_TD, weight_ED, bias_E)
    wide = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
    y_TE = x_TD.new_empty(x_TD.shape[0], weight_ED.shape[0])
    for x_D, y_E in zip(x_TD, y_TE, strict=True):
        used_N = x_D.nonzero().squeeze(1)
        columns_NE = weight_ED.mT.index_select(0, used_N).to(wide)
        sum_E = columns_NE.mT @ x_D.index_select(0, used_N).to(wide)
        y_E.copy_(sum_E if bias_E is None else sum_E + bias_E.to(wide))
    return y_TE


def check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless every tensor fits."""
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x and weight must be (T, D) and (E, D), got {tuple(x.shape)} and {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (E,) = ({weight.shape[0]},), got {tuple(bias.shape)}")
    if x.dtype != weight.dtype:
        raise ValueError(f"x and weight must be of one dtype, got {x.dtype} and {weight.dtype}")


def _on_gpu(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    """The Triton kernels, found at the first use: Triton is a package for Linux only."""
    from kernels._sparse_linear import launch

    return launch(x_TD, weight_ED, bias_E)


def _fake(x_TD: Tensor, weight_ED: Tensor, _: Tensor | None) -> Tensor:
    return x_TD.new_empty(x_TD.shape[0], weight_ED.shape[0])


_sparse_linear = define(
    "sparse_linear(Tensor x_TD, Tensor weight_ED, Tensor? bias_E) -> Tensor", reference, _on_gpu, _fake
)
