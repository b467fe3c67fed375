"""Turns the part of y that lies in a plane towards an angle, each token by its own program.

    c = (b_1·y, b_2·y),   φ = atan2(c_2, c_1) = z,   δ = a wrap(θ − φ),   wrap to (−π, π]                   (1)
    d = Δ_1 b_1 + Δ_2 b_2,   Δ = c turned by δ, less c = 2 sin(δ/2) (−c_1 sin(δ/2) − c_2 cos(δ/2),
                                                                     c_1 cos(δ/2) − c_2 sin(δ/2))            (2)

and y ← y + d (f = 1) under the bounds of `kernels._bound`, whose promises hold. With orthonormal b_1, b_2 the norm of
y stays for every strength a, unless a bound shortens d. Half angles keep a small turn exact, where cos δ − 1 cancels.
An adaptive turn leaves y alone unless c_1 > 0. Angular steering (arXiv:2510.26243) is a = 1.

Cost: three rows read and one written a token and edit; compare the dense rotation, an n×n product. `reference` defines
the operator; compiled for a CPU it is in `kernels._edits_cpu`, the Triton kernel is in `kernels._edits`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels._bound import Chosen, check_bank, check_tokens, edit_rows
from kernels._library import define


def turn_(
    y_TE: Tensor,
    slot_T: Tensor,
    plane_SM2E: Tensor,
    adaptive_SM: Tensor,
    channel_SM: Tensor,
    setpoint_TR: Tensor,
    strength_TR: Tensor,
    cap_TR: Tensor,
    budget_T: Tensor,
    spent_T: Tensor,
    measured_TR: Tensor,
    effort_T: Tensor,
    saturated_T: Tensor,
) -> None:
    """Equations (1) and (2) for every token of a batch, in one launch.

    y_TE         mutated: rows at the site, last dimension contiguous, any row stride
    slot_T       int32 row of the bank; 0 means no program, and no output of that token is touched
    plane_SM2E   b_1 and b_2, float32, orthonormal; adaptive_SM float32, 0 or 1
    channel_SM   int32 knob channel of each edit, −1 where a program has fewer than M: none of that edit is read
    setpoint_TR  θ in radians, float32, any strides
    strength_TR  a, cap_TR ≥ 0 (+inf: none): float32 knobs, any strides
    budget_T     float32 ≥ 0, what ρ may sum to over the layers, +inf where there is none
    spent_T      mutated float32: that sum so far
    measured_TR  mutated float32, any strides: z, in the edit's channel
    effort_T     mutated float32: ρ is added
    saturated_T  mutated int32: set to 1 where a cap or the budget bit

    Raises ValueError when the shapes disagree, or, on a GPU, when rows of y or of the bank are not contiguous.
    A slot beyond the bank, or a channel beyond the knobs, raises IndexError on a CPU; on a GPU that would cost a wait.
    """
    _turn(
        y_TE,
        slot_T,
        plane_SM2E,
        adaptive_SM,
        channel_SM,
        setpoint_TR,
        strength_TR,
        cap_TR,
        budget_T,
        spent_T,
        measured_TR,
        effort_T,
        saturated_T,
    )


def reference(
    y_TE: Tensor,
    slot_T: Tensor,
    plane_SM2E: Tensor,
    adaptive_SM: Tensor,
    channel_SM: Tensor,
    setpoint_TR: Tensor,
    strength_TR: Tensor,
    cap_TR: Tensor,
    budget_T: Tensor,
    spent_T: Tensor,
    measured_TR: Tensor,
    effort_T: Tensor,
    saturated_T: Tensor,
) -> None:
    """The operator in plain torch, on any device; arguments as `turn_`."""
    if not any(slot_T.tolist()):
        return
    totals = (budget_T, spent_T, effort_T, saturated_T)
    bank = (plane_SM2E, adaptive_SM)
    check_shapes(y_TE, slot_T, bank, channel_SM, totals, (strength_TR, setpoint_TR, cap_TR, measured_TR))

    def step(chosen: Chosen, m: int, y_AE: Tensor, asked: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        plane, adaptive = chosen.bank(plane_SM2E, m).to(y_AE.dtype), chosen.bank(adaptive_SM, m).unsqueeze(-1)
        strength_A1, angle_A1 = asked
        one_A1, two_A1 = (y_AE.unsqueeze(1) * plane).sum(-1).split(1, dim=1)
        phi_A1 = torch.atan2(two_A1, one_A1)
        half_A1 = 0.5 * strength_A1 * (math.pi - torch.remainder(math.pi - (angle_A1 - phi_A1), 2 * math.pi))
        sin_A1, cos_A1 = half_A1.sin(), half_A1.cos()
        chord_A1 = (2 * sin_A1).where((adaptive == 0) | (one_A1 > 0), 0.0)
        d_AE = chord_A1 * (one_A1 * cos_A1 - two_A1 * sin_A1) * plane[..., 1, :]
        d_AE -= chord_A1 * (one_A1 * sin_A1 + two_A1 * cos_A1) * plane[..., 0, :]
        return d_AE, phi_A1, torch.ones_like(strength_A1)

    edit_rows(
        step, 2 * y_TE.shape[1], y_TE, slot_T, channel_SM, (strength_TR, setpoint_TR), cap_TR, budget_T, spent_T,
        measured_TR, effort_T, saturated_T,
    )  # fmt: skip


def check_shapes(
    y: Tensor,
    slot: Tensor,
    bank: tuple[Tensor, ...],
    channel: Tensor,
    totals: tuple[Tensor, ...],
    knobs: tuple[Tensor, ...],
) -> None:
    """Raise ValueError unless every tensor fits. bank: plane, adaptive."""
    check_tokens(channel, (y, slot, *totals), knobs)
    want = (*channel.shape, 2, y.shape[1])
    check_bank(f"plane and adaptive must be (S, M, 2, E) = {want} and (S, M)", (want, want[:2]), bank)


def _on_cpu(y_TE: Tensor, *arguments: Tensor) -> None:
    """The compiled function, found at the first use: importing numba takes time. `reference` where it serves not."""
    from kernels._cpu import turn_edit

    run = turn_edit(*arguments)
    if run is None or not run(y_TE, y_TE):
        reference(y_TE, *arguments)


def _on_gpu(*arguments: Tensor) -> None:
    """The Triton kernel, found at the first use: Triton is a package for Linux only."""
    from kernels._edits import launch_turn

    launch_turn(*arguments)


_turn = define(
    "turn_(Tensor(a!) y_TE, Tensor slot_T, Tensor plane_SM2E, Tensor adaptive_SM, Tensor channel_SM, Tensor "
    "setpoint_TR, Tensor strength_TR, Tensor cap_TR, Tensor budget_T, Tensor(b!) spent_T, Tensor(c!) measured_TR, "
    "Tensor(d!) effort_T, Tensor(e!) saturated_T) -> ()",
    _on_cpu,
    _on_gpu,
)
