"""Attention of one token a row over keys and values that lie in blocks of a shared pool, without gathering them.

For row n with ℓ = length_n keys, its own included, query head h, which reads kv head k = h // (H / K), and the key at
position i in block table_n,⌊i/P⌋ at place i mod P,

    s_i = c tanh(scale q_h·k_i / c)     c = softcap; 0: no cap, s_i = scale q_h·k_i                       (1)
    o_h = Σ_i softmax(s)_i v_i          over max(0, ℓ − window) ≤ i < ℓ; window = 0: over all i < ℓ       (2)

and o = 0 where ℓ = 0. The pool in blocks is PagedAttention's (arXiv:2309.06180, Sec. 4.1); the sum over keys in
independent parts on a GPU is Flash-Decoding's. Scores, weights and sums are in float32 (float64 where q is float64), o
is rounded once. Promised:

* a key outside of (2) is never read, so that what is not finite in a block's unused places does no harm;
* a row's result does not depend on the other rows, nor on the table's width (on a GPU: of tables up to 16,384 keys);
* a state that is not finite gives a result that is not finite;
* on a GPU nothing is waited for and no launch depends on `length_N`, so that it can stand in a CUDA graph; float64,
  which goes to `reference`, cannot.

Cost: each key and value in range is read once for all heads of its group. `reference` defines the operator, gathers,
and stands in on a CPU without numba; `kernels._attention_cpu` holds the compiled loops, `kernels._attention` the Triton
kernels. There is no gradient.
Legend: N rows · H query heads · K kv heads · W width of q and k · U width of v · B blocks · P places · M blocks a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._library import define


def paged_attention(
    query_NHW: Tensor,
    key_BPKW: Tensor,
    value_BPKU: Tensor,
    table_NM: Tensor,
    length_N: Tensor,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> Tensor:
    """Equations (1) and (2) for every row: (N, H, U), contiguous, in the dtype of the query.

    query_NHW   last dimension contiguous, any other strides; H a multiple of K
    key_BPKW    the pool of keys, value_BPKU the pool of values: in the dtype of the query, last dimension contiguous
    table_NM    int32 numbers of each row's blocks in order; entries beyond the row's length are not read
    length_N    int32, 0 to M·P: keys of each row
    scale       factor of q·k
    softcap     c ≥ 0; 0: none
    window      keys that a query sees, its own included, ≥ 0; 0: all

    Raises ValueError when shapes or dtypes disagree or a last dimension has gaps. A block beyond the pool or a length
    beyond the table raises IndexError on a CPU; on a GPU that check would cost a wait.
    """
    result: Tensor = _paged_attention(
        query_NHW, key_BPKW, value_BPKU, table_NM, length_N, float(scale), float(softcap), window
    )
    return result


def reference(
    query_NHW: Tensor,
    key_BPKW: Tensor,
    value_BPKU: Tensor,
    table_NM: Tensor,
    length_N: Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> Tensor:
    """The operator in plain torch, on any device; arguments as `paged_attention`.

    One row after another, each with its own keys only, so that no blocking depends on the rest of the batch.
    """
    check_shapes(query_NHW, key_BPKW, value_BPKU, table_NM, length_N, softcap, window)
    wide = torch.float64 if query_NHW.dtype == torch.float64 else torch.float32
    P, K = key_BPKW.shape[1:3]
    out_NHU = query_NHW.new_zeros(*query_NHW.shape[:2], value_BPKU.shape[3])
    for q_HW, table_M, length, out_HU in zip(query_NHW, table_NM, length_N.tolist(), out_NHU, strict=True):
        if not 0 <= length <= table_M.shape[0] * P:
            raise IndexError(f"length {length} is not in 0 to {table_M.shape[0] * P}, the places of a row's table")
        if length == 0:
            continue
        first = max(0, length - window) if window else 0
        skipped = first // P
        blocks = table_M[skipped : -(-length // P)].long()
        own = slice(first - skipped * P, length - skipped * P)
        key_KLW = key_BPKW[blocks].flatten(0, 1)[own].to(wide).transpose(0, 1)
        value_KLU = value_BPKU[blocks].flatten(0, 1)[own].to(wide).transpose(0, 1)
        score_KGL = scale * (q_HW.to(wide).unflatten(0, (K, -1)) @ key_KLW.mT)
        if softcap:
            score_KGL = softcap * torch.tanh(score_KGL / softcap)
        out_HU.copy_((score_KGL.softmax(-1) @ value_KLU).flatten(0, 1))
    return out_NHU


def check_shapes(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, length: Tensor, softcap: float, window: int
) -> None:
    """Raise ValueError unless every tensor fits: a kernel would read past its end."""
    if not (query.ndim == 3 and key.ndim == value.ndim == 4):
        raise ValueError(
            "query, key and value must be (N, H, W), (B, P, K, W) and (B, P, K, U), got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    (N, H, W), (B, P, K, key_width) = query.shape, key.shape
    if key_width != W or value.shape != (B, P, K, value.shape[3]) or not K or H % K or not P:
        raise ValueError(
            f"key and value must be (B, P, K, {W}) and (B, P, K, U) with K a divisor of {H} query heads, got "
            f"{tuple(key.shape)} and {tuple(value.shape)}"
        )
    if table.ndim != 2 or table.shape[0] != N or length.shape != (N,):
        raise ValueError(
            f"table and length must be (N, M) and (N,) with N = {N}, got {tuple(table.shape)} and {tuple(length.shape)}"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value must be of one dtype, got {query.dtype}, {key.dtype}, {value.dtype}")
    if not table.dtype == length.dtype == torch.int32:
        raise ValueError(f"table and length must be int32, got {table.dtype} and {length.dtype}")
    if not query.stride()[2] == key.stride()[3] == value.stride()[3] == 1:
        raise ValueError(
            f"the last dimension of query, key and value must be contiguous, strides are {query.stride()}, "
            f"{key.stride()} and {value.stride()}; call .contiguous()"
        )
    if not (softcap >= 0 and window >= 0):
        raise ValueError(f"softcap and window must be ≥ 0 (0: none), got {softcap} and {window}")


def _on_cpu(*arguments: Tensor) -> Tensor:
    """The compiled loops, found at the first use: importing numba takes time. `reference` where numba is missing."""
    from kernels._compile import jit

    if jit is None:
        return reference(*arguments)  # type: ignore[arg-type]
    from kernels._attention_cpu import attend

    return attend(*arguments)  # type: ignore[arg-type]


def _on_gpu(*arguments: Tensor) -> Tensor:
    """The Triton kernels, found at the first use: Triton is a package for Linux only."""
    from kernels._attention import launch

    return launch(*arguments)  # type: ignore[arg-type]


def _fake(query_NHW: Tensor, _: Tensor, value_BPKU: Tensor, *__: object) -> Tensor:
    return query_NHW.new_empty(*query_NHW.shape[:2], value_BPKU.shape[3])


_paged_attention = define(
    "paged_attention(Tensor query_NHW, Tensor key_BPKW, Tensor value_BPKU, Tensor table_NM, Tensor length_N, "
    "float scale, float softcap, int window) -> Tensor",
    _on_cpu,
    _on_gpu,
    _fake,
)
