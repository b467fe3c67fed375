"""The Triton kernels of `norm_` against the formula and against their own promises.

`test_norm.py` runs this file in Triton's interpreter, in a process of its own. On a machine with a GPU it runs the
compiled kernels: `python -m pytest tests/kernels/triton_norm.py`.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from kernels import norm_
from kernels.norm import FORMS, READ, Form
from tests.kernels.cases import DTYPES, Batch, assert_same, batch, clone, same_bits, tokens
from tests.kernels.cases import assert_agrees as assert_law_agrees
from tests.kernels.norm_cases import EPS, assert_agrees, case, law_of, reading_itself, weights
from tests.tolerances import KERNELS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from kernels._launch import launch as launch_law  # noqa: E402
from kernels._norm import launch  # noqa: E402

STORED = KERNELS["stored_interpreted" if INTERPRETED else "stored"]
DEVICE = "cpu" if INTERPRETED else "cuda"


def on_device(args: Batch) -> Batch:
    """The batch on the device, with its strides; x stays y where it is."""
    moved = {
        name: torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=DEVICE).copy_(v)
        for name, v in args.items()
    }
    if args["x_TD"] is args["y_TE"]:
        moved["x_TD"] = moved["y_TE"]
    return moved


def run(args: Batch, form: Form, with_law: bool = False, residual_TE: Tensor | None = None) -> tuple[Tensor, Batch]:
    """The norm's output, and the batch that the launch left; weights in the dtype of y."""
    moved = on_device(args)
    y_TE = moved["y_TE"]
    weight_E, bias_E = (None if w is None else w.to(DEVICE) for w in weights(form, y_TE.shape[1], y_TE.dtype))
    assert weight_E is not None
    law = law_of(moved) if with_law else []
    residual_TE = None if residual_TE is None else residual_TE.to(DEVICE)
    common = (y_TE, weight_E, bias_E, form, EPS[form], residual_TE)
    out = launch(*common, law[:READ], law[READ:]) if INTERPRETED else norm_(*common, law)
    return out.cpu(), {name: value.cpu() for name, value in moved.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (2, 192), (1, 2304)])
def test_equals_the_formula(shape: tuple[int, int], dtype: torch.dtype, form: Form) -> None:
    args = case(*shape, dtype)
    out, left = run(args, form)
    kind = str(dtype).removeprefix("torch.")
    assert_agrees(out, args["y_TE"], *weights(form, shape[1], dtype), form, STORED[kind], KERNELS["float32"])
    assert_same(left, args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize("adds", [True, False])
def test_one_launch_does_what_three_do(adds: bool, itself: bool, dtype: torch.dtype) -> None:
    args = batch(4, 48, 2, dtype=dtype, knees=True)
    residual_TE = batch(4, 48, 2, dtype=dtype, seed=1)["y_TE"] if adds else None
    if itself:
        args = reading_itself(args)
    out, left = run(args, "rms", with_law=True, residual_TE=residual_TE)
    apart = on_device(args)
    if residual_TE is not None:
        total_TE = apart["y_TE"] + residual_TE.to(DEVICE)
        if INTERPRETED:  # which truncates
            total_TE = run(args, "rms", residual_TE=residual_TE)[1]["y_TE"]
        apart["y_TE"].copy_(total_TE)
    launch_law(*apart.values())
    apart = {name: value.cpu() for name, value in apart.items()}
    assert_same(left, apart)
    assert same_bits(out, run(apart, "rms")[0])
    if not adds and not itself:
        kind = str(dtype).removeprefix("torch.")
        assert_law_agrees(args, left, STORED[kind], KERNELS["float32"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("slot", [0, 3])
def test_strength_zero_changes_no_bit_of_the_output(slot: int, form: Form) -> None:
    args = case(2, 48, torch.float32)
    args["slot_T"][:] = slot
    args["strength_TR"][:] = 0
    want, _ = run(args, form)
    out, left = run(args, form, with_law=True)
    assert same_bits(out, want)
    assert same_bits(left["y_TE"], args["y_TE"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_token_alone_equals_token_in_a_batch(dtype: torch.dtype) -> None:
    args = case(3, 192, dtype, R=2)
    out, whole = run(args, "layer", with_law=True)
    for t in range(3):
        alone, left = run(tokens(args, t, t + 1), "layer", with_law=True)
        assert same_bits(alone, out[t : t + 1])
        assert_same(left, tokens(whole, t, t + 1))


def test_law_may_read_rows_of_another_width() -> None:
    args = batch(3, 300, 3, E=40)
    out, left = run(args, "rms", with_law=True)
    assert_law_agrees(args, left, STORED["float32"], KERNELS["float32"])
    assert same_bits(out, run(left, "rms")[0])


def test_double_goes_to_the_reference() -> None:
    args = case(4, 24, torch.float64)
    want = clone(args)
    weight_E, _ = weights("rms", 24, torch.float64)
    expected = norm_(want["y_TE"], weight_E, None, "rms", EPS["rms"], None, law_of(want))
    out, left = run(args, "rms", with_law=True)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(left["y_TE"], want["y_TE"], rtol=1e-12, atol=1e-12)


def test_rows_that_are_not_contiguous_are_refused() -> None:
    args = batch(4, 24, 2, slots="all")
    args["x_TD"] = args["x_TD"].mT.contiguous().mT
    with pytest.raises(ValueError, match="x_TD: rows must be contiguous"):
        run(args, "rms", with_law=True)
