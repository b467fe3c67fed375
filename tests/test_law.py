"""The one law equals every published form that it claims to be, and its algebra holds."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kernels
from steering.errors import DimensionMismatch, SpecError
from steering.law import Law
from steering.program import superpose
from steering.types import Route, across, at
from tests.control.cases import directions, jacobians
from tests.tolerances import CORE
from tests.toy import states

D, T = 7, 5
X = states(T, D, seed=1)
Y = states(T, D, seed=2)
V = directions(3, D, seed=3)


def equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, **CORE["law"])


def orthonormal(rank: int, seed: int = 4) -> Tensor:
    """Orthonormal rows (R, D)."""
    return torch.linalg.qr(directions(rank, D, seed).mT).Q.mT


def draw(rank: int, seed: int, *, limit: float = math.inf, cap: float = math.inf) -> Law:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(2 * rank * D + 2 * rank, generator=generator, dtype=torch.float64)
    probe, gain = numbers[: 2 * rank * D].view(2, rank, D)
    law = Law.of(probe, numbers[-rank:], gain, limit=limit, cap=cap)
    return replace(law, strength=numbers[-2 * rank : -rank])


# Closed forms


def test_addition() -> None:
    equal(Law.addition(V[0])(Y, X), Y + V[0])


def test_ablation_is_the_projector() -> None:
    equal(Law.projector(3 * V[0])(X, X), X @ (torch.eye(D) - torch.outer(V[0], V[0])))


def test_clamp_sets_the_projection() -> None:
    clamped = Law.of(V[0], 1.7, V[0])(X, X)
    equal(clamped @ V[0], torch.full((T,), 1.7, dtype=torch.float64))
    across_v = torch.eye(D, dtype=torch.float64) - torch.outer(V[0], V[0])
    equal(clamped @ across_v, X @ across_v)


def test_leace_erases_every_linear_trace_of_the_label() -> None:
    x, z = states(400, D, seed=8), states(400, 2, seed=9)
    x = x + z @ directions(2, D, seed=10)
    mu = x.mean(0)
    centred, label = x - mu, z - z.mean(0)
    values, vectors = torch.linalg.eigh(centred.mT @ centred / len(x))
    whiten, unwhiten = (vectors * values**power @ vectors.mT for power in (-0.5, 0.5))
    Q = torch.linalg.svd(whiten @ centred.mT @ label, full_matrices=False).U
    law = Law.of(Q.mT @ whiten, Q.mT @ whiten @ mu, Q.mT @ unwhiten)
    equal(law(x, x), x - (x - mu) @ (unwhiten @ Q @ Q.mT @ whiten).mT)
    erased = law(x, x)
    assert float(((erased - erased.mean(0)).mT @ label / len(x)).abs().max()) < 1e-12


def test_lqr_setpoint_needs_no_matrix() -> None:
    K = jacobians(1, D, seed=11)[0]
    by_matrix = Y + ((1.3 - X @ V[0])[:, None] * V[0]) @ K.mT
    equal(Law.of(V[0], 1.3, K @ V[0])(Y, X), by_matrix)


@pytest.mark.parametrize("rank", [1, 3, D])
def test_lqr_tracking_is_the_singular_value_decomposition_of_its_gain(rank: int) -> None:
    U, S, Vh = torch.linalg.svd(jacobians(1, D, seed=12)[0])
    K, nominal = (U[:, :rank] * S[:rank]) @ Vh[:rank], states(1, D, seed=13)[0]
    law = Law.of(Vh[:rank], Vh[:rank] @ nominal, (U[:, :rank] * S[:rank]).mT)
    assert law.rank == rank
    equal(law(Y, X), Y + (nominal - X) @ K.mT)


def test_rotation_in_a_plane_keeps_the_norm() -> None:
    basis, theta = orthonormal(2), 0.9
    turn = torch.tensor([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]], dtype=torch.float64)
    rotated = Law.of(basis, 0.0, -(turn - torch.eye(2)).mT @ basis)(X, X)
    equal(rotated, X - X @ basis.mT @ basis + X @ basis.mT @ turn.mT @ basis)
    equal(rotated.norm(dim=-1), X.norm(dim=-1))


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_eigenshift_is_a_rank_k_law_before_the_head(alpha: float) -> None:
    head = states(11, D, seed=14)
    U, S, Vh = torch.linalg.svd(head, full_matrices=False)
    shifted = S.clone()
    shifted[:2] *= alpha
    law = Law.of(Vh[:2], 0.0, (1 - alpha) * Vh[:2])
    equal(law(X, X) @ head.mT, X @ ((U * shifted) @ Vh).mT)


def test_loreft() -> None:
    R, W, b = orthonormal(3), directions(3, D, seed=15), states(1, 3, seed=16)[0]
    changed = Law.of(R - W, b, R)(X, X)
    equal(changed, X + (X @ W.mT + b - X @ R.mT) @ R)
    equal(changed @ R.mT, X @ W.mT + b)


# Algebra


@given(st.integers(0, 999), st.integers(1, 4), st.integers(1, 4))
def test_superposition_adds_what_each_does_in_any_order(seed: int, first: int, second: int) -> None:
    a, b = draw(first, seed), draw(second, seed + 1)
    assert (a + b).rank == first + second
    equal((a + b)(Y, X), a(Y, X) + b(Y, X) - Y)
    equal((b + a)(Y, X), (a + b)(Y, X))


def test_projector_is_idempotent() -> None:
    law = Law.projector(V[0])
    equal(law(law(X, X), law(X, X)), law(X, X))
    equal(law(X, X) @ V[0], torch.zeros(T, dtype=torch.float64))


@given(st.floats(-5, 5), st.integers(0, 99))
def test_a_factor_scales_the_control_and_not_the_setpoint(factor: float, seed: int) -> None:
    law = draw(2, seed)
    scaled = factor * law
    equal(scaled(Y, X) - Y, factor * (law(Y, X) - Y))
    changed = {f.name for f in fields(law) if not torch.equal(getattr(law, f.name), getattr(scaled, f.name))}
    assert changed <= {"strength"}


def test_strength_zero_is_the_same_bits_even_beyond_the_number_format() -> None:
    law = 0.0 * Law.of(V[0], math.inf, V[1])
    assert torch.equal(law(Y, X), Y)


def test_a_meter_of_an_infinite_setpoint_does_nothing() -> None:
    assert torch.equal(Law.of(V[0], math.inf, torch.zeros_like(V[0]))(Y, X), Y)


def test_the_error_saturates() -> None:
    error = 0.5 - X @ V[0]
    limit = float(error.abs().median())
    saturated = error.clamp(-limit, limit)
    assert (saturated != error).any()
    assert (saturated == error).any()
    equal(Law.of(V[0], 0.5, V[1], limit=limit)(Y, X), Y + saturated[:, None] * V[1])


def test_the_cap_bounds_each_channel_and_keeps_its_direction() -> None:
    wanted = Law.of(V[0], 4.0, 3 * V[1])(Y, X) - Y
    cap = float((wanted.norm(dim=-1) / X.norm(dim=-1)).sort().values[1:3].mean())
    spent = Law.of(V[0], 4.0, 3 * V[1], cap=cap)(Y, X) - Y
    bound = cap * X.norm(dim=-1)
    assert int((wanted.norm(dim=-1) > bound).sum()) == T - 2
    equal(spent.norm(dim=-1), wanted.norm(dim=-1).minimum(bound))
    equal(spent * wanted.norm(dim=-1, keepdim=True), wanted * spent.norm(dim=-1, keepdim=True))


def test_a_cap_holds_where_the_wish_overflows() -> None:
    law = Law.of(V[0].float(), 3e38, 30 * V[0].float(), cap=0.5)
    spent = law(Y.float(), X.float()) - Y.float()
    torch.testing.assert_close(spent.norm(dim=-1), 0.5 * X.float().norm(dim=-1), **CORE["float32"])


def test_a_zero_state_has_a_finite_effort() -> None:
    zero = torch.zeros_like(X)
    equal(Law.of(V[0], 1.0, V[1])(Y, zero), Y + V[1])
    assert float((Law.of(V[0], 1.0, V[1], cap=0.5)(Y, zero) - Y).abs().max()) < 1e-30


@given(
    st.integers(0, 99),
    st.sampled_from([math.inf, 0.4]),
    st.sampled_from([math.inf, 0.2, 0.0]),
    st.booleans(),
    st.booleans(),
)
def test_the_kernel_agrees(seed: int, limit: float, cap: float, bent: bool, relative: bool) -> None:
    law = draw(3, seed, limit=limit, cap=cap)
    if bent:
        law = replace(law, knee=law.setpoint.sort().values, floor=law.setpoint.flip(0).clone())
    law = replace(law, relative=torch.full_like(law.cap, float(relative))) + Law.idle(1, D, D)
    y, ones = Y.clone(), torch.ones(T, 1)
    bank = [torch.stack([torch.zeros_like(part), part]).float() for part in (law.probe, law.gain)]
    resident = Law(*(getattr(law, f.name).float() for f in fields(law)))
    kernels.feedback_(
        y,
        X,
        torch.ones(T, dtype=torch.int32),
        *bank,
        bank[1].norm(dim=-1),
        *(
            torch.stack([torch.zeros_like(resident.limit), getattr(resident, n)])
            for n in ("limit", "knee", "floor", "relative")
        ),
        *(ones * getattr(resident, name) for name in ("setpoint", "strength", "cap")),
        torch.full((T,), math.inf),
        torch.zeros(T),
        torch.zeros(T, law.rank),
        torch.zeros(T),
        torch.zeros(T, dtype=torch.int32),
    )
    torch.testing.assert_close(resident(Y, X), y, **CORE["float32"])


# Joining programs


def test_superpose_aligns_channels_over_routes() -> None:
    wide, narrow, late = draw(2, 1), draw(1, 2), draw(3, 3)
    first: dict[Route, Law] = {across(1): wide, across(2): narrow}
    second: dict[Route, Law] = {across(2): late, at("resid_pre", 2): narrow}
    joined = superpose([first, second])
    assert list(joined) == sorted(joined)
    assert {route: law.rank for route, law in joined.items()} == dict.fromkeys(
        [across(1), across(2), at("resid_pre", 2)], 5
    )
    equal(joined[across(1)](Y, X), wide(Y, X))
    equal(joined[across(2)](Y, X), narrow(Y, X) + late(Y, X) - Y)
    equal(joined[at("resid_pre", 2)](X, X), narrow(X, X))
    # the first intervention owns channels 0 and 1 everywhere, the second 2 to 4
    assert torch.equal(joined[across(1)].gain[2:], torch.zeros(3, D, dtype=torch.float64))
    assert torch.equal(joined[across(2)].gain[0], narrow.gain[0])
    assert torch.equal(joined[across(2)].gain[2:], late.gain)
    assert torch.equal(joined[at("resid_pre", 2)].gain[2], narrow.gain[0])
    assert joined[at("resid_pre", 2)].gain[:2].abs().sum() == 0


def test_superpose_of_nothing_is_empty() -> None:
    assert superpose([]) == {}
    assert superpose([{}, {}]) == {}


def test_superpose_refuses_one_route_of_two_widths() -> None:
    narrow = Law.of(torch.ones(3), 0.0, torch.ones(3))
    with pytest.raises(DimensionMismatch):
        superpose([{across(0): narrow}, {across(0): draw(1, 0)}])


def test_what_is_resident_is_all_but_the_knobs() -> None:
    law = draw(2, 1)
    resident = law.resident()
    assert set(resident) == {f.name for f in fields(Law)} - {"setpoint", "strength", "cap"} | {"norm"}
    assert all(len(tensor) == 2 for tensor in resident.values())
    assert all(torch.equal(t, (2.0 * law).resident()[name]) for name, t in resident.items())
    assert torch.equal((2.0 * law).knobs(3)[1], 2 * law.knobs(3)[1])


def test_idle_channels_behind_the_last_are_not_resident() -> None:
    law = draw(1, 1)
    behind, before = law + Law.idle(5, D, D), Law.idle(5, D, D) + law
    assert [len(one.resident()["probe"]) for one in (law, behind, before, Law.idle(4, D, D))] == [1, 1, 6, 1]
    meter = Law.of(V[0], 0.0, torch.zeros(D, dtype=torch.float64))
    assert len((law + meter + Law.idle(2, D, D)).resident()["gain"]) == 2


# Rectified probes and relative setpoints


def test_a_clamped_feature_of_a_sparse_autoencoder() -> None:
    w, b, c, d = V[0], 0.3, 1.7, V[1]
    law = Law.of(w, c - b, d, knee=-b, floor=-b)
    equal(law(Y, X), Y + (c - (X @ w + b).relu())[:, None] * d)


def test_a_feature_with_a_jump() -> None:
    w, b, theta, d = V[0], 0.3, 1.1, V[1]
    z = X @ w + b
    law = Law.of(w, -b, d, knee=theta - b, floor=-b)
    equal(law(Y, X), Y - (z * (z > theta))[:, None] * d)


def test_an_addition_relative_to_the_running_norm() -> None:
    law = Law.of(torch.zeros(D, dtype=torch.float64), 0.2, V[0], relative=True)
    equal(law(X, X), X + 0.2 * X.norm(dim=-1, keepdim=True) * V[0])


def test_a_relative_clamp_holds_the_cosine_of_what_it_reads() -> None:
    moved = Law.of(V[0], 0.5, V[0], relative=True)(X, X)
    equal(moved @ V[0], 0.5 * X.norm(dim=-1))


def test_a_knee_needs_a_floor() -> None:
    with pytest.raises(SpecError) as caught:
        Law.of(V[0], 0.0, V[1], knee=0.0)
    assert caught.value.param == "floor"


# Refusals


@pytest.mark.parametrize("name", [f.name for f in fields(Law)])
def test_nan_is_refused_by_name(name: str) -> None:
    parts = {f.name: getattr(draw(2, 0), f.name).clone() for f in fields(Law)}
    parts[name].view(-1)[0] = math.nan
    with pytest.raises(SpecError) as caught:
        Law(**parts)
    assert caught.value.param == name


@pytest.mark.parametrize(("name", "value"), [("probe", math.inf), ("gain", -math.inf), ("limit", -1.0), ("cap", -1e-9)])
def test_impossible_values_are_refused_by_name(name: str, value: float) -> None:
    parts = {f.name: getattr(draw(2, 0), f.name).clone() for f in fields(Law)}
    parts[name].view(-1)[-1] = value
    with pytest.raises(SpecError) as caught:
        Law(**parts)
    assert caught.value.param == name


@pytest.mark.parametrize("name", [f.name for f in fields(Law) if f.name != "probe"])
@pytest.mark.parametrize("shape", ["short", "deep"])
def test_shapes_must_agree(name: str, shape: str) -> None:
    parts = {f.name: getattr(draw(2, 0), f.name) for f in fields(Law)}
    parts[name] = parts[name][:1] if shape == "short" else parts[name][..., None]
    with pytest.raises(DimensionMismatch):
        Law(**parts)


def test_a_law_has_a_channel() -> None:
    with pytest.raises(DimensionMismatch):
        Law.of(torch.zeros(0, D), 0.0, torch.zeros(0, D))
    with pytest.raises(SpecError):
        Law.projector(torch.zeros(D))
