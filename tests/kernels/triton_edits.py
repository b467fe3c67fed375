"""The Triton kernels of the edits against the oracle and against their own promises.

`test_edits.py` runs this file in Triton's interpreter, in a process of its own. On a machine with a GPU it runs the
compiled kernels: `python -m pytest tests/kernels/triton_edits.py`.
"""

from __future__ import annotations

import os

import pytest
import torch

import kernels
from tests.kernels.cases import INF, MUTATED, Batch, assert_same, clone, same_bits, tokens
from tests.kernels.edit_cases import FORMS, assert_agrees, batch
from tests.tolerances import KERNELS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from kernels import _edits  # noqa: E402

OPERATORS = {form: getattr(kernels, f"{form}_") for form in FORMS}
STORED = KERNELS["stored_interpreted" if INTERPRETED else "stored"]
each_form = pytest.mark.parametrize("form", FORMS)


def run(form: str, args: Batch) -> Batch:
    if INTERPRETED:
        out = clone(args)
        getattr(_edits, f"launch_{form}")(*out.values())
        return out
    moved = {
        name: torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="cuda").copy_(v)
        for name, v in args.items()
    }
    OPERATORS[form](*moved.values())
    return {name: value.cpu() for name, value in moved.items()}


@each_form
@pytest.mark.parametrize(
    ("T", "E", "M", "K", "dtype"),
    [
        (1, 8, 1, 0, torch.float32),
        (9, 33, 4, 3, torch.float32),
        (4, 192, 2, 0, torch.bfloat16),
        (4, 100, 2, 2, torch.float16),
        (2, 2304, 2, 1, torch.float32),
    ],
)
def test_equals_the_loop_over_tokens_and_edits(T: int, E: int, M: int, K: int, dtype: torch.dtype, form: str) -> None:
    args = batch(form, T, E, M, K=K, dtype=dtype, slots="all" if T < 4 else "mixed")
    assert_agrees(form, args, run(form, args), STORED[str(dtype).removeprefix("torch.")], KERNELS["float32"])


@each_form
def test_token_alone_equals_token_in_a_batch(form: str) -> None:
    args = batch(form, 3, 192, 2, dtype=torch.bfloat16, slots="all")
    whole = run(form, args)
    for t in range(3):
        assert_same(run(form, tokens(args, t, t + 1)), tokens(whole, t, t + 1))


@each_form
def test_token_without_a_program_keeps_every_bit(form: str) -> None:
    args = batch(form, 6, 40, 1, slots="one", dtype=torch.bfloat16)
    args["slot_T"][::2] = 0
    out_of_use = args["slot_T"] == 0
    for name in MUTATED:
        args[name][out_of_use] = -7 if name == "saturated_T" else torch.nan
    got = run(form, args)
    for name in MUTATED:
        assert same_bits(got[name][out_of_use], args[name][out_of_use]), name
        assert torch.isfinite(got[name][~out_of_use]).all(), name


@each_form
@pytest.mark.parametrize("value", [-0.0, torch.nan])
def test_zero_strength_keeps_every_bit_and_still_measures(value: float, form: str) -> None:
    args = batch(form, 4, 40, 2, slots="all", dtype=torch.bfloat16)
    args["strength_TR"][2:4] = 0
    args["y_TE"][2:4, ::2] = value
    args["measured_TR"].fill_(-9)
    got = run(form, args)
    for name in ("y_TE", "spent_T", "effort_T", "saturated_T"):
        assert same_bits(got[name][2:4], args[name][2:4]), name
    has_edit = (args["channel_SM"] >= 0)[args["slot_T"].long()].sum(1)
    assert ((got["measured_TR"] != -9).sum(1) == has_edit).all()


@each_form
def test_coordinates_that_are_not_moved_keep_their_bits(form: str) -> None:
    args = batch(form, 3, 40, slots="one", K=0, dtype=torch.bfloat16)
    args["y_TE"][:, ::4] = -0.0
    if form == "turn":
        args["plane_SM2E"][..., ::4] = 0.0
    if form == "mask":
        args["scale_SME"][..., ::4], args["shift_SME"][..., ::4] = 1.0, 0.0
    assert same_bits(run(form, args)["y_TE"][:, ::4], args["y_TE"][:, ::4])


@each_form
@pytest.mark.parametrize(("value", "bounds"), [(-INF, True), (torch.nan, False), (1e25, True)])
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_diverged_row_is_visible_and_stays_alone(value: float, bounds: bool, form: str) -> None:
    args = batch(form, 3, 40, 1, slots="one", bounds=bounds)
    args["strength_TR"][:] = 1
    calm = run(form, args)
    args["y_TE"][1, 5] = value
    got = run(form, args)
    assert not torch.isfinite(got["effort_T"][1])
    assert not torch.isfinite(got["spent_T"][1])
    for name in MUTATED:
        assert same_bits(got[name][::2], calm[name][::2])


@pytest.mark.parametrize("form", ["mask", "sparsify"])
def test_immense_strength_is_visible_without_a_bound_and_finite_with_one(form: str) -> None:
    args = batch(form, 4, 40, 1, slots="one", bounds=False)
    args["count_SM" if form == "sparsify" else "channel_SM"][3] = 1
    args["strength_TR"][:] = -1e30
    args["cap_TR"][2:] = 0.25
    args["spent_T"].zero_()
    got = run(form, args)
    assert (got["effort_T"][:2] == INF).all()
    torch.testing.assert_close(got["effort_T"][2:], torch.full((2,), 0.25), rtol=KERNELS["bound"], atol=0)
    assert torch.isfinite(got["y_TE"][2:]).all()
    assert got["saturated_T"].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(("count", "dtype"), [(1, torch.float16), (7, torch.float32), (41, torch.bfloat16)])
def test_sparsify_keeps_the_largest_and_all_their_ties(count: int, dtype: torch.dtype) -> None:
    args = batch("sparsify", 4, 40, 1, K=0, slots="one", bounds=False, dtype=dtype)
    args["strength_TR"][:] = 1
    args["count_SM"][3] = count
    args["weight_SME"][3] = 1.0
    args["y_TE"][0] = 2.0
    args["y_TE"][1, 3:] = args["y_TE"][1, 3].clone()
    args["y_TE"][2, 5:] = 0.0
    args["y_TE"][3, ::3] = torch.finfo(dtype).tiny
    got = run("sparsify", args)
    for t in range(4):
        size = args["y_TE"][t].abs().float()
        kept = size >= size.sort(descending=True).values[min(count, 40) - 1]
        assert same_bits(got["y_TE"][t][kept], args["y_TE"][t][kept])
        assert (got["y_TE"][t][~kept] == 0).all()


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_angle_equals_atan2_all_around() -> None:
    args = batch("turn", 43, 8, 1, slots="one")
    args["plane_SM2E"][3, 0] = torch.eye(8)[:2]
    angle = torch.linspace(-3.1415, 3.1415, 40, dtype=torch.float64)
    args["y_TE"][:40, 0], args["y_TE"][:40, 1] = angle.cos(), angle.sin()
    args["y_TE"][40:, :2] = torch.tensor([[0.0, 0.0], [1e-30, 1e30], [-1e15, 0.0]])
    want = torch.atan2(args["y_TE"][:, 1].double(), args["y_TE"][:, 0].double())
    got = run("turn", args)["measured_TR"][:, args["channel_SM"][3, 0]].double()
    torch.testing.assert_close(got, want, rtol=0, atol=KERNELS["angle"])


@each_form
def test_double_goes_to_the_reference(form: str) -> None:
    args = batch(form, 4, 24, dtype=torch.float64)
    want = clone(args)
    OPERATORS[form](*want.values())
    assert_same(want, run(form, args)) if INTERPRETED else torch.testing.assert_close(
        run(form, args)["y_TE"], want["y_TE"], rtol=1e-12, atol=1e-12
    )


@each_form
def test_rows_that_are_not_contiguous_are_refused(form: str) -> None:
    args = batch(form, 4, 24, slots="all")
    args["y_TE"] = args["y_TE"].mT.contiguous().mT
    with pytest.raises(ValueError, match="y_TE: rows must be contiguous"):
        run(form, args)
