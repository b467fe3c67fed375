"""The edits of one site: their definition, the promises that they share, what each is for, and their registration."""

from __future__ import annotations

import math

import pytest
import torch

import kernels
from kernels import _bound, _cpu
from steering.edit import Mask, Sparse, Turn
from tests.kernels.cases import DTYPES, INF, MUTATED, Batch, assert_same, both_ways, clone, same_bits, tokens
from tests.kernels.edit_cases import FORMS, assert_agrees, batch
from tests.kernels.interpreter import interpreted
from tests.tolerances import KERNELS

OPERATORS = {form: getattr(kernels, f"{form}_") for form in FORMS}
DEFINED = {form: getattr(torch.ops.setpoint, f"{form}_").default for form in FORMS}
each_form = pytest.mark.parametrize("form", FORMS)


def run(form: str, args: Batch) -> Batch:
    out = clone(args)
    OPERATORS[form](*out.values())
    return out


@both_ways
@each_form
@pytest.mark.parametrize("slots", ["mixed", "one"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(("T", "E", "M", "K"), [(1, 8, 1, 0), (9, 33, 4, 3), (3, 192, 2, 0)])
def test_equals_the_loop_over_tokens_and_edits(
    T: int, E: int, M: int, K: int, dtype: torch.dtype, slots: str, form: str
) -> None:
    args = batch(form, T, E, M, K=K, dtype=dtype, slots=slots)
    unit = KERNELS["float64" if dtype == torch.float64 else "float32"]
    assert_agrees(form, args, run(form, args), KERNELS["stored"][str(dtype).removeprefix("torch.")], unit)


@both_ways
@each_form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("E", [17, 192, 2304])
def test_token_alone_equals_token_in_any_batch(E: int, dtype: torch.dtype, form: str) -> None:
    args = batch(form, 24, E, dtype=dtype)
    whole = run(form, args)
    for size in (1, 2, 5, 16):
        for start in range(0, 24, size * (1 + E // 192)):
            assert_same(run(form, tokens(args, start, start + size)), tokens(whole, start, start + size))


@both_ways
@each_form
def test_one_program_for_all_equals_many_programs(form: str) -> None:
    args = batch(form, 12, 192, slots="one")
    mixed = clone(args)
    mixed["slot_T"][:4] = 1
    assert_same(tokens(run(form, args), 4, 12), tokens(run(form, mixed), 4, 12))


@each_form
def test_reference_cuts_a_long_batch_without_a_trace(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cpu, "jit", None)
    args = batch(form, 33, 48)
    whole = run(form, args)
    monkeypatch.setattr(_bound, "CHUNK", 7 * 96)
    assert_same(run(form, args), whole)


@both_ways
@each_form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_without_a_program_keeps_every_bit(dtype: torch.dtype, form: str) -> None:
    args = batch(form, 16, 40, dtype=dtype)
    out_of_use = args["slot_T"] == 0
    assert 0 < out_of_use.sum() < 16
    for name in MUTATED:
        args[name][out_of_use] = -7 if name == "saturated_T" else torch.nan
    got = run(form, args)
    for name in MUTATED:
        assert same_bits(got[name][out_of_use], args[name][out_of_use]), name
        assert torch.isfinite(got[name][~out_of_use]).all(), name


@both_ways
@each_form
@pytest.mark.parametrize("slots", ["all", "one"])
@pytest.mark.parametrize("value", [1.0, -0.0, INF, torch.nan])
def test_zero_strength_keeps_every_bit_and_still_measures(value: float, slots: str, form: str) -> None:
    args = batch(form, 6, 40, slots=slots, dtype=torch.bfloat16)
    args["strength_TR"][2:5] = 0
    args["y_TE"][2:5, ::2] = value
    args["y_TE"][3, 1] = torch.tensor([-1], dtype=torch.int16).view(torch.bfloat16)[0]  # a NaN of other bits
    args["measured_TR"].fill_(-9)
    got = run(form, args)
    for name in ("y_TE", "spent_T", "effort_T", "saturated_T"):
        assert same_bits(got[name][2:5], args[name][2:5]), name
    has_edit = (args["channel_SM"] >= 0)[args["slot_T"].long()].sum(1)
    assert ((got["measured_TR"] != -9).sum(1) == has_edit).all()


@both_ways
@each_form
def test_padding_is_not_read(form: str) -> None:
    args = batch(form, 12, 40, 4, slots="all")
    assert (args["channel_SM"][1:] < 0).any()
    got = run(form, args)
    for name in MUTATED:
        assert torch.isfinite(got[name]).all(), name
    args["channel_SM"].fill_(-1)
    assert_same(run(form, args), args)


@both_ways
@each_form
def test_coordinates_that_are_not_moved_keep_their_bits(form: str) -> None:
    args = batch(form, 6, 40, slots="one", K=0)
    args["y_TE"][:, ::4] = -0.0
    for name in ("plane_SM2E",):
        if name in args:
            args[name][..., ::4] = 0.0
    if form == "mask":
        args["scale_SME"][..., ::4], args["shift_SME"][..., ::4] = 1.0, 0.0
    got = run(form, args)["y_TE"]
    assert same_bits(got[:, ::4], args["y_TE"][:, ::4])


@each_form
def test_cap_and_budget_hold_over_the_layers(form: str) -> None:
    args = batch(form, 40, 24, slots="all")
    args["strength_TR"] *= 10
    args["spent_T"].zero_()
    spent = args["spent_T"].clone()
    edits = (args["channel_SM"] >= 0)[args["slot_T"].long()].sum(1)
    for layer in range(4):
        OPERATORS[form](*args.values())
        step = args["spent_T"] - spent
        spent = args["spent_T"].clone()
        assert (step <= edits * args["cap_TR"].amax(1) * (1 + KERNELS["bound"]) + 1e-6).all()
        assert (spent <= args["budget_T"] * (1 + KERNELS["bound"])).all(), layer
    held = (args["cap_TR"] < 1e-2).any(1) & (spent > args["budget_T"] * 0.999)
    assert args["saturated_T"][held].all()
    assert args["saturated_T"].any()


@each_form
def test_effort_is_the_distance_really_moved(form: str) -> None:
    args = batch(form, 20, 33, 1, dtype=torch.float64)
    got = run(form, args)
    moved = (got["y_TE"] - args["y_TE"]).norm(dim=-1) / args["y_TE"].norm(dim=-1)
    torch.testing.assert_close(got["effort_T"], moved, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got["spent_T"], args["spent_T"] + moved, rtol=1e-12, atol=1e-12)
    assert got["effort_T"].any()


@both_ways
@each_form
@pytest.mark.parametrize("value", [INF, -INF, torch.nan, 1e25])
@pytest.mark.parametrize("bounds", [True, False])
def test_diverged_row_is_visible_and_stays_alone(value: float, bounds: bool, form: str) -> None:
    args = batch(form, 6, 40, slots="one", bounds=bounds)
    args["strength_TR"][:] = 1
    calm = run(form, args)
    args["y_TE"][2, 5] = value
    got = run(form, args)
    assert not torch.isfinite(got["effort_T"][2])
    assert not torch.isfinite(got["spent_T"][2])
    others = [0, 1, 3, 4, 5]
    for name in MUTATED:
        assert same_bits(got[name][others], calm[name][others])


@both_ways
@pytest.mark.parametrize("form", ["mask", "sparsify"])
def test_immense_strength_is_visible_without_a_bound_and_finite_with_one(form: str) -> None:
    args = batch(form, 4, 40, 1, slots="one", bounds=False)
    args["count_SM" if form == "sparsify" else "channel_SM"][3] = 1
    args["strength_TR"][:] = 1e30
    args["cap_TR"][2:] = 0.25
    args["spent_T"].zero_()
    got = run(form, args)
    assert (got["effort_T"][:2] == INF).all()
    torch.testing.assert_close(got["effort_T"][2:], torch.full((2,), 0.25), rtol=KERNELS["bound"], atol=0)
    assert torch.isfinite(got["y_TE"][2:]).all()
    assert got["saturated_T"].tolist() == [0, 0, 1, 1]


@each_form
def test_row_of_zeros_reports_an_effort_without_nan(form: str) -> None:
    args = batch(form, 4, 16, slots="one", bounds=False)
    args["y_TE"].zero_()
    args["strength_TR"][:] = 1
    assert not torch.isnan(run(form, args)["effort_T"]).any()
    args["cap_TR"][:] = 0.5
    held = run(form, args)
    torch.testing.assert_close(held["y_TE"], args["y_TE"], rtol=0, atol=1e-30)
    assert (held["effort_T"] <= 0.5 * 3 * (1 + KERNELS["bound"])).all()


@both_ways
@each_form
def test_strides_do_not_matter(form: str) -> None:
    args = batch(form, 9, 40)
    assert not args["y_TE"].is_contiguous()
    assert not args["cap_TR"].is_contiguous()
    assert_same(run(form, {name: value.contiguous() for name, value in args.items()}), run(form, args))


@each_form
def test_agrees_with_the_edit_that_steering_compiles(form: str) -> None:
    args = batch(form, 10, 32, dtype=torch.float64, slots="one")
    args["budget_T"].fill_(INF)
    knobs = {name: args[f"{name}_TR"] for name in ("setpoint", "strength", "cap") if f"{name}_TR" in args}
    for value_TR in knobs.values():
        value_TR[:] = value_TR[0]
    channel = args["channel_SM"][3].tolist()
    own = {name.partition("_")[0]: value[3] for name, value in args.items() if "_SM" in name and name != "channel_SM"}
    edit = {"mask": Mask, "turn": Turn, "sparsify": Sparse}[form](
        **own, **{name: value_TR[0, channel] for name, value_TR in knobs.items()}
    )
    assert not same_bits(run(form, args)["y_TE"], args["y_TE"])
    torch.testing.assert_close(run(form, args)["y_TE"], edit(args["y_TE"], args["y_TE"]), rtol=1e-12, atol=1e-12)


@both_ways
def test_mask_drops_to_exact_zeros_inside_its_support_only() -> None:
    args = batch("mask", 8, 40, 1, slots="one", bounds=False, dtype=torch.bfloat16)
    args["strength_TR"][:] = 1
    args["scale_SME"][3], args["shift_SME"][3] = 0.0, 0.0
    args["low_SME"][3], args["high_SME"][3] = -0.5, INF
    got = run("mask", args)
    gone = args["y_TE"] >= -0.5
    assert (got["y_TE"][gone] == 0).all()
    assert same_bits(got["y_TE"][~gone], args["y_TE"][~gone])
    j = args["channel_SM"][3, 0]
    torch.testing.assert_close(got["measured_TR"][:, j], gone.float().mean(1), rtol=0, atol=1e-6)


def test_mask_that_changes_nothing_measures_nothing() -> None:
    args = batch("mask", 4, 16, 1, slots="one")
    args["scale_SME"][3], args["shift_SME"][3] = 1.0, 0.0
    assert_same(run("mask", args), args)


@pytest.mark.parametrize("strength", [0.3, 1.0, -2.0])
def test_turn_keeps_the_norm_and_reaches_its_share_of_the_angle(strength: float) -> None:
    args = batch("turn", 12, 24, 1, dtype=torch.float64, slots="one", bounds=False)
    args["strength_TR"][:] = strength
    args["adaptive_SM"][3] = 0
    got, j = run("turn", args), args["channel_SM"][3, 0]
    torch.testing.assert_close(got["y_TE"].norm(dim=-1), args["y_TE"].norm(dim=-1), rtol=1e-13, atol=0)
    after = run("turn", {**got, "strength_TR": torch.zeros_like(got["strength_TR"])})["measured_TR"][:, j]
    before, aim = got["measured_TR"][:, j], args["setpoint_TR"][:, j]

    def distance(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.polar(torch.ones_like(left), left - right).angle()

    torch.testing.assert_close(
        distance(after, before), distance(strength * distance(aim, before), 0 * aim), rtol=0, atol=1e-12
    )


@both_ways
def test_adaptive_turn_leaves_what_points_away() -> None:
    args = batch("turn", 30, 24, 1, slots="one", bounds=False)
    args["strength_TR"][:] = 1
    args["adaptive_SM"][3] = 1
    away = args["y_TE"] @ args["plane_SM2E"][3, 0, 0] <= 0
    assert 0 < away.sum() < 30
    got = run("turn", args)
    assert same_bits(got["y_TE"][away], args["y_TE"][away])
    assert (got["y_TE"][~away] != args["y_TE"][~away]).any(1).all()
    assert (got["measured_TR"][:, args["channel_SM"][3, 0]] != 0).all()


@both_ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 7, 39, 40, 41])
def test_sparsify_keeps_the_largest_and_all_their_ties(count: int, dtype: torch.dtype) -> None:
    args = batch("sparsify", 5, 40, 1, K=0, slots="one", bounds=False, dtype=dtype)
    args["strength_TR"][:] = 1
    args["count_SM"][3] = count
    args["weight_SME"][3] = 1.0
    args["y_TE"][0] = 2.0
    args["y_TE"][1, 3:] = args["y_TE"][1, 3].clone()
    got = run("sparsify", args)
    for t in range(5):
        size = args["y_TE"][t].abs().float()
        kept = size >= size.sort(descending=True).values[min(count, 40) - 1]
        assert same_bits(got["y_TE"][t][kept], args["y_TE"][t][kept])
        assert (got["y_TE"][t][~kept] == 0).all()
        assert math.isclose(got["measured_TR"][t, args["channel_SM"][3, 0]], 1 - kept.float().mean(), abs_tol=1e-6)


@both_ways
def test_sparsify_at_a_threshold_keeps_only_what_is_above() -> None:
    args = batch("sparsify", 5, 40, 1, K=0, slots="one", bounds=False)
    args["strength_TR"][:] = 1
    args["count_SM"][3], args["threshold_SM"][3] = 0, 0.5
    args["y_TE"][:, 4], args["weight_SME"][3, 0, 4] = 1.0, 0.5
    kept = args["y_TE"].abs() * args["weight_SME"][3, 0] > 0.5
    assert not kept[:, 4].any()
    torch.testing.assert_close(run("sparsify", args)["y_TE"], args["y_TE"] * kept, rtol=0, atol=0)


def test_rest_of_full_rank_gives_everything_back() -> None:
    args = batch("sparsify", 5, 12, 1, K=12, slots="one", bounds=False, dtype=torch.float64)
    args["strength_TR"][:] = 1
    args["count_SM"][3] = 2
    torch.testing.assert_close(run("sparsify", args)["y_TE"], args["y_TE"], rtol=0, atol=1e-13)


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_registration_passes_opcheck(dtype: torch.dtype, form: str) -> None:
    torch.library.opcheck(DEFINED[form], tuple(batch(form, 5, 16, dtype=dtype).values()))


@both_ways
@each_form
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("bank", lambda v: v[..., :-1]),
        ("channel_SM", lambda v: v[:, :1]),
        ("cap_TR", lambda v: v[:, :1]),
        ("budget_T", lambda v: v[:1]),
        ("saturated_T", lambda v: v[:1]),
        ("y_TE", lambda v: v[:-1]),
    ],
)
def test_wrong_shape_is_named_and_not_broadcast(name: str, wrong: object, form: str) -> None:
    args = batch(form, 5, 16, slots="all")
    name = list(args)[2] if name == "bank" else name
    args[name] = wrong(args[name])  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"must (be|have)"):
        OPERATORS[form](*args.values())


def test_triton_kernels_in_the_interpreter() -> None:
    done = interpreted("triton_edits.py", "triton_sparse_linear.py")
    assert done.returncode == 0, done.stdout + done.stderr
