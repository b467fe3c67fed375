"""The norms of `kernels.norm` for a CPU, compiled: one pass a row, which is read again from the cache.

Equation (3) of `kernels.norm`, whose `normed` is the oracle and serves the dtypes that are not compiled. A sum is taken
in the order that vectorises it, which is that of the row's width: the same for a row in any batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from kernels._compile import BITS, jit, narrow, widen
from kernels._memory import pointer
from kernels.norm import Form, is_dense, normed

assert jit is not None, "imported only where numba is"

SAMPLES = {dtype: torch.zeros(1, dtype=bits).numpy()[0] for dtype, bits in BITS.items()}
"""Tells a compiled function what an address points to."""

_ONE = np.float32(1)


@jit
def _scale(total: Any, width: Any, eps: Any) -> Any:
    """1 / √(mean + ε) from the sum of squares."""
    return _ONE / np.float32(math.sqrt(total / np.float32(width) + np.float32(eps)))


@jit
def _rms(
    of: Any, of_weight: Any, out_at: Any, y_at: Any, weight_at: Any, n_rows: Any, width: Any, eps: Any,
    rounds: Any, offset: Any,
) -> None:  # fmt: skip
    """The three forms of RMSNorm; `rounds` before the weight is applied, which is `offset` more than what is stored."""
    out, y = carray(pointer(out_at, of), (n_rows * width,)), carray(pointer(y_at, of), (n_rows * width,))
    weight = carray(pointer(weight_at, of_weight), (width,))
    for t in range(n_rows):
        y_E, out_E = y[t * width : (t + 1) * width], out[t * width : (t + 1) * width]
        total = np.float32(0)
        for i in range(width):
            total += widen(y_E[i]) * widen(y_E[i])
        scale = _scale(total, width, eps)
        if rounds:
            for i in range(width):
                out_E[i] = narrow(widen(narrow(widen(y_E[i]) * scale, of)) * widen(weight[i]), of)
        else:
            for i in range(width):
                out_E[i] = narrow(widen(y_E[i]) * scale * (widen(weight[i]) + np.float32(offset)), of)


@jit
def _layer(
    of: Any, of_weight: Any, out_at: Any, y_at: Any, weight_at: Any, bias_at: Any, n_rows: Any, width: Any, eps: Any
) -> None:
    """LayerNorm. The variance is that of the centred row: a large mean must not swallow it."""
    out, y = carray(pointer(out_at, of), (n_rows * width,)), carray(pointer(y_at, of), (n_rows * width,))
    weight, bias = carray(pointer(weight_at, of_weight), (width,)), carray(pointer(bias_at, of_weight), (width,))
    for t in range(n_rows):
        y_E, out_E = y[t * width : (t + 1) * width], out[t * width : (t + 1) * width]
        total = np.float32(0)
        for i in range(width):
            total += widen(y_E[i])
        mean = total / np.float32(width)
        total = np.float32(0)
        for i in range(width):
            total += (widen(y_E[i]) - mean) * (widen(y_E[i]) - mean)
        scale = _scale(total, width, eps)
        for i in range(width):
            out_E[i] = narrow((widen(y_E[i]) - mean) * scale * widen(weight[i]) + widen(bias[i]), of)


def bind(weight_E: Tensor, bias_E: Tensor | None, form: Form, eps: float) -> Callable[[Tensor], Tensor]:
    """`kernels.norm.bind_norm` on a CPU."""
    width = weight_E.shape[0]
    weight_E = weight_E.detach().contiguous()
    of_weight, weight_at, bias_at = SAMPLES.get(weight_E.dtype), weight_E.data_ptr(), 0
    if form == "layer":
        bias_E = torch.zeros_like(weight_E) if bias_E is None else bias_E.detach().to(weight_E.dtype).contiguous()
        bias_at = bias_E.data_ptr()
    rounds, offset = form == "rms", float(form == "rms_plus_one")

    def apply(y: Tensor) -> Tensor:
        if y.shape[-1] != width:  # rows of another width would be read across their ends
            raise ValueError(f"y must be (…, {width}), got {tuple(y.shape)}")
        of = SAMPLES.get(y.dtype)
        if of is None or of_weight is None:
            return normed(y, weight_E, bias_E, form, eps)
        if not is_dense(y):
            y = y.contiguous()
        out = torch.empty_like(y)
        size = y.numel() // width
        if form == "layer":
            _layer(of, of_weight, out.data_ptr(), y.data_ptr(), weight_at, bias_at, size, width, eps)
        else:
            _rms(of, of_weight, out.data_ptr(), y.data_ptr(), weight_at, size, width, eps, rounds, offset)
        return out

    return apply
