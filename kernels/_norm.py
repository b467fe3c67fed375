"""The Triton kernels of `kernels.norm`, whose `reference` is the oracle, and their launch: one program per token.

The row passes from the residual to the law to the norm through memory, that is through the cache of its processor, with
a barrier between: so the law is the very function of `kernels._launch`, what it reads may be y, and the norm sees y as
it was rounded. Law and norm are compiled from the same functions for the same number of warps whether they share a
launch or not, and come to the same operations, so that their bits do not tell which; where the law reads wider rows
than it writes, alone it has more warps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._launch import MOST_UNROLLED, _feedback_kernel
from kernels.feedback import TINY, check_dense, check_shapes
from kernels.norm import Form, check, reference


@triton.jit
def _add_row(  # type: ignore[no-untyped-def]  # pointers and strides have no Python type
    y, residual, y_t, residual_t, E, BLOCK_E: tl.constexpr,
) -> None:  # fmt: skip
    """y ← y + residual, rounded."""
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    sum_E = tl.load(y + row * y_t + e, mask=e < E, other=0.0).to(tl.float32)
    sum_E += tl.load(residual + row * residual_t + e, mask=e < E, other=0.0).to(tl.float32)
    tl.store(y + row * y_t + e, sum_E.to(y.dtype.element_ty), mask=e < E)
    tl.debug_barrier()


@triton.jit
def _norm_row(  # type: ignore[no-untyped-def]
    out, y, weight, bias, y_t, E, size, eps,
    BLOCK_E: tl.constexpr, CENTRED: tl.constexpr, BIASED: tl.constexpr, ROUNDS: tl.constexpr, OFFSET: tl.constexpr,
) -> None:  # fmt: skip
    """Equation (3); `size` is E as a float32."""
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    in_e = e < E
    y_E = tl.load(y + row * y_t + e, mask=in_e, other=0.0).to(tl.float32)
    if CENTRED:
        y_E = tl.where(in_e, y_E - tl.div_rn(tl.sum(y_E, axis=0), size), 0.0)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(y_E * y_E, axis=0), size) + eps))
    n_E = y_E * scale
    if ROUNDS:
        n_E = n_E.to(y.dtype.element_ty).to(tl.float32)
    n_E = n_E * (tl.load(weight + e, mask=in_e, other=0.0).to(tl.float32) + OFFSET)
    if BIASED:
        n_E += tl.load(bias + e, mask=in_e, other=0.0).to(tl.float32)
    tl.store(out + row * E + e, n_E.to(out.dtype.element_ty), mask=in_e)


@triton.jit
def _norm_kernel(  # type: ignore[no-untyped-def]
    out, y, residual, weight, bias, y_t, residual_t, E, size, eps,
    BLOCK_E: tl.constexpr, ADDS: tl.constexpr,
    CENTRED: tl.constexpr, BIASED: tl.constexpr, ROUNDS: tl.constexpr, OFFSET: tl.constexpr,
) -> None:  # fmt: skip
    """Equations (1) and (3) of one token."""
    if ADDS:
        _add_row(y, residual, y_t, residual_t, E, BLOCK_E)
    _norm_row(out, y, weight, bias, y_t, E, size, eps, BLOCK_E, CENTRED, BIASED, ROUNDS, OFFSET)


@triton.jit
def _law_norm_kernel(  # type: ignore[no-untyped-def]
    out, y, residual, weight, bias, y_t, residual_t, E, size, eps,
    x, slot_t, probe, gain, norm, limit, knee, floor, relative, setpoint, strength, cap, budget, spent, measured,
    effort, saturated,
    x_t, slot_s, probe_s, probe_r, gain_s, gain_r, norm_s, norm_r, limit_s, limit_r, knee_s, knee_r,
    floor_s, floor_r, relative_s, relative_r, setpoint_t, setpoint_r, strength_t, strength_r, cap_t, cap_r,
    budget_t, spent_t, measured_t, measured_r, effort_t, saturated_t,
    D,
    R: tl.constexpr, UNROLL: tl.constexpr, BLOCK_D: tl.constexpr, FLOOR: tl.constexpr,
    BLOCK_E: tl.constexpr, ADDS: tl.constexpr,
    CENTRED: tl.constexpr, BIASED: tl.constexpr, ROUNDS: tl.constexpr, OFFSET: tl.constexpr,
) -> None:  # fmt: skip
    """Equations (1) to (3) of one token; names as in `_feedback_kernel`."""
    if ADDS:
        _add_row(y, residual, y_t, residual_t, E, BLOCK_E)
    _feedback_kernel(
        y, x, slot_t, probe, gain, norm, limit, knee, floor, relative, setpoint, strength, cap, budget, spent,
        measured, effort, saturated,
        y_t, x_t, slot_s, probe_s, probe_r, gain_s, gain_r, norm_s, norm_r, limit_s, limit_r, knee_s, knee_r,
        floor_s, floor_r, relative_s, relative_r, setpoint_t, setpoint_r, strength_t, strength_r, cap_t, cap_r,
        budget_t, spent_t, measured_t, measured_r, effort_t, saturated_t,
        D, E, R, UNROLL, BLOCK_D, BLOCK_E, FLOOR,
    )  # fmt: skip
    tl.debug_barrier()
    _norm_row(out, y, weight, bias, y_t, E, size, eps, BLOCK_E, CENTRED, BIASED, ROUNDS, OFFSET)


def launch(
    y_TE: Tensor,
    weight_E: Tensor,
    bias_E: Tensor | None,
    form: Form,
    eps: float,
    residual_TE: Tensor | None,
    read: Sequence[Tensor],
    account: Sequence[Tensor],
) -> Tensor:
    """The operator as one Triton launch; arguments as `reference`, to which float64 goes."""
    if y_TE.dtype == torch.float64:
        return reference(y_TE, weight_E, bias_E, form, eps, residual_TE, read, account)
    check(y_TE, weight_E, bias_E, form, residual_TE, (*read, *account))
    (T, E), out_TE = y_TE.shape, y_TE.new_empty(y_TE.shape)
    if T == 0:
        return out_TE
    residual = y_TE if residual_TE is None else residual_TE
    block = triton.next_power_of_2(E)
    warps = min(16, max(1, block // 512))
    rows = (
        out_TE, y_TE, residual, weight_E.contiguous(), weight_E if bias_E is None else bias_E.contiguous(),
        y_TE.stride(0), residual.stride(0), E, float(E), eps,
    )  # fmt: skip
    kind = {
        "BLOCK_E": block,
        "ADDS": residual_TE is not None,
        "CENTRED": form == "layer",
        "BIASED": bias_E is not None,
        "ROUNDS": form == "rms",
        "OFFSET": float(form == "rms_plus_one"),
    }
    if not read:
        _norm_kernel[(T,)](*rows, **kind, num_warps=warps)
        return out_TE

    x_TD, slot_T, probe_SRD, gain_SRE, *pairs = read
    check_shapes((probe_SRD, gain_SRE, *pairs[:5]), (y_TE, x_TD, slot_T, *pairs[5:], *account))
    check_dense({"x_TD": x_TD, "probe_SRD": probe_SRD, "gain_SRE": gain_SRE})
    rank = probe_SRD.shape[1]
    _law_norm_kernel[(T,)](
        *rows, *read, *account,
        x_TD.stride(0), slot_T.stride(0), *probe_SRD.stride()[:2], *gain_SRE.stride()[:2],
        *(stride for each in (*pairs, *account) for stride in each.stride()), x_TD.shape[1],
        R=rank, UNROLL=math.gcd(rank, MOST_UNROLLED), BLOCK_D=triton.next_power_of_2(x_TD.shape[1]), FLOOR=TINY,
        **kind, num_warps=warps,
    )  # fmt: skip
    return out_TE
