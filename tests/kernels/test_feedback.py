"""The operator's definition, its promises about neighbours and bounds, and its registration."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels
from kernels import feedback, feedback_
from steering.law import Law
from tests.kernels.cases import (
    DTYPES,
    INF,
    MUTATED,
    assert_agrees,
    assert_same,
    batch,
    both_ways,
    clone,
    same_bits,
    tokens,
)
from tests.kernels.interpreter import interpreted
from tests.tolerances import KERNELS

quick = settings(max_examples=30, deadline=None, derandomize=True)
shapes = st.tuples(st.integers(1, 9), st.sampled_from([8, 33, 192]), st.integers(1, 5), st.integers(0, 50))


def run(args: dict[str, Tensor]) -> dict[str, Tensor]:
    out = clone(args)
    feedback_(*out.values())
    return out


@both_ways
def test_a_knee_of_another_program_that_is_no_number_bends_nobody_else() -> None:
    args = batch(6, 24, 2, knees=True, slots="one")
    spoilt = clone(args)
    used = int(args["slot_T"][0])
    spoilt["knee_SR"][[slot for slot in range(len(args["knee_SR"])) if slot != used]] = torch.nan
    assert_same(run(spoilt), run(args))


@both_ways
@pytest.mark.parametrize("slots", ["mixed", "all", "one"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(("T", "D", "E", "R"), [(1, 8, 8, 1), (7, 192, 64, 2), (16, 192, 192, 1), (5, 2304, 192, 8)])
def test_equals_the_loop_over_tokens_and_channels(
    T: int, D: int, E: int, R: int, dtype: torch.dtype, slots: str
) -> None:
    args = batch(T, D, R, E=E, dtype=dtype, slots=slots, knees=R > 1)
    unit = KERNELS["float64" if dtype == torch.float64 else "float32"]
    assert_agrees(args, run(args), KERNELS["stored"][str(dtype).removeprefix("torch.")], unit)


@both_ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [8, 17, 192, 768, 4096])
@pytest.mark.parametrize("R", [1, 3, 8])
def test_token_alone_equals_token_in_any_batch(D: int, R: int, dtype: torch.dtype) -> None:
    args = batch(64, D, R, dtype=dtype, knees=True)
    whole = run(args)
    for size in (1, 2, 5, 16, 33):
        for start in range(0, 64, size * (1 + D // 64)):
            assert_same(run(tokens(args, start, start + size)), tokens(whole, start, start + size))


@both_ways
def test_one_program_for_all_equals_many_programs() -> None:
    args = batch(12, 192, 2, slots="one")
    mixed = clone(args)
    mixed["slot_T"][:4] = 2
    assert_same(tokens(run(args), 4, 12), tokens(run(mixed), 4, 12))


def test_reference_cuts_a_long_batch_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    args = batch(33, 48, 2)
    whole, parts = clone(args), clone(args)
    feedback.reference(*whole.values())
    monkeypatch.setattr(feedback, "CHUNK", 7 * 96)
    feedback.reference(*parts.values())
    assert_same(parts, whole)


@both_ways
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


def test_batch_without_programs_is_not_looked_at() -> None:
    args = batch(4, 8, 1)
    args["slot_T"].zero_()
    args["y_TE"].fill_(torch.nan)
    assert_same(run(args), args)


@both_ways
@pytest.mark.parametrize("slots", ["mixed", "all", "one"])
@pytest.mark.parametrize("setpoint", [INF, -INF, torch.nan, 1e30])
def test_zero_strength_is_bitwise_identity_and_still_measures(setpoint: float, slots: str) -> None:
    args = batch(9, 40, 2, slots=slots, dtype=torch.bfloat16)
    args["strength_TR"][2:5] = 0
    args["setpoint_TR"][2:5] = setpoint
    args["limit_SR"].fill_(0.01)
    args["y_TE"][2:5, ::2] = torch.tensor(-0.0, dtype=torch.bfloat16)
    args["slot_T"][2:5] = 3
    got = run(args)
    for name in ("y_TE", "spent_T", "effort_T", "saturated_T"):
        assert same_bits(got[name][2:5], args[name][2:5]), name
    want = args["x_TD"][2:5].double() @ args["probe_SRD"][3].double().mT
    torch.testing.assert_close(got["measured_TR"][2:5].double(), want, rtol=0, atol=1e-5)


@both_ways
@pytest.mark.parametrize("value", [INF, torch.nan])
def test_zero_strength_hands_nothing_on_from_a_diverged_row(value: float) -> None:
    args = batch(4, 40, 2, slots="all")
    args["strength_TR"][1] = 0
    args["x_TD"][1] = value
    got = run(args)
    for name in ("y_TE", "spent_T", "effort_T", "saturated_T"):
        assert same_bits(got[name][1], args[name][1]), name


@both_ways
@pytest.mark.parametrize("setpoint", [INF, torch.nan])
def test_idle_channel_does_not_disturb_the_others(setpoint: float) -> None:
    args = batch(6, 40, 3, slots="all")
    args["strength_TR"][:, 1] = 0
    plain = run(args)
    args["setpoint_TR"][:, 1] = setpoint
    assert_same(run(args), plain)


@both_ways
def test_channel_without_a_gain_only_measures() -> None:
    args = batch(6, 40, 2, slots="one", bounds=False)
    args["gain_SRE"][3] = 0
    args["norm_SR"][3] = 0
    args["strength_TR"][:] = 1
    args["setpoint_TR"][:] = INF
    got = run(args)
    assert same_bits(got["y_TE"], args["y_TE"])
    assert (got["measured_TR"] != 0).all()
    assert not got["effort_T"].any()


@quick
@given(shapes)
def test_cap_bounds_each_channel(shape: tuple[int, int, int, int]) -> None:
    T, D, _, seed = shape
    args = batch(T, D, 1, slots="all", seed=seed)
    args["strength_TR"] *= 100
    got = run(args)
    assert (got["effort_T"] <= args["cap_TR"][:, 0] * (1 + KERNELS["bound"])).all()


@quick
@given(shapes)
def test_budget_bounds_the_sum_over_the_layers(shape: tuple[int, int, int, int]) -> None:
    T, D, R, seed = shape
    args = batch(T, D, R, slots="all", seed=seed)
    args["strength_TR"] *= 10
    args["spent_T"].zero_()
    for layer in range(4):
        feedback_(*args.values())
        assert torch.isfinite(args["spent_T"]).all()
        assert (args["spent_T"] <= args["budget_T"] * (1 + KERNELS["bound"])).all(), layer
    spent_out = (args["spent_T"] > args["budget_T"] * 0.999) & (args["strength_TR"] != 0).any(1)
    assert args["saturated_T"][spent_out].all()


@both_ways
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


@quick
@given(shapes)
def test_effort_is_the_distance_really_moved(shape: tuple[int, int, int, int]) -> None:
    T, D, R, seed = shape
    args = batch(T, D, R, dtype=torch.float64, seed=seed)
    got = run(args)
    moved = (got["y_TE"] - args["y_TE"]).norm(dim=-1) / args["x_TD"].norm(dim=-1)
    torch.testing.assert_close(got["effort_T"], moved, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got["spent_T"], args["spent_T"] + moved, rtol=1e-12, atol=1e-12)


@quick
@given(shapes, st.randoms(use_true_random=False))
def test_superposition_is_free_of_order(shape: tuple[int, int, int, int], random: object) -> None:
    T, D, R, seed = shape
    args = batch(T, D, R, dtype=torch.float64, seed=seed)
    order = list(range(R))
    random.shuffle(order)  # type: ignore[attr-defined]
    other = clone(args)
    for name, value in args.items():
        if "R" in name.split("_")[-1]:
            other[name] = value[:, order]
    got, permuted = run(args), run(other)
    torch.testing.assert_close(permuted["y_TE"], got["y_TE"], rtol=1e-12, atol=1e-12)
    assert torch.equal(permuted["saturated_T"], got["saturated_T"])


@quick
@given(shapes, st.floats(-8, 8))
def test_control_is_linear_in_strength_where_nothing_saturates(shape: tuple[int, int, int, int], a: float) -> None:
    T, D, R, seed = shape
    args = batch(T, D, R, dtype=torch.float64, bounds=False, seed=seed)
    scaled = clone(args)
    scaled["strength_TR"] *= a
    once, often = run(args)["y_TE"] - args["y_TE"], run(scaled)["y_TE"] - args["y_TE"]
    torch.testing.assert_close(often, a * once, rtol=1e-10, atol=1e-10)
    assert not run(scaled)["saturated_T"].any()


@both_ways
@pytest.mark.parametrize("setpoint", [1e30, -1e30, 3e38, INF])
def test_overflow_is_visible_and_stays_in_its_row(setpoint: float) -> None:
    args = batch(6, 192, 1, slots="all", bounds=False)
    args["strength_TR"][:] = 1
    calm = run(args)
    args["setpoint_TR"][2] = setpoint
    got = run(args)
    assert got["effort_T"][2] == INF
    assert got["spent_T"][2] == INF
    others = [0, 1, 3, 4, 5]
    for name in MUTATED:
        assert same_bits(got[name][others], calm[name][others])


@both_ways
@pytest.mark.parametrize("bound", ["cap_TR", "budget_T"])
@pytest.mark.parametrize("setpoint", [1e30, 3e38, -INF])
def test_bounded_overflow_is_finite_and_flagged(setpoint: float, bound: str) -> None:
    args = batch(4, 192, 2, slots="all", bounds=False)
    args["strength_TR"][:] = 1
    args["strength_TR"][:, 1] = 0
    args["setpoint_TR"][:, 0] = setpoint
    args["spent_T"].zero_()
    args[bound][:] = 0.25
    got = run(args)
    torch.testing.assert_close(got["effort_T"], torch.full((4,), 0.25), rtol=KERNELS["bound"], atol=0)
    assert torch.isfinite(got["y_TE"]).all()
    assert (got["saturated_T"] == 1).all()


@both_ways
def test_zero_row_moves_by_addition_and_reports_an_effort_without_nan() -> None:
    args = batch(3, 16, 1, slots="one", bounds=False)
    args["x_TD"].zero_()
    args["strength_TR"][:] = 1
    free = run(args)
    assert not torch.isnan(free["effort_T"]).any()
    args["cap_TR"][:] = 0.5
    held = run(args)
    torch.testing.assert_close(held["y_TE"], args["y_TE"], rtol=0, atol=1e-30)
    assert (held["effort_T"] <= 0.5).all()


@both_ways
@pytest.mark.parametrize("slots", ["mixed", "all", "one"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_x_may_be_y(dtype: torch.dtype, slots: str) -> None:
    args = batch(8, 64, 2, dtype=dtype, slots=slots)
    args["x_TD"] = args["y_TE"].clone()
    apart = run(args)
    together = clone(args)
    together["x_TD"] = together["y_TE"]
    feedback_(*together.values())
    assert_same(together, apart)


@both_ways
def test_strides_do_not_matter() -> None:
    args = batch(9, 40, 3)
    assert not args["y_TE"].is_contiguous()
    assert not args["cap_TR"].is_contiguous()
    assert_same(run({name: value.contiguous() for name, value in args.items()}), run(args))


@both_ways
def test_bank_in_the_dtype_of_y() -> None:
    args = batch(9, 40, 3, dtype=torch.bfloat16)
    for name in ("probe_SRD", "gain_SRE"):
        args[name] = args[name].bfloat16()
    widened = {**args, "probe_SRD": args["probe_SRD"].float(), "gain_SRE": args["gain_SRE"].float()}
    assert_same(run(args), run(widened))


def test_agrees_with_the_law_that_steering_compiles() -> None:
    args = batch(10, 32, 3, dtype=torch.float64, slots="one", knees=True)
    args["knee_SR"][3, 0], args["floor_SR"][3, 0], args["relative_SR"][3, 1] = 0.1, -0.2, 1
    args["budget_T"].fill_(INF)
    for name in ("setpoint_TR", "strength_TR", "cap_TR"):
        args[name][:] = args[name][0]
    law = Law(
        args["probe_SRD"][3],
        args["setpoint_TR"][0],
        args["gain_SRE"][3],
        args["limit_SR"][3],
        args["strength_TR"][0],
        args["cap_TR"][0],
        args["knee_SR"][3],
        args["floor_SR"][3],
        args["relative_SR"][3],
    )
    torch.testing.assert_close(run(args)["y_TE"], law(args["y_TE"], args["x_TD"]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_registration_passes_opcheck(dtype: torch.dtype) -> None:
    args = batch(5, 16, 2, dtype=dtype)
    torch.library.opcheck(torch.ops.setpoint.feedback_.default, tuple(args.values()))


def test_knee_reads_the_features_of_a_sparse_autoencoder() -> None:
    args = batch(40, 24, 3, dtype=torch.float64, slots="one", bounds=False)
    bias_R = torch.tensor([0.2, -0.4, 0.0], dtype=torch.float64)
    theta_R = torch.tensor([0.0, 0.3, 0.5], dtype=torch.float64)  # 0: a ReLU
    args["floor_SR"][3] = -bias_R
    args["knee_SR"][3] = theta_R - bias_R
    before_TR = args["x_TD"] @ args["probe_SRD"][3].mT + bias_R
    feature_TR = before_TR * (before_TR > theta_R)
    assert (feature_TR == 0).any(0).all()
    assert (feature_TR != 0).any(0).all()
    args["setpoint_TR"] -= bias_R  # in units of the feature
    got = run(args)
    torch.testing.assert_close(got["measured_TR"] + bias_R, feature_TR, rtol=0, atol=1e-12)
    spend_TR = args["strength_TR"] * (args["setpoint_TR"] + bias_R - feature_TR)
    torch.testing.assert_close(got["y_TE"], args["y_TE"] + spend_TR @ args["gain_SRE"][3], rtol=1e-12, atol=1e-12)


@both_ways
def test_knee_hides_no_overflow() -> None:
    args = batch(3, 24, 1, slots="one", bounds=False)
    args["knee_SR"][3] = args["floor_SR"][3] = 0.0
    args["x_TD"][1] = torch.nan
    got = run(args)
    assert torch.isnan(got["measured_TR"][:, 0]).tolist() == [False, True, False]


def test_relative_setpoint_holds_a_cosine() -> None:
    args = batch(6, 24, 1, dtype=torch.float64, slots="one", bounds=False)
    args["x_TD"] = args["y_TE"]
    args["strength_TR"][:] = 1
    args["relative_SR"][3] = 1
    args["setpoint_TR"][:] = 0.3
    unit = args["probe_SRD"][3] / args["probe_SRD"][3].norm()
    args["probe_SRD"][3] = args["gain_SRE"][3] = unit
    size_T = args["y_TE"].norm(dim=-1)
    y_TE = args["y_TE"].clone()
    feedback_(*args.values())
    want = y_TE + (0.3 * size_T[:, None] - y_TE @ unit.mT) * unit
    torch.testing.assert_close(args["y_TE"], want, rtol=1e-12, atol=1e-12)


@both_ways
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("gain_SRE", lambda v: v[..., :-1]),
        ("probe_SRD", lambda v: v[:, :1]),
        ("limit_SR", lambda v: v[:2]),
        ("knee_SR", lambda v: v[:, :1]),
        ("cap_TR", lambda v: v[:, :1]),
        ("budget_T", lambda v: v[:1]),
        ("x_TD", lambda v: v[:-1]),
    ],
)
def test_wrong_shape_is_named_and_not_broadcast(name: str, wrong: object) -> None:
    args = batch(5, 16, 2, slots="all")
    args[name] = wrong(args[name])  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"must (be|have)"):
        feedback_(*args.values())


def test_package_is_not_mistaken_for_another() -> None:
    assert kernels.__all__ == [
        "bind",
        "bind_norm",
        "feedback_",
        "mask_",
        "norm_",
        "paged_attention",
        "sparse_linear",
        "sparsify_",
        "turn_",
        "warm",
    ]
    assert not hasattr(kernels, "__version__")  # transformers looks for it in Hugging Face's package of this name


def test_triton_kernel_in_the_interpreter() -> None:
    done = interpreted("triton_feedback.py")
    assert done.returncode == 0, done.stdout + done.stderr
