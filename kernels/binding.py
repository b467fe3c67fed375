"""An operator with all its arguments but the rows: what a layer's launch is, resolved once for a step and its like.

A step launches the same operator at every layer and the next step does it again, with the same bank, knobs and account
and other rows. On a CPU finding out about the 16 tensors that stay costs more than the law of a small batch, so it is
done here, once. The values of the tensors may change afterwards; their shapes, dtypes and places may not.
Oracle: the operator itself, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.feedback import feedback_
from kernels.mask import mask_
from kernels.sparse import sparsify_
from kernels.turn import turn_

Bound = Callable[[Tensor, Tensor], None]
"""(y_TE, x_TD) → None; y is mutated. Edits do not look at x."""


def bind(operator: Callable[..., None], *arguments: Tensor) -> Bound:
    """`operator`, one of `feedback_`, `mask_`, `turn_` and `sparsify_`, bound to its arguments after the rows.

    Raises ValueError, here or at the call, where the operator would.
    """
    reads = operator is feedback_

    def call(y_TE: Tensor, x_TD: Tensor) -> None:
        rows = (y_TE, x_TD) if reads else (y_TE,)
        operator(*rows, *arguments)

    if not arguments[0].is_cpu:
        return call
    from kernels._cpu import BOUND

    run = BOUND[operator](*arguments)
    if run is None:
        return call

    def call_compiled(y_TE: Tensor, x_TD: Tensor) -> None:
        if not run(y_TE, x_TD):
            call(y_TE, x_TD)

    return call_compiled


def warm() -> None:
    """Compile what a CPU's bound calls need, or load it: seconds the first time on a machine, else a fraction of one.

    For the start of an engine, so that no request waits for it. Does nothing where numba is missing.
    """
    slot_T, one_T, one_TR = torch.zeros(1, dtype=torch.int32), torch.zeros(1), torch.zeros(1, 1)
    whole_SM, row_SRD, row_SMKE = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1, 1), torch.zeros(1, 1, 2, 1)
    account = (one_TR, one_T, one_T, one_TR, one_T, slot_T)  # of a token without a program, which nothing happens to
    for bound in (
        bind(feedback_, slot_T, row_SRD, row_SRD, *(one_TR,) * 5, one_TR, one_TR, *account),
        bind(mask_, slot_T, *(row_SRD,) * 4, whole_SM, one_TR, *account),
        bind(turn_, slot_T, row_SMKE, one_TR, whole_SM, one_TR, one_TR, *account),
        bind(sparsify_, slot_T, row_SRD, one_TR, whole_SM, row_SMKE, whole_SM, one_TR, *account),
    ):
        bound(torch.zeros(1, 1), torch.zeros(1, 1))
