"""The Triton kernel of `kernels.feedback`, one program per token, and its launch.

Equations (1) to (5) of `kernels.feedback`, whose `reference` is the oracle. A whole row of x is in registers before the
first store, and every store to y depends on its reductions, so x may be y itself. Divisions and roots are the correctly
rounded ones: they are scalars, and the approximate ones would cost a bit of the agreement with the reference.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.feedback import TINY, check_dense, check_shapes, reference

MOST_UNROLLED = 8
"""Most channels that are unrolled: compiling takes 2 s then, and takes 138 with 128 of them. Plans need as many."""


@triton.jit
def _feedback_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0915  # pointers and strides have no Python type
    y, x, slot_t, probe, gain, norm, limit, knee, floor, relative, setpoint, strength, cap, budget, spent, measured,
    effort, saturated,
    y_t, x_t, slot_s, probe_s, probe_r, gain_s, gain_r, norm_s, norm_r, limit_s, limit_r, knee_s, knee_r,
    floor_s, floor_r, relative_s, relative_r, setpoint_t, setpoint_r, strength_t, strength_r, cap_t, cap_r,
    budget_t, spent_t, measured_t, measured_r, effort_t, saturated_t,
    D, E,
    R: tl.constexpr, UNROLL: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, FLOOR: tl.constexpr,
) -> None:  # fmt: skip
    """One token: names are pointers, a suffix after the underscore is the stride of that dimension."""
    row = tl.program_id(0).to(tl.int64)  # 64 bits: T·D passes 2³¹ in a long prompt
    slot = tl.load(slot_t + row * slot_s).to(tl.int64)
    if slot == 0:
        return
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    in_d = d < D
    in_e = e < E

    x_D = tl.load(x + row * x_t + d, mask=in_d, other=0.0).to(tl.float32)
    size = tl.sqrt_rn(tl.sum(x_D * x_D, axis=0))
    size = tl.where(size < FLOOR, FLOOR, size)
    used = tl.load(spent + row * spent_t)
    avail = tl.load(budget + row * budget_t) - used
    avail = tl.where(avail < 0.0, 0.0, avail)  # not tl.maximum, which drops a NaN

    u_E = tl.zeros([BLOCK_E], dtype=tl.float32)
    touched = slot < 0
    bites = slot < 0
    for first in range(0, R, UNROLL):
        for i in tl.static_range(UNROLL):
            j = first + i
            c_D = tl.load(probe + slot * probe_s + j * probe_r + d, mask=in_d, other=0.0)
            z = tl.sum(x_D * c_D.to(tl.float32), axis=0)
            bent = z <= tl.load(knee + slot * knee_s + j * knee_r)
            z = tl.where(bent, tl.load(floor + slot * floor_s + j * floor_r), z)
            tl.store(measured + row * measured_t + j * measured_r, z)
            a = tl.load(strength + row * strength_t + j * strength_r)
            g = tl.load(norm + slot * norm_s + j * norm_r)
            active = (a != 0.0) & (g != 0.0)
            most = tl.load(cap + row * cap_t + j * cap_r)
            most = tl.where(most < avail, most, avail)
            most = tl.div_rn(most * size, tl.where(g == 0.0, 1.0, g))
            sat = tl.abs(a) * tl.load(limit + slot * limit_s + j * limit_r)
            most = tl.where(sat < most, sat, most)
            aim = tl.load(setpoint + row * setpoint_t + j * setpoint_r)
            aim = tl.where(tl.load(relative + slot * relative_s + j * relative_r) != 0.0, aim * size, aim)
            want = a * (aim - z)
            spend = tl.where(want > most, most, tl.where(want < -most, -most, want))
            g_E = tl.load(gain + slot * gain_s + j * gain_r + e, mask=in_e, other=0.0)
            u_E += tl.where(active, spend, 0.0) * g_E.to(tl.float32)
            touched = touched | active
            bites = bites | (active & (spend != want))
    if not touched:
        return

    u_E = tl.where(in_e, u_E, 0.0)  # an infinite spend times the padding is NaN
    rho = tl.div_rn(tl.sqrt_rn(tl.sum(u_E * u_E, axis=0)), size)
    if rho > avail:
        u_E = u_E * tl.div_rn(avail, rho)
        rho = avail
        bites = slot > 0
    y_E = tl.load(y + row * y_t + e, mask=in_e, other=0.0).to(tl.float32) + u_E
    tl.store(y + row * y_t + e, y_E.to(y.dtype.element_ty), mask=in_e)
    tl.store(spent + row * spent_t, used + rho)
    tl.store(effort + row * effort_t, tl.load(effort + row * effort_t) + rho)
    if bites:
        tl.store(saturated + row * saturated_t, tl.load(saturated + row * saturated_t) | 1)


def launch(
    y_TE: Tensor,
    x_TD: Tensor,
    slot_T: Tensor,
    probe_SRD: Tensor,
    gain_SRE: Tensor,
    norm_SR: Tensor,
    limit_SR: Tensor,
    knee_SR: Tensor,
    floor_SR: Tensor,
    relative_SR: Tensor,
    setpoint_TR: Tensor,
    strength_TR: Tensor,
    cap_TR: Tensor,
    budget_T: Tensor,
    spent_T: Tensor,
    measured_TR: Tensor,
    effort_T: Tensor,
    saturated_T: Tensor,
) -> None:
    """The operator as one Triton launch, a program per token; arguments as `feedback_`. float64 goes to `reference`."""
    if y_TE.dtype == torch.float64:
        reference(
            y_TE, x_TD, slot_T, probe_SRD, gain_SRE, norm_SR, limit_SR, knee_SR, floor_SR, relative_SR,
            setpoint_TR, strength_TR, cap_TR, budget_T, spent_T, measured_TR, effort_T, saturated_T,
        )  # fmt: skip
        return
    knobs = (slot_T, setpoint_TR, strength_TR, cap_TR, budget_T)
    tokens = (y_TE, x_TD, *knobs, spent_T, measured_TR, effort_T, saturated_T)
    check_shapes((probe_SRD, gain_SRE, norm_SR, limit_SR, knee_SR, floor_SR, relative_SR), tokens)
    check_dense({"y_TE": y_TE, "x_TD": x_TD, "probe_SRD": probe_SRD, "gain_SRE": gain_SRE})
    if y_TE.shape[0] == 0:
        return
    block_d, block_e = triton.next_power_of_2(x_TD.shape[1]), triton.next_power_of_2(y_TE.shape[1])
    _feedback_kernel[(y_TE.shape[0],)](
        y_TE, x_TD, slot_T, probe_SRD, gain_SRE, norm_SR, limit_SR, knee_SR, floor_SR, relative_SR,
        setpoint_TR, strength_TR, cap_TR, budget_T, spent_T, measured_TR, effort_T, saturated_T,
        y_TE.stride(0), x_TD.stride(0), slot_T.stride(0), *probe_SRD.stride()[:2], *gain_SRE.stride()[:2],
        *norm_SR.stride(), *limit_SR.stride(), *knee_SR.stride(), *floor_SR.stride(), *relative_SR.stride(),
        *setpoint_TR.stride(), *strength_TR.stride(), *cap_TR.stride(),
        budget_T.stride(0), spent_T.stride(0), *measured_TR.stride(), effort_T.stride(0), saturated_T.stride(0),
        x_TD.shape[1], y_TE.shape[1],
        R=probe_SRD.shape[1], UNROLL=math.gcd(probe_SRD.shape[1], MOST_UNROLLED), BLOCK_D=block_d, BLOCK_E=block_e,
        FLOOR=TINY,
        num_warps=min(16, max(1, max(block_d, block_e) // 512)),
    )  # fmt: skip
