"""The Triton kernels of `kernels.attention`, whose `reference` is the oracle, and their launch.

The first gives each program one row, one kv head with its whole group of query heads, so that a key is read once for
all of them, and one stretch of the row's places; the second adds the stretches of a row up. Stretches begin at fixed
places and one that holds no key of its row ends at once: the launch depends on no length, and a row's sums on no other
row. Scores are in base 2. On tensor cores a weight is two numbers of the pool's dtype, its rounding and the rest: the
rounding alone would cost the agreement with the reference, and reading keys costs more than either product.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention import check_shapes, reference

STRETCH = 256
"""Places of one program: 32 programs for a kv head of 8,192 keys, 256 for the 132 cores of an H200 at one row of 8B."""
MOST_STRETCHES = 64
"""Of one row. Longer stretches follow from it beyond 16,384 places."""
ADDED = 8
"""Stretches that are added up at a time, always as many: a sum over more would round differently."""
LOG2E = 1.0 / math.log(2.0)


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    """By its series below 1/8, where the quotient would cancel; the first term left out is 1e-9 of the sum."""
    x2 = x * x
    series = x * (1.0 + x2 * (-1.0 / 3.0 + x2 * (2.0 / 15.0 - x2 * (17.0 / 315.0))))
    t = tl.exp(-2.0 * tl.abs(x))
    quotient = (1.0 - t) / (1.0 + t)
    return tl.where(tl.abs(x) < 0.125, series, tl.where(x < 0.0, -quotient, quotient))


@triton.jit
def _product(a, b, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """a b summed in float32. WIDE: of float32 numbers, as they are or because the interpreter needs it."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b)


@triton.jit
def _stretch_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0915
    out, part, top, total, query, key, value, table, length,
    query_n, query_h, key_b, key_p, key_k, value_b, value_p, value_k, table_n, table_m, length_n,
    factor, softcap, places,
    G: tl.constexpr, W: tl.constexpr, U: tl.constexpr, P: tl.constexpr, LENGTH: tl.constexpr, SINGLE: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_L: tl.constexpr,
) -> None:  # fmt: skip
    """One row, kv head and stretch: max s, Σ 2^(s − max s) and Σ 2^(s − max s) v. A suffixed name is a stride."""
    n = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1)
    stretch = tl.program_id(2)
    last = tl.minimum(tl.load(length + n * length_n), places)
    first = tl.maximum(last - WINDOW, 0) if WINDOW > 0 else 0
    start = tl.maximum(stretch * LENGTH, first)
    stop = tl.minimum(stretch * LENGTH + LENGTH, last)
    g = tl.arange(0, BLOCK_G)
    w = tl.arange(0, BLOCK_W)
    u = tl.arange(0, BLOCK_U)
    head_G = k * G + g
    H = tl.num_programs(1) * G
    if start >= stop:
        if SINGLE:  # no other program writes the row: a row without keys is 0
            out_at = out + (n * H + head_G)[:, None] * U + u[None, :]
            zero = tl.zeros([BLOCK_G, BLOCK_U], dtype=tl.float32)
            tl.store(out_at, zero.to(out.dtype.element_ty), mask=(g < G)[:, None] & (u < U)[None, :])
        return

    query_at = query + n * query_n + head_G[:, None] * query_h + w[None, :]
    q_GW = tl.load(query_at, mask=(g < G)[:, None] & (w < W)[None, :], other=0.0)
    top_G = tl.full([BLOCK_G], float("-inf"), dtype=tl.float32)
    total_G = tl.zeros([BLOCK_G], dtype=tl.float32)
    sum_GU = tl.zeros([BLOCK_G, BLOCK_U], dtype=tl.float32)
    begin = start // BLOCK_L * BLOCK_L  # at a fixed place, so that a row's tiles are its own
    for tile in range(begin, stop, BLOCK_L):
        i = tile + tl.arange(0, BLOCK_L)
        seen = (i >= start) & (i < stop)
        block = tl.load(table + n * table_n + (i // P) * table_m, mask=seen, other=0).to(tl.int64)
        key_at = key + block[None, :] * key_b + (i % P)[None, :] * key_p + k * key_k + w[:, None]
        k_WL = tl.load(key_at, mask=seen[None, :] & (w < W)[:, None], other=0.0)
        s_GL = _product(q_GW, k_WL, WIDE) * factor
        if CAPPED:
            s_GL = softcap * _tanh(s_GL / softcap)
        s_GL = tl.where(seen[None, :], s_GL * 1.4426950408889634, float("-inf"))
        higher_G = tl.maximum(top_G, tl.max(s_GL, axis=1))
        shrink_G = tl.exp2(top_G - higher_G)
        p_GL = tl.exp2(s_GL - higher_G[:, None])
        total_G = total_G * shrink_G + tl.sum(p_GL, axis=1)
        value_at = value + block[:, None] * value_b + (i % P)[:, None] * value_p + k * value_k + u[None, :]
        v_LU = tl.load(value_at, mask=seen[:, None] & (u < U)[None, :], other=0.0)
        sum_GU = sum_GU * shrink_G[:, None]
        if WIDE:
            sum_GU += _product(p_GL, v_LU, WIDE)
        else:
            rounded_GL = p_GL.to(v_LU.dtype)
            rest_GL = (p_GL - rounded_GL.to(tl.float32)).to(v_LU.dtype)
            sum_GU += _product(rounded_GL, v_LU, WIDE) + _product(rest_GL, v_LU, WIDE)
        top_G = higher_G

    row_G = n * H + head_G
    in_gu = (g < G)[:, None] & (u < U)[None, :]
    if SINGLE:
        o_GU = sum_GU / total_G[:, None]
        tl.store(out + row_G[:, None] * U + u[None, :], o_GU.to(out.dtype.element_ty), mask=in_gu)
    else:
        place_G = row_G * tl.num_programs(2) + stretch
        tl.store(part + place_G[:, None] * U + u[None, :], sum_GU, mask=in_gu)
        tl.store(top + place_G, top_G, mask=g < G)
        tl.store(total + place_G, total_G, mask=g < G)


@triton.jit
def _sum_kernel(  # type: ignore[no-untyped-def]
    out, part, top, total, length,
    length_n, places, stretches,
    U: tl.constexpr, LENGTH: tl.constexpr, WINDOW: tl.constexpr, ADDED: tl.constexpr, BLOCK_U: tl.constexpr,
) -> None:  # fmt: skip
    """One row and query head: Σ_j part_j 2^(top_j − top) / Σ_j total_j 2^(top_j − top) over its stretches j."""
    n = tl.program_id(0).to(tl.int64)
    row = n * tl.num_programs(1) + tl.program_id(1)
    u = tl.arange(0, BLOCK_U)
    last = tl.minimum(tl.load(length + n * length_n), places)
    first = tl.maximum(last - WINDOW, 0) // LENGTH if WINDOW > 0 else 0
    used = (last + LENGTH - 1) // LENGTH
    highest = float("-inf")
    whole = 0.0
    sum_U = tl.zeros([BLOCK_U], dtype=tl.float32)
    for start in range(first // ADDED * ADDED, used, ADDED):
        j = start + tl.arange(0, ADDED)
        seen = (j >= first) & (j < used)
        top_J = tl.load(top + row * stretches + j, mask=seen, other=float("-inf"))
        total_J = tl.load(total + row * stretches + j, mask=seen, other=0.0)
        at = part + (row * stretches + j)[:, None] * U + u[None, :]
        part_JU = tl.load(at, mask=seen[:, None] & (u < U)[None, :], other=0.0)
        higher = tl.maximum(highest, tl.max(top_J, axis=0))
        shrink = tl.exp2(highest - higher)
        share_J = tl.exp2(top_J - higher)
        whole = whole * shrink + tl.sum(total_J * share_J, axis=0)
        sum_U = sum_U * shrink + tl.sum(part_JU * share_J[:, None], axis=0)
        highest = higher
    o_U = tl.where(last > 0, sum_U / tl.where(last > 0, whole, 1.0), 0.0)
    tl.store(out + row * U + u, o_U.to(out.dtype.element_ty), mask=u < U)


def launch(
    query_NHW: Tensor,
    key_BPKW: Tensor,
    value_BPKU: Tensor,
    table_NM: Tensor,
    length_N: Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> Tensor:
    """The operator as one Triton launch, or two beyond 256 places a row; float64 goes to `reference`."""
    if query_NHW.dtype == torch.float64:
        return reference(query_NHW, key_BPKW, value_BPKU, table_NM, length_N, scale, softcap, window)
    check_shapes(query_NHW, key_BPKW, value_BPKU, table_NM, length_N, softcap, window)
    (N, H, W), (_, P, K, U), M = query_NHW.shape, value_BPKU.shape, table_NM.shape[1]
    out_NHU = query_NHW.new_empty(N, H, U)
    if not out_NHU.numel():
        return out_NHU
    stretch = max(STRETCH, triton.next_power_of_2(triton.cdiv(M * P, MOST_STRETCHES)))
    stretches = max(1, triton.cdiv(M * P, stretch))
    single = stretches == 1
    n_parts = 0 if single else N * H * stretches
    scratch = torch.empty(n_parts * (U + 2), dtype=torch.float32, device=query_NHW.device)
    part, top, total = scratch.split([n_parts * U, n_parts, n_parts])
    block_g, block_w, block_u = (max(16, triton.next_power_of_2(n)) for n in (H // K, W, U))
    _stretch_kernel[(N, K, stretches)](
        out_NHU, part, top, total, query_NHW, key_BPKW, value_BPKU, table_NM, length_N,
        *query_NHW.stride()[:2], *key_BPKW.stride()[:3], *value_BPKU.stride()[:3], *table_NM.stride(),
        *length_N.stride(), scale, softcap, M * P,
        G=H // K, W=W, U=U, P=P, LENGTH=stretch, SINGLE=single, WINDOW=window, CAPPED=softcap > 0,
        WIDE=query_NHW.dtype == torch.float32 or triton.knobs.runtime.interpret,
        BLOCK_G=block_g, BLOCK_W=block_w, BLOCK_U=block_u,
        BLOCK_L=tile_length(max(block_w, block_u), query_NHW.dtype), num_warps=4,
    )  # fmt: skip
    if not single:
        _sum_kernel[(N, H)](
            out_NHU, part, top, total, length_N, *length_N.stride(), M * P, stretches,
            U=U, LENGTH=stretch, WINDOW=window, ADDED=ADDED, BLOCK_U=triton.next_power_of_2(U), num_warps=1,
        )  # fmt: skip
    return out_NHU


def tile_length(width: int, dtype: torch.dtype) -> int:
    """Keys of one tile. Tiles of 16 KB fit the registers of four warps; products in float32 need twice as many."""
    most = 16_384 if dtype.itemsize == 2 else 8_192
    return min(64, max(16, most // (width * dtype.itemsize)))
