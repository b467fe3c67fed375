"""Keeps the coordinates of a site that score highest, each token by its own program.

    score_i = |y_i| w_i                                                                                     (1)
    k_i = 1 where score_i > threshold (count = 0), or score_i ≥ the count-th largest score                  (2)
    d = Rᵀ R ((1 − k) ⊙ y) − (1 − k) ⊙ y,   z = the share of coordinates with k_i = 0,   f = a              (3)

and y ← y + f d under the bounds of `kernels._bound`, whose promises hold. Ties are kept; count ≥ E keeps everything.
With K = 0 rows of R, a = 1 and no bound, what is not kept becomes exactly 0, and `kernels.sparse_linear` need not read
its columns. w = 1 is TEAL (arXiv:2408.14690), the norms of the next map's columns WINA (arXiv:2505.19427), R the
low-rank rest of R-Sparse (arXiv:2504.19449).

Cost: two rows read and one written a token and edit, K more of R twice; the count-th largest score costs 31 passes over
registers on a GPU, a dozen over the row on a CPU. `reference` defines the operator; compiled for a CPU it is in
`kernels._edits_cpu`, the Triton kernel is in `kernels._edits`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._bound import Chosen, check_bank, check_tokens, edit_rows
from kernels._library import define


def sparsify_(
    y_TE: Tensor,
    slot_T: Tensor,
    weight_SME: Tensor,
    threshold_SM: Tensor,
    count_SM: Tensor,
    rest_SMKE: Tensor,
    channel_SM: Tensor,
    strength_TR: Tensor,
    cap_TR: Tensor,
    budget_T: Tensor,
    spent_T: Tensor,
    measured_TR: Tensor,
    effort_T: Tensor,
    saturated_T: Tensor,
) -> None:
    """Equations (1) to (3) for every token of a batch, in one launch.

    y_TE         mutated: rows at the site, last dimension contiguous, any row stride
    slot_T       int32 row of the bank; 0 means no program, and no output of that token is touched
    weight_SME   w ≥ 0, threshold_SM: the bank, float32; count_SM int32, 0 where the threshold decides
    rest_SMKE    R float32, orthonormal rows or rows of 0; K may be 0
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
    _sparsify(
        y_TE,
        slot_T,
        weight_SME,
        threshold_SM,
        count_SM,
        rest_SMKE,
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
    weight_SME: Tensor,
    threshold_SM: Tensor,
    count_SM: Tensor,
    rest_SMKE: Tensor,
    channel_SM: Tensor,
    strength_TR: Tensor,
    cap_TR: Tensor,
    budget_T: Tensor,
    spent_T: Tensor,
    measured_TR: Tensor,
    effort_T: Tensor,
    saturated_T: Tensor,
) -> None:
    """The operator in plain torch, on any device; arguments as `sparsify_`."""
    if not any(slot_T.tolist()):
        return
    totals = (budget_T, spent_T, effort_T, saturated_T)
    bank = (weight_SME, threshold_SM, count_SM, rest_SMKE)
    check_shapes(y_TE, slot_T, bank, channel_SM, totals, (strength_TR, cap_TR, measured_TR))

    def step(chosen: Chosen, m: int, y_AE: Tensor, asked: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        weight, rest = (chosen.bank(each, m).to(y_AE.dtype) for each in (weight_SME, rest_SMKE))
        threshold, count = (chosen.bank(each, m).unsqueeze(-1) for each in (threshold_SM, count_SM))
        kept_AE = _kept((y_AE * weight).abs_(), threshold, count)
        lost_AE = y_AE.masked_fill(kept_AE, 0.0)
        d_AE = lost_AE.neg()
        if rest.shape[-2]:
            part_AK = (lost_AE.unsqueeze(1) * rest).sum(-1)
            d_AE += (part_AK.unsqueeze(2) * rest).sum(1)
        return d_AE, (~kept_AE).sum(-1, keepdim=True, dtype=y_AE.dtype) / y_AE.shape[1], asked[0]

    edit_rows(
        step, y_TE.shape[1] * max(1, rest_SMKE.shape[2]), y_TE, slot_T, channel_SM, (strength_TR,), cap_TR, budget_T,
        spent_T, measured_TR, effort_T, saturated_T,
    )  # fmt: skip


def _kept(score_AE: Tensor, threshold: Tensor, count: Tensor) -> Tensor:
    """Equation (2), boolean (A, E). threshold and count (1,) or (A, 1)."""
    kept_AE = score_AE > threshold
    most = min(int(count.max()), score_AE.shape[1])
    if most <= 0:
        return kept_AE
    place_A1 = (count.clamp(1, most) - 1).long().expand(len(score_AE), 1)
    least_A1 = score_AE.topk(most, dim=-1).values.gather(1, place_A1)
    return torch.where(count > 0, score_AE >= least_A1, kept_AE)


def check_shapes(
    y: Tensor,
    slot: Tensor,
    bank: tuple[Tensor, ...],
    channel: Tensor,
    totals: tuple[Tensor, ...],
    knobs: tuple[Tensor, ...],
) -> None:
    """Raise ValueError unless every tensor fits. bank: weight, threshold, count, rest."""
    check_tokens(channel, (y, slot, *totals), knobs)
    flat, width = tuple(channel.shape), y.shape[1]
    check_bank(
        f"weight, threshold, count and rest must be (S, M, E), (S, M), (S, M) and (S, M, K, E) with S, M, E = "
        f"{(*flat, width)}",
        ((*flat, width), flat, flat, (*flat, *bank[3].shape[2:3], width)),
        bank,
    )


def _on_cpu(y_TE: Tensor, *arguments: Tensor) -> None:
    """The compiled function, found at the first use: importing numba takes time. `reference` where it serves not."""
    from kernels._cpu import sparse_edit

    run = sparse_edit(*arguments)
    if run is None or not run(y_TE, y_TE):
        reference(y_TE, *arguments)


def _on_gpu(*arguments: Tensor) -> None:
    """The Triton kernel, found at the first use: Triton is a package for Linux only."""
    from kernels._edits import launch_sparsify

    launch_sparsify(*arguments)


_sparsify = define(
    "sparsify_(Tensor(a!) y_TE, Tensor slot_T, Tensor weight_SME, Tensor threshold_SM, Tensor count_SM, Tensor "
    "rest_SMKE, Tensor channel_SM, Tensor strength_TR, Tensor cap_TR, Tensor budget_T, Tensor(b!) spent_T, "
    "Tensor(c!) measured_TR, Tensor(d!) effort_T, Tensor(e!) saturated_T) -> ()",
    _on_cpu,
    _on_gpu,
)
