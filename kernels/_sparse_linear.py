"""The two Triton kernels of `kernels.sparse_linear`, whose `reference` is the oracle, and their launch.

The first writes, for every token, the indices of its non-zero inputs in order, and how many there are; nothing of it
comes back to the host. The second gives each program one token and a block of outputs; it reads the listed columns,
each a contiguous stretch of BLOCK_E numbers, and adds them in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sparse_linear import check_shapes, reference

BLOCK_D = 1024
"""Inputs that are searched at a time."""
BLOCK_N = 64
"""Columns in flight a program."""
NARROW, WIDE = 32, 64
"""Outputs a program, below and from `MANY` outputs: enough programs for the 132 cores of an H200 from E = 4096 on."""
MANY = 8192


@triton.jit
def _list_kernel(  # type: ignore[no-untyped-def]  # pointers and strides have no Python type
    x, index, found,
    x_t, x_d,
    D: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One token: index[t, :found[t]] are the i with x_ti ≠ 0, ascending."""
    row = tl.program_id(0).to(tl.int64)
    n = 0
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        used = tl.load(x + row * x_t + d * x_d, mask=d < D, other=0.0).to(tl.float32) != 0.0
        place = n + tl.cumsum(used.to(tl.int32), axis=0) - 1
        tl.store(index + row * D + place, d, mask=used)
        n += tl.sum(used.to(tl.int32), axis=0)
    tl.store(found + row, n)


@triton.jit
def _columns_kernel(  # type: ignore[no-untyped-def]
    y, x, weight, bias, index, found,
    x_t, x_d, weight_d, bias_e,
    D, E, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
) -> None:  # fmt: skip
    """One token and BLOCK_E outputs."""
    row = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    in_e = e < E
    total_E = tl.zeros([BLOCK_E], dtype=tl.float32)
    n = tl.load(found + row)
    for start in range(0, n, BLOCK_N):
        k = start + tl.arange(0, BLOCK_N)
        i = tl.load(index + row * D + k, mask=k < n, other=0).to(tl.int64)  # 64 bits: E·D passes 2³¹
        x_N = tl.load(x + row * x_t + i * x_d, mask=k < n, other=0.0).to(tl.float32)
        at = weight + i[:, None] * weight_d + e[None, :]
        w_NE = tl.load(at, mask=(k < n)[:, None] & in_e[None, :], other=0.0).to(tl.float32)
        total_E += tl.sum(w_NE * x_N[:, None], axis=0)
    if HAS_BIAS:
        total_E += tl.load(bias + e * bias_e, mask=in_e, other=0.0).to(tl.float32)
    tl.store(y + row * E + e, total_E.to(y.dtype.element_ty), mask=in_e)


def launch(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    """The operator as two Triton launches; arguments as `sparse_linear`. float64 goes to `reference`."""
    if x_TD.dtype == torch.float64:
        return reference(x_TD, weight_ED, bias_E)
    check_shapes(x_TD, weight_ED, bias_E)
    if weight_ED.stride(0) != 1:
        raise ValueError(
            f"weight_ED: columns must be contiguous, their stride is {weight_ED.stride(0)}; "
            "store weight.mT.contiguous().mT"
        )
    (T, D), E = x_TD.shape, weight_ED.shape[0]
    y_TE = x_TD.new_empty(T, E)
    if T == 0 or E == 0:
        return y_TE
    index_TD = torch.empty(T, D, dtype=torch.int32, device=x_TD.device)
    found_T = torch.empty(T, dtype=torch.int32, device=x_TD.device)
    _list_kernel[(T,)](x_TD, index_TD, found_T, *x_TD.stride(), D=D, BLOCK=BLOCK_D, num_warps=4)
    block_e = NARROW if E < MANY else WIDE  # by the shape of the weight alone, never by T
    _columns_kernel[(T, triton.cdiv(E, block_e))](
        y_TE, x_TD, weight_ED, y_TE if bias_E is None else bias_E, index_TD, found_T,
        *x_TD.stride(), weight_ED.stride(1), 0 if bias_E is None else bias_E.stride(0),
        D, E, HAS_BIAS=bias_E is not None, BLOCK_N=BLOCK_N, BLOCK_E=block_e, num_warps=4,
    )  # fmt: skip
    return y_TE
