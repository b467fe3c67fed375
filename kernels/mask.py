"""Scales and shifts single coordinates of a site where they lie between two bounds, each token by its own program.

    d_i = s_i y_i + b_i − y_i   where low_i ≤ y_i ≤ high_i and (s_i, b_i) ≠ (1, 0),  else 0
    z   = the share of coordinates where that holds,   f = a

and y ← y + f d under the bounds of `kernels._bound`, whose promises hold. The step is computed as (s_i − 1) y_i + b_i,
so that s = b = 0 and a = 1 leave exactly 0. Dropped neurons and heads (s = b = 0), layers left out, and transport of
coordinates inside their support (Linear-AcT, arXiv:2410.23054) are masks.

Cost: five rows read and one written a token and edit; compare `y.mul_(s)`. `reference` defines the operator; compiled
for a CPU it is in `kernels._edits_cpu`, the Triton kernel is in `kernels._edits`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._bound import Chosen, check_bank, check_tokens, edit_rows
from kernels._library import define


def mask_(
    y_TE: Tensor,
    slot_T: Tensor,
    scale_SME: Tensor,
    shift_SME: Tensor,
    low_SME: Tensor,
    high_SME: Tensor,
    channel_SM: Tensor,
    strength_TR: Tensor,
    cap_TR: Tensor,
    budget_T: Tensor,
    spent_T: Tensor,
    measured_TR: Tensor,
    effort_T: Tensor,
    saturated_T: Tensor,
) -> None:
    """Masks of every token of a batch, in one launch.

    y_TE         mutated: rows at the site, last dimension contiguous, any row stride
    slot_T       int32 row of the bank; 0 means no program, and no output of that token is touched
    scale_SME    s, shift_SME b, low_SME, high_SME: the bank, float32; low −inf and high +inf where there is no bound
    channel_SM   int32 knob channel of each edit, −1 where a program has fewer than M: none of that edit is read
    strength_TR  a, cap_TR ≥ 0 (+inf: none): float32 knobs, any strides
    budget_T     float32 ≥ 0, what ρ may sum to over the layers, +inf where there is none
    spent_T      mutated float32: that sum so far
    measured_TR  mutated float32, any strides: z, in the edit's channel
    effort_T     mutated float32: ρ is added
    saturated_T  mutated int32: set to 1 where a cap or the budget bit

    Raises ValueError when the shapes disagree, or, on a GPU, when rows of y or of the bank are not contiguous.
    A slot beyond the bank, or a channel beyond the knobs, raises IndexError on a CPU; on a GPU that would cost a wait.
    """
    _mask(
        y_TE,
        slot_T,
        scale_SME,
        shift_SME,
        low_SME,
        high_SME,
        channel_SM,
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
    scale_SME: Tensor,
    shift_SME: Tensor,
    low_SME: Tensor,
    high_SME: Tensor,
    channel_SM: Tensor,
    strength_TR: Tensor,
    cap_TR: Tensor,
    budget_T: Tensor,
    spent_T: Tensor,
    measured_TR: Tensor,
    effort_T: Tensor,
    saturated_T: Tensor,
) -> None:
    """The operator in plain torch, on any device; arguments as `mask_`."""
    if not any(slot_T.tolist()):
        return
    totals = (budget_T, spent_T, effort_T, saturated_T)
    bank = (scale_SME, shift_SME, low_SME, high_SME)
    check_shapes(y_TE, slot_T, bank, channel_SM, totals, (strength_TR, cap_TR, measured_TR))

    def step(chosen: Chosen, m: int, y_AE: Tensor, asked: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        scale, shift, low, high = (chosen.bank(each, m).to(y_AE.dtype) for each in bank)
        acts_AE = (y_AE >= low) & (y_AE <= high) & ((scale != 1) | (shift != 0))
        d_AE = torch.where(acts_AE, (scale - 1) * y_AE + shift, 0.0)
        return d_AE, acts_AE.sum(-1, keepdim=True, dtype=y_AE.dtype) / y_AE.shape[1], asked[0]

    edit_rows(
        step, y_TE.shape[1], y_TE, slot_T, channel_SM, (strength_TR,), cap_TR, budget_T, spent_T, measured_TR, effort_T,
        saturated_T,
    )  # fmt: skip


def check_shapes(
    y: Tensor,
    slot: Tensor,
    bank: tuple[Tensor, ...],
    channel: Tensor,
    totals: tuple[Tensor, ...],
    knobs: tuple[Tensor, ...],
) -> None:
    """Raise ValueError unless every tensor fits. bank: scale, shift, low, high."""
    check_tokens(channel, (y, slot, *totals), knobs)
    want = (*channel.shape, y.shape[1])
    check_bank(f"scale, shift, low and high must be (S, M, E) = {want}", (want,) * 4, bank)


def _on_cpu(y_TE: Tensor, *arguments: Tensor) -> None:
    """The compiled function, found at the first use: importing numba takes time. `reference` where it serves not."""
    from kernels._cpu import mask_edit

    run = mask_edit(*arguments)
    if run is None or not run(y_TE, y_TE):
        reference(y_TE, *arguments)


def _on_gpu(*arguments: Tensor) -> None:
    """The Triton kernel, found at the first use: Triton is a package for Linux only."""
    from kernels._edits import launch_mask

    launch_mask(*arguments)


_mask = define(
    "mask_(Tensor(a!) y_TE, Tensor slot_T, Tensor scale_SME, Tensor shift_SME, Tensor low_SME, Tensor high_SME, "
    "Tensor channel_SM, Tensor strength_TR, Tensor cap_TR, Tensor budget_T, Tensor(b!) spent_T, Tensor(c!) "
    "measured_TR, Tensor(d!) effort_T, Tensor(e!) saturated_T) -> ()",
    _on_cpu,
    _on_gpu,
)
