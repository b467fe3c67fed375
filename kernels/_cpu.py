"""The compiled operators of a CPU, each bound to all its arguments but the rows.

What does not change between the calls of a step (bank, knobs, account) is checked and turned into a table of addresses
once; a bound call then takes 2 µs and its work. No bound call (None), or False from one, means that these tensors are
not for a compiled function: another dtype or device, rows that are not contiguous, no numba. The caller then takes the
reference. Imported by the first call on a CPU; `kernels._memory` says why addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kernels import feedback, mask, sparse, turn
from kernels._compile import jit

if jit is not None:
    from kernels import _edits_cpu, _feedback_cpu
    from kernels._memory import KINDS, table

Run = Callable[[Tensor, Tensor], bool]
"""(y, x) → whether it was done. Edits do not look at x."""


def law(*arguments: Tensor) -> Run | None:
    """`kernels.feedback_`, bound to its arguments after y and x. Raises ValueError where their shapes disagree."""
    if not _serves(arguments, whole=(0, 15), rows=(1, 2)):
        return None
    slot_T, probe_SRD, gain_SRE = arguments[:3]
    y_like, x_like = _like(slot_T, gain_SRE), _like(slot_T, probe_SRD)
    feedback.check_shapes(arguments[1:8], (y_like, x_like, slot_T, *arguments[8:]))
    (S, R, D), (T, E), places = probe_SRD.shape, y_like.shape, table(arguments)
    y_shape, x_shape = y_like.shape, x_like.shape

    def run(y_TE: Tensor, x_TD: Tensor) -> bool:
        y = _rows(y_TE, y_shape)
        x = y if x_TD is y_TE else _rows(x_TD, x_shape)
        if y is None or x is None or (x is y and D != E):
            return False
        if not _feedback_cpu.feedback(places, S, R, T, *y, E, *x, D):
            raise _astray(arguments, f"{S - 1}, a row of the bank")
        return True

    return run


def mask_edit(
    slot_T: Tensor, scale: Tensor, shift: Tensor, low: Tensor, high: Tensor, channel_SM: Tensor, strength_TR: Tensor,
    cap_TR: Tensor, budget_T: Tensor, spent_T: Tensor, measured_TR: Tensor, effort_T: Tensor, saturated_T: Tensor,
) -> Run | None:  # fmt: skip
    """`kernels.mask_`, bound to its arguments after y."""
    bank, totals = (scale, shift, low, high), (budget_T, spent_T, effort_T, saturated_T)
    common = (slot_T, channel_SM, strength_TR, cap_TR, budget_T, spent_T, measured_TR, effort_T, saturated_T)
    if not _serves((*common, *bank), whole=(0, 1, 8), rows=(9, 10, 11, 12)):
        return None
    y_like = _like(slot_T, scale)
    mask.check_shapes(y_like, slot_T, bank, channel_SM, totals, (strength_TR, cap_TR, measured_TR))
    return _edit(_edits_cpu.MASK, y_like.shape, 0, (*common, *bank))


def turn_edit(
    slot_T: Tensor, plane: Tensor, adaptive: Tensor, channel_SM: Tensor, setpoint_TR: Tensor, strength_TR: Tensor,
    cap_TR: Tensor, budget_T: Tensor, spent_T: Tensor, measured_TR: Tensor, effort_T: Tensor, saturated_T: Tensor,
) -> Run | None:  # fmt: skip
    """`kernels.turn_`, bound to its arguments after y."""
    bank, totals = (plane, adaptive), (budget_T, spent_T, effort_T, saturated_T)
    common = (slot_T, channel_SM, strength_TR, cap_TR, budget_T, spent_T, measured_TR, effort_T, saturated_T)
    if not _serves((*common, *bank, setpoint_TR), whole=(0, 1, 8), rows=(9,)):
        return None
    y_like = _like(slot_T, plane)
    turn.check_shapes(y_like, slot_T, bank, channel_SM, totals, (strength_TR, setpoint_TR, cap_TR, measured_TR))
    return _edit(_edits_cpu.TURN, y_like.shape, 0, (*common, *bank, setpoint_TR))


def sparse_edit(
    slot_T: Tensor, weight: Tensor, threshold: Tensor, count: Tensor, rest: Tensor, channel_SM: Tensor,
    strength_TR: Tensor, cap_TR: Tensor, budget_T: Tensor, spent_T: Tensor, measured_TR: Tensor, effort_T: Tensor,
    saturated_T: Tensor,
) -> Run | None:  # fmt: skip
    """`kernels.sparsify_`, bound to its arguments after y."""
    bank, totals = (weight, threshold, count, rest), (budget_T, spent_T, effort_T, saturated_T)
    common = (slot_T, channel_SM, strength_TR, cap_TR, budget_T, spent_T, measured_TR, effort_T, saturated_T)
    if not _serves((*common, *bank), whole=(0, 1, 8, 11), rows=(9, 12)):
        return None
    y_like = _like(slot_T, weight)
    sparse.check_shapes(y_like, slot_T, bank, channel_SM, totals, (strength_TR, cap_TR, measured_TR))
    return _edit(_edits_cpu.SPARSE, y_like.shape, rest.shape[2], (*common, *bank))


def _edit(form: int, shape: torch.Size, n_rest: int, arguments: tuple[Tensor, ...]) -> Run:
    """Edits of one form, bound to their arguments after y in the order of `kernels._edits_cpu`."""
    (T, E), (S, M), R, places = shape, arguments[1].shape, arguments[2].shape[1], table(arguments)

    def run(y_TE: Tensor, _: Tensor) -> bool:
        y = _rows(y_TE, shape)
        if y is None:
            return False
        if not _edits_cpu.edit(form, places, S, M, n_rest, R, T, *y, E):
            raise _astray(arguments, f"{S - 1}, a row of the bank, and a channel at most {R - 1}")
        return True

    return run


def _serves(tensors: tuple[Tensor, ...], whole: tuple[int, ...], rows: tuple[int, ...]) -> bool:
    """Whether a compiled function takes these: float32, but int32 at `whole`; at `rows` the last dimension dense."""
    if jit is None:
        return False
    dtypes = [torch.int32 if place in whole else torch.float32 for place in range(len(tensors))]
    return (
        [each.dtype for each in tensors] == dtypes
        and all(each.is_cpu for each in tensors)
        and all(tensors[place].stride(-1) == 1 for place in rows)
    )


def _like(slot_T: Tensor, bank: Tensor) -> Tensor:
    """Rows without memory, one a token and as wide as the bank's."""
    return torch.empty(slot_T.shape[0], bank.shape[-1], device="meta")


def _rows(rows_TD: Tensor, shape: torch.Size) -> tuple[int, int, int] | None:
    """Address, stride in bytes and kind of rows; None if they are not for a compiled function."""
    if rows_TD.shape != shape:
        return None
    if rows_TD.dtype is torch.float32 and rows_TD.is_contiguous() and rows_TD.is_cpu:
        return rows_TD.data_ptr(), 4 * shape[1], 0
    kind, (stride, step) = KINDS.get(rows_TD.dtype), rows_TD.stride()
    if kind is None or step != 1 or not rows_TD.is_cpu:
        return None
    return rows_TD.data_ptr(), stride * (2 if kind else 4), kind


def _astray(arguments: tuple[Tensor, ...], most: str) -> IndexError:
    """Takes all arguments so that a bound call keeps what its table points to alive."""
    return IndexError(f"a slot must be 0 to {most}, got slots {sorted(set(arguments[0].tolist()))}")


BOUND: Mapping[Callable[..., None], Callable[..., Run | None]] = {
    feedback.feedback_: law,
    mask.mask_: mask_edit,
    turn.turn_: turn_edit,
    sparse.sparsify_: sparse_edit,
}
