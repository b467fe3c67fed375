"""The Triton kernels of `kernels.mask`, `kernels.turn` and `kernels.sparse`, one program per token, and their launches.

Each module's equations, under the bounds of `kernels._bound`; its `reference` is the oracle. The row of y stays in
registers from the first edit to the last and is stored once, and only where it changed. Edits are looped over, never
unrolled: compiling takes the same time for one as for a hundred.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import mask, sparse, turn
from kernels._bound import MOST
from kernels.feedback import TINY, check_dense

# Globals of a kernel must be constexpr. The polynomial is a Chebyshev fit of (atan r / r − 1) / r² in r² on
# |r| ≤ tan(π/8), within 1e-9.
_FLOOR, _MOST = tl.constexpr(TINY), tl.constexpr(MOST)
_PI, _EIGHTH = tl.constexpr(3.141592653589793), tl.constexpr(0.41421356237309503)
_A1, _A2, _A3 = tl.constexpr(-0.3333333134651184), tl.constexpr(0.1999955028295517), tl.constexpr(-0.1426423341035843)
_A4, _A5 = tl.constexpr(0.10746300220489502), tl.constexpr(-0.06459379941225052)


@triton.jit
def _bounded(y_E, d_E, f, cap, budget, used):  # type: ignore[no-untyped-def]
    """Equation (3) of `kernels._bound`: the moved y, ρ, and whether the bound bit."""
    size = tl.sqrt_rn(tl.sum(y_E * y_E, axis=0))
    size = tl.where(size < _FLOOR, _FLOOR, size)
    step = tl.sqrt_rn(tl.sum(d_E * d_E, axis=0))
    avail = budget - used
    avail = tl.where(avail < 0.0, 0.0, avail)  # not tl.maximum, which drops a NaN
    bound = tl.where(cap < avail, cap, avail)
    moved = tl.abs(f) * step
    allowed = bound * size
    over = (moved > allowed) & (step < float("inf"))
    share = tl.div_rn(allowed, tl.where(step == 0.0, 1.0, step))
    u_E = d_E * tl.where(over, tl.where(f < 0.0, -share, share), f)
    rho = tl.where(moved > _MOST, float("inf"), tl.div_rn(moved, size))
    rho = tl.where(over, bound, rho)
    rho = tl.where(size < float("inf"), rho, float("nan"))
    return tl.where(u_E != 0.0, y_E + u_E, y_E), rho, over


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    y_at, first_E, y_E, in_e, spent_at, used, effort_at, total, saturated_at, hit,
) -> None:  # fmt: skip
    """Store what an acting token leaves behind. Coordinates that did not change are not written."""
    changed = first_E.to(tl.int32, bitcast=True) != y_E.to(tl.int32, bitcast=True)
    tl.store(y_at, y_E.to(y_at.dtype.element_ty), mask=in_e & changed)
    tl.store(spent_at, used)
    tl.store(effort_at, tl.load(effort_at) + total)
    if hit:
        tl.store(saturated_at, tl.load(saturated_at) | 1)


@triton.jit
def _mask_kernel(  # type: ignore[no-untyped-def]  # pointers and strides have no Python type
    scale, shift, low, high,
    scale_s, scale_m, shift_s, shift_m, low_s, low_m, high_s, high_m,
    y, slot_t, channel, strength, cap, budget, spent, measured, effort, saturated,
    y_t, slot_s, channel_s, channel_m, strength_t, strength_r, cap_t, cap_r, budget_t, spent_t, measured_t, measured_r,
    effort_t, saturated_t,
    M: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
) -> None:  # fmt: skip
    """One token: names are pointers, a suffix after the underscore is the stride of that dimension."""
    row = tl.program_id(0).to(tl.int64)  # 64 bits: T·E passes 2³¹ in a long prompt
    slot = tl.load(slot_t + row * slot_s).to(tl.int64)
    if slot == 0:
        return
    e = tl.arange(0, BLOCK_E)
    in_e = e < E
    first_E = tl.load(y + row * y_t + e, mask=in_e, other=0.0).to(tl.float32)
    y_E = first_E
    total = 0.0
    used = tl.load(spent + row * spent_t)
    most = tl.load(budget + row * budget_t)
    acts = slot < 0
    hit = slot < 0
    for m in range(M):
        j = tl.load(channel + slot * channel_s + m * channel_m)
        if j >= 0:
            s_E = tl.load(scale + slot * scale_s + m * scale_m + e, mask=in_e, other=1.0).to(tl.float32)
            b_E = tl.load(shift + slot * shift_s + m * shift_m + e, mask=in_e, other=0.0).to(tl.float32)
            low_E = tl.load(low + slot * low_s + m * low_m + e, mask=in_e, other=0.0).to(tl.float32)
            high_E = tl.load(high + slot * high_s + m * high_m + e, mask=in_e, other=0.0).to(tl.float32)
            inside_E = (y_E >= low_E) & (y_E <= high_E) & ((s_E != 1.0) | (b_E != 0.0))
            z = tl.sum(tl.where(inside_E, 1.0, 0.0), axis=0) / E
            tl.store(measured + row * measured_t + j * measured_r, z)
            a = tl.load(strength + row * strength_t + j * strength_r)
            if a != 0.0:
                d_E = tl.where(inside_E, (s_E - 1.0) * y_E + b_E, 0.0)
                y_E, rho, over = _bounded(y_E, d_E, a, tl.load(cap + row * cap_t + j * cap_r), most, used)
                used += rho
                total += rho
                acts = slot > 0
                hit = hit | over
    if acts:
        _finish(
            y + row * y_t + e, first_E, y_E, in_e, spent + row * spent_t, used, effort + row * effort_t, total,
            saturated + row * saturated_t, hit,
        )  # fmt: skip


@triton.jit
def _atan2(y, x):  # type: ignore[no-untyped-def]
    """The angle of (x, y) in [−π, π]; libdevice's is not there in the interpreter. One unit in the last place."""
    tall = tl.abs(y) > tl.abs(x)
    long = tl.where(tall, tl.abs(y), tl.abs(x))
    t = tl.div_rn(tl.where(tall, tl.abs(x), tl.abs(y)), tl.where(long == 0.0, 1.0, long))
    r = tl.where(t > _EIGHTH, tl.div_rn(t - 1.0, t + 1.0), t)
    q = r * r
    angle = r + r * q * (_A1 + q * (_A2 + q * (_A3 + q * (_A4 + q * _A5))))
    angle = tl.where(t > _EIGHTH, _PI / 4 + angle, angle)
    angle = tl.where(tall, _PI / 2 - angle, angle)
    angle = tl.where(x < 0.0, _PI - angle, angle)
    return tl.where(y < 0.0, -angle, angle)


@triton.jit
def _turn_kernel(  # type: ignore[no-untyped-def]
    plane, adaptive, setpoint,
    plane_s, plane_m, plane_2, adaptive_s, adaptive_m, setpoint_t, setpoint_r,
    y, slot_t, channel, strength, cap, budget, spent, measured, effort, saturated,
    y_t, slot_s, channel_s, channel_m, strength_t, strength_r, cap_t, cap_r, budget_t, spent_t, measured_t, measured_r,
    effort_t, saturated_t,
    M: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
) -> None:  # fmt: skip
    """One token, as in `_mask_kernel`."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_t + row * slot_s).to(tl.int64)
    if slot == 0:
        return
    e = tl.arange(0, BLOCK_E)
    in_e = e < E
    first_E = tl.load(y + row * y_t + e, mask=in_e, other=0.0).to(tl.float32)
    y_E = first_E
    total = 0.0
    used = tl.load(spent + row * spent_t)
    most = tl.load(budget + row * budget_t)
    acts = slot < 0
    hit = slot < 0
    for m in range(M):
        j = tl.load(channel + slot * channel_s + m * channel_m)
        if j >= 0:
            at = plane + slot * plane_s + m * plane_m + e
            one_E = tl.load(at, mask=in_e, other=0.0).to(tl.float32)
            two_E = tl.load(at + plane_2, mask=in_e, other=0.0).to(tl.float32)
            one = tl.sum(y_E * one_E, axis=0)
            two = tl.sum(y_E * two_E, axis=0)
            phi = _atan2(two, one)
            tl.store(measured + row * measured_t + j * measured_r, phi)
            a = tl.load(strength + row * strength_t + j * strength_r)
            if a != 0.0:
                turn = _PI - (tl.load(setpoint + row * setpoint_t + j * setpoint_r) - phi)
                turn = _PI - (turn - 2 * _PI * tl.floor(turn / (2 * _PI)))
                sin = tl.sin(0.5 * a * turn)
                cos = tl.cos(0.5 * a * turn)
                moves = (tl.load(adaptive + slot * adaptive_s + m * adaptive_m) == 0.0) | (one > 0.0)
                chord = tl.where(moves, 2.0 * sin, 0.0)
                d_E = chord * (one * cos - two * sin) * two_E - chord * (one * sin + two * cos) * one_E
                y_E, rho, over = _bounded(y_E, d_E, 1.0, tl.load(cap + row * cap_t + j * cap_r), most, used)
                used += rho
                total += rho
                acts = slot > 0
                hit = hit | over
    if acts:
        _finish(
            y + row * y_t + e, first_E, y_E, in_e, spent + row * spent_t, used, effort + row * effort_t, total,
            saturated + row * saturated_t, hit,
        )  # fmt: skip


@triton.jit
def _sparsify_kernel(  # type: ignore[no-untyped-def]
    weight, threshold, count, rest,
    weight_s, weight_m, threshold_s, threshold_m, count_s, count_m, rest_s, rest_m, rest_k,
    y, slot_t, channel, strength, cap, budget, spent, measured, effort, saturated,
    y_t, slot_s, channel_s, channel_m, strength_t, strength_r, cap_t, cap_r, budget_t, spent_t, measured_t, measured_r,
    effort_t, saturated_t,
    M: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, K: tl.constexpr,
) -> None:  # fmt: skip
    """One token, as in `_mask_kernel`. The bits of a float32 ≥ 0 are ordered as the numbers are, so halving the range
    of bit patterns 31 times finds the count-th largest score exactly."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_t + row * slot_s).to(tl.int64)
    if slot == 0:
        return
    e = tl.arange(0, BLOCK_E)
    in_e = e < E
    first_E = tl.load(y + row * y_t + e, mask=in_e, other=0.0).to(tl.float32)
    y_E = first_E
    total = 0.0
    used = tl.load(spent + row * spent_t)
    most = tl.load(budget + row * budget_t)
    acts = slot < 0
    hit = slot < 0
    for m in range(M):
        j = tl.load(channel + slot * channel_s + m * channel_m)
        if j >= 0:
            w_E = tl.load(weight + slot * weight_s + m * weight_m + e, mask=in_e, other=0.0).to(tl.float32)
            score_E = tl.where(in_e, tl.abs(y_E * w_E), -1.0)
            n = tl.load(count + slot * count_s + m * count_m)
            kept_E = score_E > tl.load(threshold + slot * threshold_s + m * threshold_m)
            if n > 0:
                bits_E = score_E.to(tl.int32, bitcast=True)
                least = n * 0
                for i in range(31):
                    higher = least + (1073741824 >> i)  # 2³⁰, 2²⁹, … 1
                    enough = tl.sum((bits_E >= higher).to(tl.int32), axis=0) >= n
                    least = tl.where(enough, higher, least)
                kept_E = (bits_E >= least) & (score_E >= 0.0)  # the second drops a NaN, as `reference` does
            lost_E = tl.where(kept_E | (e >= E), 0.0, y_E)
            z = tl.sum(tl.where(kept_E | (e >= E), 0.0, 1.0), axis=0) / E
            tl.store(measured + row * measured_t + j * measured_r, z)
            a = tl.load(strength + row * strength_t + j * strength_r)
            if a != 0.0:
                d_E = -lost_E
                for k in range(K):
                    rest_E = tl.load(rest + slot * rest_s + m * rest_m + k * rest_k + e, mask=in_e, other=0.0)
                    d_E += tl.sum(lost_E * rest_E.to(tl.float32), axis=0) * rest_E.to(tl.float32)
                y_E, rho, over = _bounded(y_E, d_E, a, tl.load(cap + row * cap_t + j * cap_r), most, used)
                used += rho
                total += rho
                acts = slot > 0
                hit = hit | over
    if acts:
        _finish(
            y + row * y_t + e, first_E, y_E, in_e, spent + row * spent_t, used, effort + row * effort_t, total,
            saturated + row * saturated_t, hit,
        )  # fmt: skip


def launch_mask(
    y_TE: Tensor, slot_T: Tensor, scale_SME: Tensor, shift_SME: Tensor, low_SME: Tensor, high_SME: Tensor,
    channel_SM: Tensor, strength_TR: Tensor, cap_TR: Tensor, budget_T: Tensor, spent_T: Tensor, measured_TR: Tensor,
    effort_T: Tensor, saturated_T: Tensor,
) -> None:  # fmt: skip
    """`kernels.mask.mask_` as one launch. float64 goes to `reference`."""
    bank = (scale_SME, shift_SME, low_SME, high_SME)
    request = (strength_TR, cap_TR, budget_T, spent_T, measured_TR, effort_T, saturated_T)
    if y_TE.dtype == torch.float64:
        mask.reference(y_TE, slot_T, *bank, channel_SM, *request)
        return
    totals = (budget_T, spent_T, effort_T, saturated_T)
    mask.check_shapes(y_TE, slot_T, bank, channel_SM, totals, (strength_TR, cap_TR, measured_TR))
    strides = [stride for each in bank for stride in each.stride()[:2]]
    names = {"scale_SME": scale_SME, "shift_SME": shift_SME, "low_SME": low_SME, "high_SME": high_SME}
    _launch(_mask_kernel, (*bank, *strides), names, y_TE, slot_T, channel_SM, request)


def launch_turn(
    y_TE: Tensor, slot_T: Tensor, plane_SM2E: Tensor, adaptive_SM: Tensor, channel_SM: Tensor, setpoint_TR: Tensor,
    strength_TR: Tensor, cap_TR: Tensor, budget_T: Tensor, spent_T: Tensor, measured_TR: Tensor, effort_T: Tensor,
    saturated_T: Tensor,
) -> None:  # fmt: skip
    """`kernels.turn.turn_` as one launch. float64 goes to `reference`."""
    bank = (plane_SM2E, adaptive_SM)
    request = (strength_TR, cap_TR, budget_T, spent_T, measured_TR, effort_T, saturated_T)
    if y_TE.dtype == torch.float64:
        turn.reference(y_TE, slot_T, *bank, channel_SM, setpoint_TR, *request)
        return
    totals = (budget_T, spent_T, effort_T, saturated_T)
    turn.check_shapes(y_TE, slot_T, bank, channel_SM, totals, (strength_TR, setpoint_TR, cap_TR, measured_TR))
    own = (*bank, setpoint_TR, *plane_SM2E.stride()[:3], *adaptive_SM.stride(), *setpoint_TR.stride())
    _launch(_turn_kernel, own, {"plane_SM2E": plane_SM2E}, y_TE, slot_T, channel_SM, request)


def launch_sparsify(
    y_TE: Tensor, slot_T: Tensor, weight_SME: Tensor, threshold_SM: Tensor, count_SM: Tensor, rest_SMKE: Tensor,
    channel_SM: Tensor, strength_TR: Tensor, cap_TR: Tensor, budget_T: Tensor, spent_T: Tensor, measured_TR: Tensor,
    effort_T: Tensor, saturated_T: Tensor,
) -> None:  # fmt: skip
    """`kernels.sparse.sparsify_` as one launch. float64 goes to `reference`."""
    bank = (weight_SME, threshold_SM, count_SM, rest_SMKE)
    request = (strength_TR, cap_TR, budget_T, spent_T, measured_TR, effort_T, saturated_T)
    if y_TE.dtype == torch.float64:
        sparse.reference(y_TE, slot_T, *bank, channel_SM, *request)
        return
    totals = (budget_T, spent_T, effort_T, saturated_T)
    sparse.check_shapes(y_TE, slot_T, bank, channel_SM, totals, (strength_TR, cap_TR, measured_TR))
    strides = (*weight_SME.stride()[:2], *threshold_SM.stride(), *count_SM.stride(), *rest_SMKE.stride()[:3])
    names = {"weight_SME": weight_SME, "rest_SMKE": rest_SMKE}
    _launch(_sparsify_kernel, (*bank, *strides), names, y_TE, slot_T, channel_SM, request, K=rest_SMKE.shape[2])


def _launch(
    kernel: Any,
    own: tuple[Any, ...],
    bank: dict[str, Tensor],
    y_TE: Tensor,
    slot_T: Tensor,
    channel_SM: Tensor,
    request: tuple[Tensor, ...],
    **sizes: int,
) -> None:
    """Launch a kernel on what is its own and on what all edits take. Raises ValueError for rows with gaps."""
    check_dense({"y_TE": y_TE, **bank})
    T, E = y_TE.shape
    if T == 0 or channel_SM.shape[1] == 0:
        return
    block_e = triton.next_power_of_2(E)
    strides = [stride for each in (slot_T, channel_SM, *request) for stride in each.stride()]
    kernel[(T,)](
        *own, y_TE, slot_T, channel_SM, *request, y_TE.stride(0), *strides,
        M=channel_SM.shape[1], E=E, BLOCK_E=block_e, num_warps=min(16, max(1, block_e // 512)), **sizes,
    )  # fmt: skip
