"""What the edits of one site share: which tokens they act on, how far they may move y, and what is counted.

For a token t with program s = slot_t ≠ 0 and edits m = 0 … M−1 in turn, each of channel j = channel_sm (−1: padding,
which is not read), with a = strength_tj and ‖y‖ floored at the smallest normal float32,

    d, z, f = F_m(y, a)                                         z is measured, whatever a is              (1)
    b = min(cap_tj, max(budget_t − spent_t, 0))                                                           (2)
    u = f d,   ρ = |f| ‖d‖ / ‖y‖;   if ρ > b:  |f| ← b ‖y‖ / ‖d‖,  ρ ← b                                   (3)
    y ← y + u,   spent ← spent + ρ,   effort ← effort + ρ       skipped where a = 0                       (4)

Here d is the whole step to F(y) and f = a (`kernels.mask`, `kernels.sparse`), or d the step that a makes and f = 1
(`kernels.turn`). The bound is applied to f, so that an immense strength under a cap is finite.

Arithmetic is in float32 (float64 where y is float64), y is rounded once, after its last edit. Promised:

* a token of slot 0 or of strengths 0 keeps y and spent bit for bit, as does a coordinate with u_i = 0;
* a token's result does not depend on which other tokens are in the batch;
* overflow stays visible: ρ is inf or NaN where y, d or u is not finite or too long for its square.

Legend: T tokens · A tokens with a program · S program slots · M edits of a route · E width · R knob channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.feedback import CHUNK, TINY

MOST = 1.8e19
"""A longer step is reported as infinite: its square is no float32, so what reads y next would not see its size."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The tokens of a batch that have a program, and the rows of bank and knobs that they use."""

    rows_A: Tensor | None
    """Their indices; None where they are all of the batch."""
    slot: int | Tensor
    """Their program where they share one, so that its bank rows broadcast and are not copied; else (A,) int64."""

    def take(self, values: Tensor) -> Tensor:
        """The rows (A, …) of per-token values (T, …)."""
        return values if self.rows_A is None else values.index_select(0, self.rows_A)

    def put(self, values: Tensor, new: Tensor) -> None:
        """Write rows (A, …) back to per-token values (T, …)."""
        new = new.to(values.dtype)
        values.copy_(new) if self.rows_A is None else values.index_copy_(0, self.rows_A, new)

    def bank(self, values: Tensor, m: int) -> Tensor:
        """Edit m's part of bank values (S, M, …): (…) where the program is shared, else (A, …)."""
        each = values[:, m]
        return each[self.slot] if isinstance(self.slot, int) else each.index_select(0, self.slot)

    def columns(self, channel_SM: Tensor) -> Iterator[tuple[int, Column]]:
        """The edits that one of the tokens has, each with the channel that it follows."""
        if isinstance(self.slot, int):
            yield from ((m, Column(j, None)) for m, j in enumerate(channel_SM[self.slot].tolist()) if j >= 0)
            return
        channel_AM = channel_SM.index_select(0, self.slot).long()
        there_AM = channel_AM >= 0
        some, every = there_AM.any(0).tolist(), there_AM.all(0).tolist()
        for m in range(len(some)):
            if some[m]:
                yield m, Column(channel_AM[:, m, None].clamp_min(0), None if every[m] else there_AM[:, m, None])


@dataclass(frozen=True, slots=True)
class Column:
    """The knobs of one edit: for every chosen token a column of (…, R) values."""

    at: int | Tensor
    """One for all of them, or (A, 1) int64."""
    there_A1: Tensor | None
    """Which of them have the edit; None where all do."""

    def read(self, values_AR: Tensor) -> Tensor:
        """Its values (A, 1)."""
        return values_AR[:, self.at, None] if isinstance(self.at, int) else values_AR.gather(1, self.at)

    def write(self, chosen: Chosen, values_TR: Tensor, new_A1: Tensor) -> None:
        """Replace its values for the tokens that have it."""
        new_A1 = new_A1.to(values_TR.dtype)
        if isinstance(self.at, int):
            chosen.put(values_TR[:, self.at], new_A1.squeeze(1))
        elif chosen.rows_A is None and self.there_A1 is None:
            values_TR.scatter_(1, self.at, new_A1)
        else:
            rows_A = torch.arange(len(new_A1), device=new_A1.device) if chosen.rows_A is None else chosen.rows_A
            there_A = slice(None) if self.there_A1 is None else self.there_A1.squeeze(1)
            values_TR.index_put_((rows_A[there_A], self.at.squeeze(1)[there_A]), new_A1.squeeze(1)[there_A])


Form = Callable[[Chosen, int, Tensor, tuple[Tensor, ...]], tuple[Tensor, Tensor, Tensor]]
"""(chosen, m, y_AE, asked) → step d (A, E), measured z (A, 1), factor f (A, 1); asked are knobs (A, 1), strength first.
Rows that do not have edit m get a result too, which is not used."""


def edit_rows(
    form: Form,
    work: int,
    y_TE: Tensor,
    slot_T: Tensor,
    channel_SM: Tensor,
    asked_TR: tuple[Tensor, ...],
    cap_TR: Tensor,
    budget_T: Tensor,
    spent_T: Tensor,
    measured_TR: Tensor,
    effort_T: Tensor,
    saturated_T: Tensor,
) -> None:
    """Equations (1) to (4) in plain torch for every token.

    `work`: elements of the form's largest temporary, a token. `asked_TR`: the knobs that the form reads.
    Products are formed elementwise and summed over one dimension, as in `kernels.feedback.reference`, for the same
    reason.
    """
    stride = max(1, CHUNK // max(work, 1))
    for start in range(0, slot_T.shape[0], stride):
        part = slice(start, start + stride)
        _edit(
            form,
            y_TE[part],
            slot_T[part],
            channel_SM,
            tuple(each[part] for each in asked_TR),
            *(each[part] for each in (cap_TR, budget_T, spent_T, measured_TR, effort_T, saturated_T)),
        )


def _edit(
    form: Form,
    y_TE: Tensor,
    slot_T: Tensor,
    channel_SM: Tensor,
    asked_TR: tuple[Tensor, ...],
    cap_TR: Tensor,
    budget_T: Tensor,
    spent_T: Tensor,
    measured_TR: Tensor,
    effort_T: Tensor,
    saturated_T: Tensor,
) -> None:
    """Equations (1) to (4) for as many tokens as fit the cache."""
    slots = slot_T.tolist()
    if not any(slots):
        return
    rows_A = slot_T.nonzero().squeeze(1) if 0 in slots else None
    programs = set(slots) - {0}
    slot = programs.pop() if len(programs) == 1 else (slot_T if rows_A is None else slot_T[rows_A]).long()
    chosen = Chosen(rows_A, slot)
    wide = torch.float64 if y_TE.dtype == torch.float64 else torch.float32

    y_AE = before_AE = chosen.take(y_TE).to(wide)
    asked_AR, cap_AR = [chosen.take(each) for each in asked_TR], chosen.take(cap_TR)
    budget_A1, spent_A1, effort_A1 = (chosen.take(each).to(wide)[:, None] for each in (budget_T, spent_T, effort_T))
    hits_A1: list[Tensor] = []

    for m, column in chosen.columns(channel_SM):
        asked = tuple(column.read(each).to(wide) for each in asked_AR)
        d_AE, z_A1, f_A1 = form(chosen, m, y_AE, asked)
        column.write(chosen, measured_TR, z_A1)

        acts_A1 = asked[0] != 0
        if column.there_A1 is not None:
            acts_A1 &= column.there_A1
        bound_A1 = column.read(cap_AR).minimum((budget_A1 - spent_A1).clamp_min_(0))
        share_A1, rho_A1, over_A1 = bounded(_norm(d_AE), _norm(y_AE).clamp_min_(TINY), f_A1, bound_A1)
        u_AE = d_AE.mul_(share_A1)
        # Selected, not added: −0 + 0 is 0, and padding may hold anything.
        y_AE = torch.where((u_AE != 0).logical_and_(acts_A1), y_AE + u_AE, y_AE)
        rho_A1 = rho_A1.where(acts_A1, 0.0)
        spent_A1, effort_A1 = spent_A1 + rho_A1, effort_A1 + rho_A1
        if over_A1 is not None:
            hits_A1.append(over_A1 & acts_A1)

    if y_AE is before_AE:
        return
    if y_TE.dtype != wide:  # rounding would rewrite the NaN of a row that stays
        stays_AE = y_AE.view(torch.int32) == before_AE.view(torch.int32)
        y_AE = chosen.take(y_TE).where(stays_AE, y_AE.to(y_TE.dtype))
    chosen.put(y_TE, y_AE)
    chosen.put(spent_T, spent_A1.squeeze(1))
    chosen.put(effort_T, effort_A1.squeeze(1))
    for hit_A1 in hits_A1:
        chosen.put(saturated_T, chosen.take(saturated_T) | hit_A1.squeeze(1))


def bounded(step_A1: Tensor, size_A1: Tensor, f_A1: Tensor, bound_A1: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Equation (3) from ‖d‖, ‖y‖, f and b: the f that is allowed, its ρ, and where the bound bit (None: nowhere)."""
    moved_A1, allowed_A1 = f_A1.abs().mul_(step_A1), bound_A1 * size_A1
    over_A1 = moved_A1 > allowed_A1
    rho_A1 = moved_A1 / size_A1
    if (bites := bool(over_A1.any())) or not (moved_A1 + size_A1).amax() <= MOST:  # else all that follows is idle
        over_A1 &= step_A1 < math.inf
        rho_A1 = torch.where(moved_A1 > MOST, math.inf, rho_A1)
        rho_A1 = torch.where(over_A1, bound_A1.to(rho_A1.dtype), rho_A1).where(size_A1 < math.inf, math.nan)
        f_A1 = torch.where(over_A1, torch.copysign(allowed_A1 / step_A1, f_A1), f_A1)
    return f_A1, rho_A1, over_A1 if bites else None


def _norm(rows_AE: Tensor) -> Tensor:
    """‖row‖ (A, 1). Squares in the working precision: an overflow must be seen."""
    return torch.linalg.vector_norm(rows_AE, dim=-1, keepdim=True)


def check_tokens(channel: Tensor, tokens: tuple[Tensor, ...], knobs: tuple[Tensor, ...]) -> None:
    """Raise ValueError unless the arguments that all edits have fit: a kernel would read past the end, torch broadcast.

    tokens: y, slot, budget, spent, effort, saturated. knobs: (T, R) each, measured among them.
    """
    y, slot, *totals = (each.shape for each in tokens)
    if len(y) != 2 or y[0] != slot[0] or any(each != slot for each in totals):
        raise ValueError(
            "y, slot, budget, spent, effort and saturated must have one row a token, got "
            f"{', '.join(str(tuple(each.shape)) for each in tokens)}"
        )
    if len({each.shape for each in knobs}) != 1 or knobs[0].ndim != 2 or knobs[0].shape[0] != slot[0]:
        raise ValueError(
            f"the knobs and measured must be (T, R) with T = {slot[0]}, alike, got "
            f"{', '.join(str(tuple(each.shape)) for each in knobs)}"
        )
    if channel.ndim != 2:
        raise ValueError(f"channel must be (S, M), got {tuple(channel.shape)}")


def check_bank(expected: str, want: tuple[tuple[int, ...], ...], bank: tuple[Tensor, ...]) -> None:
    """Raise ValueError unless the tensors of the bank have the wanted shapes."""
    if any(tuple(each.shape) != shape for each, shape in zip(bank, want, strict=True)):
        raise ValueError(f"{expected}, got {', '.join(str(tuple(each.shape)) for each in bank)}")
