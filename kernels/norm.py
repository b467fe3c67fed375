"""A norm with the law before it: what a block does with the residual stream, in one launch in place of the norm's.

For a row y of width E, weight w, bias b and n(v) = v / √(mean(v²) + ε):

    y ← y + residual                                 optional, rounded to the dtype of y                  (1)
    y ← what `kernels.feedback_` leaves of it        optional: all its equations, rounded as there        (2)
    "rms"           o = round(n(y)) · w              Llama, Mistral, Mixtral, Qwen, Phi-3                  (3)
    "rms_wide"      o = n(y) · w                     OLMo-2
    "rms_plus_one"  o = n(y) · (1 + w)               Gemma
    "layer"         o = n(y − mean(y)) · w + b       GPT-2, GPT-NeoX

The forms of RMSNorm (arXiv 1910.07467, Eq. 4) differ in half precision by a rounding, in Gemma by what its weight
means: which one a module computes is found by measuring it, not by its name (`steering.runtime.norms`).

Arithmetic is in float32 (float64 where y is float64), o is rounded once more. Promised:

* y, and all that `feedback_` accounts, are what (1) and `feedback_` alone would leave;
* o depends on the row of y alone: not on other tokens, and not on whether a law was part of the launch. A token that
  is steered with strength 0 therefore has, bit for bit, the output of one that is not steered.

`reference` defines the operator. On a CPU numba compiles (3) to one pass a row, `kernels._norm_cpu`, and (2) is a call
of its own; on a GPU all is one launch, `kernels._norm`. Oracle: the formulas in float64, the modules of transformers.
Cost: T·E reads and writes, of which (2) adds none that the norm would not have made. There is no gradient.
Legend: T tokens · E width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from kernels import feedback
from kernels._library import define

Form = Literal["rms", "rms_wide", "rms_plus_one", "layer"]
FORMS: tuple[Form, ...] = get_args(Form)
"""The forms of (3), as they are told apart: the first that fits is taken where rounding makes no difference."""

LAW = 17
"""Arguments of `feedback_` behind y."""
READ = 13
"""Those of them that it only reads; the other four are what it accounts."""


def norm_(
    y_TE: Tensor,
    weight_E: Tensor,
    bias_E: Tensor | None,
    form: Form,
    eps: float,
    residual_TE: Tensor | None = None,
    law: Sequence[Tensor] = (),
) -> Tensor:
    """Equations (1) to (3): o (T, E), contiguous, in the dtype of y.

    y_TE         rows, last dimension contiguous, any row stride; mutated where there is a residual or a law
    weight_E     w, any dtype; bias_E the b of "layer", or None
    residual_TE  in the dtype of y, any row stride
    law          nothing, or the arguments of `feedback_` behind y in its order; x may be y, then it is y after (1)

    Raises ValueError when shapes, dtypes or the number of arguments disagree, or rows are not contiguous.
    """
    read, account = list(law[:READ]), list(law[READ:])
    normed: Tensor = _norm(y_TE, weight_E, bias_E, form, eps, residual_TE, read, account)
    return normed


def reference(
    y_TE: Tensor,
    weight_E: Tensor,
    bias_E: Tensor | None,
    form: Form,
    eps: float,
    residual_TE: Tensor | None,
    read: Sequence[Tensor],
    account: Sequence[Tensor],
) -> Tensor:
    """The operator in plain torch, on any device; read and account are the two parts of the law's arguments."""
    _before(feedback.reference, y_TE, weight_E, bias_E, form, residual_TE, read, account)
    return normed(y_TE, weight_E, bias_E, form, eps).contiguous()


def _before(
    law: Callable[..., None],
    y_TE: Tensor,
    weight_E: Tensor,
    bias_E: Tensor | None,
    form: Form,
    residual_TE: Tensor | None,
    read: Sequence[Tensor],
    account: Sequence[Tensor],
) -> None:
    """Equations (1) and (2), with this operator for the law, once the arguments are found to fit."""
    check(y_TE, weight_E, bias_E, form, residual_TE, (*read, *account))
    if residual_TE is not None:
        y_TE += residual_TE
    if read:
        law(y_TE, *read, *account)


def normed(y_TE: Tensor, weight_E: Tensor, bias_E: Tensor | None, form: Form, eps: float) -> Tensor:
    """Equation (3) in plain torch."""
    wide = torch.float64 if y_TE.dtype == torch.float64 else torch.float32
    n_TE, weight_E = y_TE.to(wide), weight_E.to(wide)
    if form == "layer":
        bias_E = None if bias_E is None else bias_E.to(wide)
        return functional.layer_norm(n_TE, weight_E.shape, weight_E, bias_E, eps).to(y_TE.dtype)
    n_TE = n_TE * torch.rsqrt(n_TE.pow(2).mean(-1, keepdim=True) + eps)
    if form == "rms":
        n_TE = n_TE.to(y_TE.dtype).to(wide)
    return (n_TE * (1.0 + weight_E if form == "rms_plus_one" else weight_E)).to(y_TE.dtype)


def bind_norm(weight_E: Tensor, bias_E: Tensor | None, form: Form, eps: float) -> Callable[[Tensor], Tensor]:
    """Equation (3) alone as a function of y (…, E) of whatever shape: what replaces the forward pass of a module.

    All but y is resolved here, once: on a CPU the operator's dispatch costs as much as the norm of a small batch. The
    result lies in memory as y does, where y has no gaps.
    Raises ValueError, here or at the call, where the operator would.
    """
    check(weight_E[None], weight_E, bias_E, form, None, ())
    if weight_E.device.type == "cpu":
        return _bound_on_cpu(weight_E, bias_E, form, eps)

    def apply(y: Tensor) -> Tensor:
        if not is_dense(y):
            y = y.contiguous()
        rows_TE = y.as_strided((y.numel() // y.shape[-1], y.shape[-1]), (y.shape[-1], 1))
        return norm_(rows_TE, weight_E, bias_E, form, eps).as_strided(y.shape, y.stride())

    return apply


def is_dense(y: Tensor) -> bool:
    """Whether the rows of y (…, E) lie side by side, in whatever order.

    Those of transposed heads do, and need not be moved to be normed one by one.
    """
    if y.is_contiguous():
        return True
    return y.stride(-1) == 1 and torch.empty_like(y, device="meta").stride() == y.stride()  # torch keeps dense strides


def check(
    y: Tensor, weight: Tensor, bias: Tensor | None, form: str, residual: Tensor | None, law: tuple[Tensor, ...]
) -> None:
    """Raise ValueError unless every tensor fits: a kernel would read past its end, and torch would broadcast."""
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if y.ndim != 2 or weight.shape != y.shape[1:] or (bias is not None and bias.shape != weight.shape):
        raise ValueError(
            f"y, weight and bias must be (T, E), (E,) and (E,), got {tuple(y.shape)}, {tuple(weight.shape)} and "
            f"{None if bias is None else tuple(bias.shape)}"
        )
    if bias is not None and form != "layer":
        raise ValueError(f"bias must be None: the form {form!r} has none")
    if residual is not None and (residual.shape != y.shape or residual.dtype != y.dtype):
        raise ValueError(
            f"residual must be as y, {tuple(y.shape)} {y.dtype}, got {tuple(residual.shape)} {residual.dtype}"
        )
    feedback.check_dense({"y_TE": y, "residual_TE": y if residual is None else residual})
    if len(law) not in (0, LAW):
        raise ValueError(f"law must be nothing or the {LAW} arguments of feedback_ behind y, got {len(law)}")


def _on_cpu(
    y_TE: Tensor,
    weight_E: Tensor,
    bias_E: Tensor | None,
    form: Form,
    eps: float,
    residual_TE: Tensor | None,
    read: Sequence[Tensor],
    account: Sequence[Tensor],
) -> Tensor:
    """The residual, the law's operator and the norm in turn: on a CPU a launch costs nothing that fusing would save."""
    _before(feedback.feedback_, y_TE, weight_E, bias_E, form, residual_TE, read, account)
    return _bound_on_cpu(weight_E, bias_E, form, eps)(y_TE).contiguous()


def _bound_on_cpu(weight_E: Tensor, bias_E: Tensor | None, form: Form, eps: float) -> Callable[[Tensor], Tensor]:
    """Equation (3), compiled where numba is."""
    from kernels._compile import jit

    if jit is None:
        return lambda y: normed(y, weight_E, bias_E, form, eps)
    from kernels import _norm_cpu

    return _norm_cpu.bind(weight_E, bias_E, form, eps)


def _on_gpu(*arguments: Any) -> Tensor:
    """The Triton kernels, found at the first use: Triton is a package for Linux only."""
    from kernels._norm import launch

    return launch(*arguments)


def _fake(y_TE: Tensor, *_: object) -> Tensor:
    return y_TE.new_empty(y_TE.shape)


_norm = define(
    "norm_(Tensor(a!) y_TE, Tensor weight_E, Tensor? bias_E, str form, float eps, Tensor? residual_TE, "
    "Tensor[] read, Tensor(b!)[] account) -> Tensor",
    _on_cpu,
    _on_gpu,
    _fake,
)
