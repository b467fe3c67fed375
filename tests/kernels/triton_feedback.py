"""The Triton kernel against the oracle and against its own promises.

`test_feedback.py` runs this file in Triton's interpreter, in a process of its own. On a machine with a GPU it runs the
compiled kernel: `python -m pytest tests/kernels/triton_feedback.py`.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from kernels import feedback_
from tests.kernels.cases import DTYPES, INF, MUTATED, assert_agrees, assert_same, batch, clone, same_bits, tokens
from tests.tolerances import KERNELS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from kernels._launch import launch  # noqa: E402

STORED = KERNELS["stored_interpreted" if INTERPRETED else "stored"]


def run(args: dict[str, Tensor]) -> dict[str, Tensor]:
    if INTERPRETED:
        out = clone(args)
        launch(*out.values())
        return out
    moved = {
        name: torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="cuda").copy_(v)
        for name, v in args.items()
    }
    feedback_(*moved.values())
    return {name: value.cpu() for name, value in moved.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("T", "D", "E", "R"),
    [
        (1, 8, 8, 1),
        (5, 192, 192, 1),
        (33, 192, 64, 2),
        (3, 100, 300, 3),
        (2, 2304, 2304, 8),
        (9, 8, 2304, 5),
        (3, 40, 24, 24),
    ],
)
def test_equals_the_loop_over_tokens_and_channels(T: int, D: int, E: int, R: int, dtype: torch.dtype) -> None:
    args = batch(T, D, R, E=E, dtype=dtype, slots="all" if T < 3 else "mixed", knees=True)
    assert_agrees(args, run(args), STORED[str(dtype).removeprefix("torch.")], KERNELS["float32"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_alone_equals_token_in_a_batch(dtype: torch.dtype) -> None:
    args = batch(9, 192, 3, dtype=dtype)
    whole = run(args)
    for t in range(9):
        assert_same(run(tokens(args, t, t + 1)), tokens(whole, t, t + 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_without_a_program_keeps_every_bit(dtype: torch.dtype) -> None:
    args = batch(16, 40, 2, dtype=dtype)
    out_of_use = args["slot_T"] == 0
    assert 0 < out_of_use.sum() < 16
    for name in MUTATED:
        args[name][out_of_use] = -7 if name == "saturated_T" else torch.nan
    got = run(args)
    for name in MUTATED:
        assert same_bits(got[name][out_of_use], args[name][out_of_use]), name
        assert torch.isfinite(got[name][~out_of_use]).all(), name


@pytest.mark.parametrize("setpoint", [INF, torch.nan, 1e30])
def test_zero_strength_is_bitwise_identity_and_still_measures(setpoint: float) -> None:
    args = batch(5, 40, 2, slots="all", dtype=torch.bfloat16)
    args["strength_TR"][2:4] = 0
    args["setpoint_TR"][2:4] = setpoint
    args["limit_SR"].fill_(0.01)
    args["y_TE"][2:4, ::2] = torch.tensor(-0.0, dtype=torch.bfloat16)
    got = run(args)
    for name in ("y_TE", "spent_T", "effort_T", "saturated_T"):
        assert same_bits(got[name][2:4], args[name][2:4]), name
    assert (got["measured_TR"][2:4] != 0).all()


def test_idle_channel_does_not_disturb_the_others() -> None:
    args = batch(4, 40, 3, slots="all")
    args["strength_TR"][:, 1] = 0
    plain = run(args)
    args["setpoint_TR"][:, 1] = torch.nan
    assert_same(run(args), plain)


def test_x_may_be_y() -> None:
    args = batch(6, 64, 2, slots="all")
    args["x_TD"] = args["y_TE"].clone()
    apart = run(args)
    if INTERPRETED:
        together = clone(args)
        together["x_TD"] = together["y_TE"]
        launch(*together.values())
    else:
        together = {name: value.cuda() for name, value in args.items()}
        together["x_TD"] = together["y_TE"]
        feedback_(*together.values())
        together = {name: value.cpu() for name, value in together.items()}
    assert_same(together, apart)


@pytest.mark.parametrize("setpoint", [1e30, -3e38, INF])
def test_overflow_is_visible_without_a_bound_and_finite_with_one(setpoint: float) -> None:
    args = batch(4, 192, 1, slots="all", bounds=False)
    args["strength_TR"][:] = 1
    calm = run(args)
    args["setpoint_TR"][1] = args["setpoint_TR"][3] = setpoint
    args["cap_TR"][3] = 0.25
    got = run(args)
    assert got["effort_T"][1] == INF
    torch.testing.assert_close(got["effort_T"][3], torch.tensor(0.25), rtol=KERNELS["bound"], atol=0)
    assert torch.isfinite(got["y_TE"][3]).all()
    assert got["saturated_T"].tolist() == [0, 0, 0, 1]
    for name in MUTATED:
        assert same_bits(got[name][::2], calm[name][::2])


def test_budget_bounds_channels_that_only_together_exceed_it() -> None:
    args = batch(4, 64, 2, slots="all", bounds=False)
    for name in ("probe_SRD", "gain_SRE", "norm_SR", "setpoint_TR", "strength_TR"):
        args[name][:, 1] = args[name][:, 0]
    args["spent_T"].zero_()
    args["strength_TR"][:] = 1
    args["setpoint_TR"][:] = 5
    free = run(args)
    args["budget_T"] = free["effort_T"] * 0.8
    got = run(args)
    torch.testing.assert_close(got["effort_T"], args["budget_T"], rtol=KERNELS["bound"], atol=0)
    torch.testing.assert_close(
        got["y_TE"] - args["y_TE"], 0.8 * (free["y_TE"] - args["y_TE"]), rtol=KERNELS["float32"], atol=1e-5
    )
    assert (free["saturated_T"] == 0).all()
    assert (got["saturated_T"] == 1).all()


def test_double_goes_to_the_reference() -> None:
    args = batch(4, 24, 2, dtype=torch.float64)
    want = clone(args)
    feedback_(*want.values())
    got = run(args)
    torch.testing.assert_close(got["y_TE"], want["y_TE"], rtol=1e-12, atol=1e-12)


def test_rows_that_are_not_contiguous_are_refused() -> None:
    args = batch(4, 24, 2, slots="all")
    args["y_TE"] = args["y_TE"].mT.contiguous().mT
    with pytest.raises(ValueError, match="y_TE: rows must be contiguous"):
        run(args)
