"""The compiled loops of `kernels.attention` for a CPU, whose `reference` is the oracle, and their call.

Scores are taken in base 2 and their maximum is found among their bits, because a loop over float comparisons that must
respect NaN is not vectorised; places are unsigned, because a signed index is first asked whether it counts from the
end. 2^t is a polynomial on [−1/2, 1/2] times a power of two, wrong by less than a rounding.
Keys and values are taken four at a time: four sums in flight hide the latency of an addition.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from kernels._compile import BITS, jit, narrow, widen
from kernels._memory import pointer
from kernels.attention import check_shapes, reference

assert jit is not None, "imported only where numba is"

SAMPLES = {dtype: torch.zeros(1, dtype=bits).numpy()[0] for dtype, bits in BITS.items()}
"""Tells a compiled function what an address points to."""

_LOG2E = 1.0 / math.log(2.0)
# Taylor's coefficients lnⁿ2 / n!: the first term left out is 1.3e-6 · 2⁻⁸ at most.
_C1, _C2, _C3, _C4, _C5, _C6, _C7 = (np.float32(math.log(2.0) ** n / math.factorial(n)) for n in range(1, 8))
_ONE, _HALF, _LEAST = np.float32(1.0), np.float32(0.5), np.float32(-126.0)
_ZERO = np.float32(0.0)


def attend(
    query_NHW: Tensor,
    key_BPKW: Tensor,
    value_BPKU: Tensor,
    table_NM: Tensor,
    length_N: Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> Tensor:
    """The operator on a CPU; arguments as `kernels.attention.paged_attention`. Other dtypes go to `reference`."""
    if query_NHW.dtype not in BITS:
        return reference(query_NHW, key_BPKW, value_BPKU, table_NM, length_N, scale, softcap, window)
    check_shapes(query_NHW, key_BPKW, value_BPKU, table_NM, length_N, softcap, window)
    (N, H, W), (B, P, K, U), M = query_NHW.shape, value_BPKU.shape, table_NM.shape[1]
    out_NHU = query_NHW.new_empty(N, H, U)
    pointers = [each.data_ptr() for each in (out_NHU, query_NHW, key_BPKW, value_BPKU, table_NM, length_N)]
    rows = (*query_NHW.stride()[:2], *key_BPKW.stride()[:3], *value_BPKU.stride()[:3])
    own = (*table_NM.stride(), *length_N.stride(), N, H, W, B, P, K, U, M)
    failed = _attend(SAMPLES[query_NHW.dtype], *pointers, *rows, *own, scale, softcap, window)
    if failed >= 0:
        length = int(length_N[failed])
        if not 0 <= length <= M * P:
            raise IndexError(f"length {length} is not in 0 to {M * P}, the places of a row's table")
        raise IndexError(f"a block of row {failed} is not in 0 to {B - 1}: {table_NM[failed].tolist()}")
    return out_NHU


@jit
def _attend(
    of: Any, out_at: Any, query_at: Any, key_at: Any, value_at: Any, table_at: Any, length_at: Any,
    q_n: Any, q_h: Any, k_b: Any, k_p: Any, k_k: Any, v_b: Any, v_p: Any, v_k: Any, t_n: Any, t_m: Any, l_n: Any,
    N: Any, H: Any, W: Any, B: Any, P: Any, K: Any, U: Any, M: Any, scale: Any, softcap: Any, window: Any,
) -> Any:  # fmt: skip
    """Equations (1) and (2); −1, or the row whose length or blocks are out of range. Suffixed names are strides."""
    out = carray(pointer(out_at, of), (N * H * U,))
    query = carray(pointer(query_at, of), ((N - 1) * q_n + (H - 1) * q_h + W,))
    key = carray(pointer(key_at, of), ((B - 1) * k_b + (P - 1) * k_p + (K - 1) * k_k + W,))
    value = carray(pointer(value_at, of), ((B - 1) * v_b + (P - 1) * v_p + (K - 1) * v_k + U,))
    table = carray(pointer(table_at, np.int32(0)), ((N - 1) * t_n + (M - 1) * t_m + 1,))
    length = carray(pointer(length_at, np.int32(0)), ((N - 1) * l_n + 1,))
    key_place, value_place = np.empty(M * P, np.uint64), np.empty(M * P, np.uint64)
    weight = np.empty(M * P, np.float32)
    query_W, sum_U = np.empty(W, np.float32), np.empty(U, np.float32)
    for n in range(N):
        last = np.int64(length[n * l_n])
        if last < 0 or last > M * P:
            return n
        first = max(0, last - window) if window > 0 else 0
        for b in range(first // P, (last + P - 1) // P):
            block = np.int64(table[n * t_n + b * t_m])
            if block < 0 or block >= B:
                return n
            for i in range(max(first, b * P), min(last, b * P + P)):
                key_place[i - first] = np.uint64(block * k_b + (i - b * P) * k_p)
                value_place[i - first] = np.uint64(block * v_b + (i - b * P) * v_p)
        L = last - first
        for h in range(H):
            k = h // (H // K)
            for w in range(W):
                query_W[w] = widen(query[n * q_n + h * q_h + w])
            _score(
                weight, query_W, key, key_place, np.uint64(k * k_k), L, np.uint64(W), np.float32(scale),
                np.float32(softcap),
            )  # fmt: skip
            total = _exponentials(weight, L)
            _mean(sum_U, weight, value, value_place, np.uint64(k * v_k), L, np.uint64(U))
            share = _ONE / total if L > 0 else _ZERO
            at = (n * H + h) * U
            for u in range(U):
                out[at + u] = narrow(sum_U[u] * share, out[at + u])
    return -1


@jit
def _score(
    score: Any, query_W: Any, key: Any, key_place: Any, shift: Any, L: Any, W: Any, scale: Any, softcap: Any
) -> None:
    """Equation (1) times log₂e."""
    i = 0
    while i + 4 <= L:
        a, b = key_place[i] + shift, key_place[i + 1] + shift
        c, d = key_place[i + 2] + shift, key_place[i + 3] + shift
        s, t, u, v = _ZERO, _ZERO, _ZERO, _ZERO
        for w in range(W):
            q = query_W[w]
            s += q * widen(key[a + w])
            t += q * widen(key[b + w])
            u += q * widen(key[c + w])
            v += q * widen(key[d + w])
        score[i], score[i + 1], score[i + 2], score[i + 3] = s, t, u, v
        i += 4
    while i < L:
        a = key_place[i] + shift
        s = _ZERO
        for w in range(W):
            s += query_W[w] * widen(key[a + w])
        score[i] = s
        i += 1
    if softcap > _ZERO:
        for i in range(L):
            score[i] = np.float32(_LOG2E) * softcap * np.float32(math.tanh(score[i] * scale / softcap))
    else:
        factor = np.float32(_LOG2E * scale)
        for i in range(L):
            score[i] *= factor


@jit
def _exponentials(score: Any, L: Any) -> Any:
    """Put 2^(s − max s) in the place of every s, and return their sum."""
    bits = score.view(np.int32)
    top = np.int32(-2147483648)
    for i in range(L):
        ordered = bits[i] ^ ((bits[i] >> np.int32(31)) & np.int32(2147483647))  # as the numbers are ordered
        top = max(top, ordered)
    highest = np.int32(top ^ ((top >> np.int32(31)) & np.int32(2147483647))).view(np.float32)
    total = _ZERO
    for i in range(L):
        t = score[i] - highest
        whole = np.int32((t if t > _LEAST else _LEAST) - _HALF)  # toward 0, so to the nearest: t ≤ 0
        f = t - np.float32(whole)  # NaN where t is
        p = _ONE + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * (_C6 + f * _C7))))))
        p *= np.int32((whole + np.int32(127)) << np.int32(23)).view(np.float32)
        p = _ZERO if t < _LEAST else p
        score[i] = p
        total += p
    return total


@jit
def _mean(sum_U: Any, weight: Any, value: Any, value_place: Any, shift: Any, L: Any, U: Any) -> None:
    """Σ_i weight_i v_i."""
    for u in range(U):
        sum_U[u] = _ZERO
    i = 0
    while i + 4 <= L:
        a, b = value_place[i] + shift, value_place[i + 1] + shift
        c, d = value_place[i + 2] + shift, value_place[i + 3] + shift
        p, q, r, s = weight[i], weight[i + 1], weight[i + 2], weight[i + 3]
        for u in range(U):
            sum_U[u] += (p * widen(value[a + u]) + q * widen(value[b + u])) + (
                r * widen(value[c + u]) + s * widen(value[d + u])
            )
        i += 4
    while i < L:
        a = value_place[i] + shift
        for u in range(U):
            sum_U[u] += weight[i] * widen(value[a + u])
        i += 1
