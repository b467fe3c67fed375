"""The recursion against a least-squares problem over the horizon, scipy, python-control and its own identities."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator

import control
import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from torch import Tensor

from steering.control import Cost, Weights, closed_loop, regulate, regulate_along, riccati, scalar_gains
from steering.errors import ControlError, DimensionMismatch, IllConditioned
from tests.control.cases import Problem, directions, jacobians, problems, relative, weights
from tests.tolerances import CONTROL


def horizon_plan(A_LDD: Tensor, weights: Weights, x_D: Tensor, v_LD: Tensor | None = None) -> np.ndarray:
    """All controls (L, D) at once: min over u of Σ ‖√Q_t x_t‖² + r‖u_t‖², as one least-squares problem."""
    A, x0 = A_LDD.numpy(), x_D.numpy()
    n_layers, width = A.shape[:2]
    free, forced = x0, np.zeros((width, n_layers * width))
    rows, targets = [math.sqrt(weights.r) * np.eye(n_layers * width)], [np.zeros(n_layers * width)]
    for t in range(n_layers):
        free, forced = A[t] @ free, A[t] @ forced
        forced[:, t * width : (t + 1) * width] += np.eye(width)
        price = math.sqrt(weights.q_f if t == n_layers - 1 else weights.q)
        look = price * (np.eye(width) if v_LD is None else v_LD[t + 1].numpy()[None])
        rows.append(look @ forced)
        targets.append(-look @ free)
    plan, *_ = np.linalg.lstsq(np.concatenate(rows), np.concatenate(targets), rcond=None)
    return plan.reshape(n_layers, width)


def follow(A_LDD: Tensor, K_LDD: Tensor, x_D: Tensor) -> tuple[Tensor, Tensor]:
    """States (L + 1, D) and controls (L, D) under u = K (0 − x)."""
    states, controls = [x_D], []
    for A, K in zip(A_LDD, K_LDD, strict=True):
        controls.append(-K @ states[-1])
        states.append(A @ states[-1] + controls[-1])
    return torch.stack(states), torch.stack(controls)


def dense_gains(A_LDD: Tensor, weights: Weights, v_LD: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    pairs = list(riccati(reversed(A_LDD.unbind()), weights, v_LD))[::-1]
    return torch.stack([K for K, _ in pairs]), [S for _, S in pairs]


@settings(max_examples=40, deadline=None)
@given(problem=problems, weights=weights)
def test_controls_equal_the_least_squares_plan_over_the_horizon(problem: Problem, weights: Weights) -> None:
    n_layers, width, seed, spread = problem
    A, x = jacobians(n_layers, width, seed, spread), directions(1, width, seed + 7)[0]
    v = directions(n_layers + 1, width, seed)
    for along in (None, v):
        K, _ = dense_gains(A, weights, along)
        _, u = follow(A, K, x)
        plan = torch.from_numpy(horizon_plan(A, weights, x, along))
        torch.testing.assert_close(u, plan, **CONTROL["horizon"])


@pytest.mark.parametrize(("width", "spread"), [(12, 0.2), (40, 1.0)])
def test_controls_equal_the_plan_at_larger_widths(width: int, spread: float) -> None:
    A, x, weights = jacobians(8, width, 3, spread), directions(1, width, 4)[0], Weights(0.3, 2.0, 5.0)
    _, u = follow(A, regulate(A, weights).K_LDD, x)
    torch.testing.assert_close(u, torch.from_numpy(horizon_plan(A, weights, x)), **CONTROL["horizon"])


@settings(max_examples=40, deadline=None)
@given(problem=problems, weights=weights)
def test_cost_to_go_is_the_simulated_cost(problem: Problem, weights: Weights) -> None:
    n_layers, width, seed, spread = problem
    A, x = jacobians(n_layers, width, seed, spread), directions(1, width, seed + 7)[0]
    regulator = regulate(A, weights)
    states, u = follow(A, regulator.K_LDD, x)
    cost = (
        weights.q * states[:-1].square().sum() + weights.r * u.square().sum() + weights.q_f * states[-1].square().sum()
    )
    torch.testing.assert_close(x @ regulator.S_DD @ x, cost, **CONTROL["recursion"])


@settings(max_examples=40, deadline=None)
@given(problem=problems, weights=weights)
def test_cost_to_go_is_symmetric_and_positive(problem: Problem, weights: Weights) -> None:
    n_layers, width, seed, spread = problem
    A, v = jacobians(n_layers, width, seed, spread), directions(n_layers + 1, width, seed)
    for along in (None, v):
        for S in dense_gains(A, weights, along)[1]:
            assert torch.equal(S, S.T)
            spectrum = torch.linalg.eigvalsh(S)
            assert spectrum[0] >= -CONTROL["negative"] * spectrum[-1]


def test_long_horizon_equals_scipys_algebraic_solution() -> None:
    A, weights = jacobians(1, 10, 5, 1.0)[0], Weights(0.7, 2.0, 0.1)
    S = torch.from_numpy(scipy.linalg.solve_discrete_are(A.numpy(), np.eye(10), 0.7 * np.eye(10), 2.0 * np.eye(10)))
    regulator = regulate(A.expand(200, 10, 10), weights)
    assert relative(regulator.S_DD, S) < CONTROL["algebraic"]
    assert relative(regulator.K_LDD[0], torch.linalg.solve(S + 2 * torch.eye(10), S @ A)) < CONTROL["algebraic"]


def test_long_horizon_equals_python_controls_dlqr() -> None:
    A, eye = jacobians(1, 6, 8, 0.8)[0], np.eye(6)
    K, S, closed_poles = control.dlqr(A.numpy(), eye, 0.1 * eye, 3.0 * eye)
    regulator = regulate(A.expand(300, 6, 6), Weights(0.1, 3.0, 0.1))
    assert relative(regulator.K_LDD[0], torch.from_numpy(K)) < CONTROL["algebraic"]
    assert relative(regulator.S_DD, torch.from_numpy(S + S.T) / 2) < CONTROL["algebraic"]
    poles = np.linalg.eigvals(closed_loop(A[None], regulator.K_LDD[:1])[0].numpy())
    np.testing.assert_allclose(np.sort(abs(poles)), np.sort(abs(closed_poles)), rtol=1e-6)


@pytest.mark.parametrize(
    ("q", "r", "q_f", "steady", "last"),
    [
        (0.1, 1, 0.1, 0.2702, 0.0909),
        (0.1, 10, 1, 0.0951, 0.0909),
        (0.1, 10, 10, 0.0960, 0.5),
        (1, 1, 1, 0.618, 0.5),
        (0.2, 7, 0.2, 0.1553, 0.0278),
        (0.1, 3, 0.1, 0.1666, 0.0323),
        (1, 5, 0.1, 0.3583, 0.0196),
        (10, 10, 1, 0.618, 0.0909),
    ],
)
def test_published_scalar_gains_with_identity_layers(
    q: float, r: float, q_f: float, steady: float, last: float
) -> None:
    gains = regulate(torch.ones(26, 1, 1), Weights(q, r, q_f)).K_LDD[:, 0, 0]
    assert float(gains[0]) == pytest.approx(steady, abs=6e-5)
    assert float(gains[-1]) == pytest.approx(last, abs=6e-5)
    assert float(gains[-1]) == pytest.approx(q_f / (q_f + r), rel=1e-14)
    torch.testing.assert_close(gains, scalar_gains(26, Weights(q, r, q_f)), rtol=1e-14, atol=0)


@pytest.mark.parametrize("spread", [0.2, 3.0])
def test_only_the_ratios_of_the_weights_matter(spread: float) -> None:
    A = jacobians(5, 9, 1, spread)
    expected = regulate(A, Weights(0.3, 2.0, 0.7)).K_LDD
    assert relative(regulate(A, Weights(0.3e4, 2.0e4, 0.7e4)).K_LDD, expected) < CONTROL["identity"]
    assert relative(regulate(A, Weights(0.3, 2.0, 1.4)).K_LDD, expected) > 1e-3


def test_control_that_costs_much_is_not_spent_and_free_control_cancels_the_state() -> None:
    A, v = jacobians(4, 7, 2, 1.0), directions(5, 7, 2)
    assert float(regulate(A, Weights(r=1e12)).K_LDD.abs().max()) < 1e-9
    assert relative(regulate(A, Weights(r=1e-12)).K_LDD, A) < 1e-11
    K, _ = dense_gains(A, Weights(r=1e-9), v)  # with the output cost it cancels the feature, not the state
    left = torch.einsum("te,ted->td", v[1:], A - K)
    assert float(left.abs().max()) < 1e-6
    assert relative(K, A) > 0.1


@pytest.mark.parametrize("cost", ["state", "output"])
def test_rank_one_form_equals_the_dense_gain_on_any_error_along_v(cost: Cost) -> None:
    A, v, weights = jacobians(6, 11, 9), directions(7, 11, 9), Weights(0.1, 3.0, 0.1)
    w = regulate_along(reversed(A.unbind()), v, weights, cost)
    K, _ = dense_gains(A, weights, v if cost == "output" else None)
    for alpha in (-40.0, 1e-3, 2.5):
        torch.testing.assert_close(torch.einsum("tde,te->td", K, alpha * v[:-1]), alpha * w, rtol=1e-12, atol=1e-14)


def test_a_layer_without_a_direction_has_no_gain() -> None:
    A, v = jacobians(3, 5, 4), directions(4, 5, 4)
    v[1] = 0
    costs: tuple[Cost, Cost] = ("state", "output")
    for cost in costs:
        w = regulate_along(reversed(A.unbind()), v, Weights(), cost)
        assert not w[1].any()
        assert w[0].any()
        assert w[2].any()


@pytest.mark.parametrize("cost", ["state", "output"])
def test_jacobians_are_dropped_as_they_stream(cost: Cost) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def stream() -> Iterator[Tensor]:
        nonlocal most
        for seed in range(12):
            most = max(most, len(alive))
            A = jacobians(1, 8, seed)[0]
            alive.add(A)
            yield A
            del A

    regulate_along(stream(), directions(13, 8, 0), Weights(), cost)
    assert most == 0


def test_float32_jacobians_are_solved_in_float64() -> None:
    A = jacobians(4, 6, 3).float()
    assert regulate(A, Weights()).K_LDD.dtype == torch.float64
    assert torch.equal(regulate(A, Weights()).K_LDD, regulate(A.double(), Weights()).K_LDD)


@pytest.mark.parametrize("field", ["q", "r", "q_f"])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "1", True, None])
def test_a_weight_that_is_no_weight_is_named(field: str, value: object) -> None:
    with pytest.raises(ControlError, match=rf"^{field}: expected a finite number") as caught:
        Weights(**{field: value})  # type: ignore[arg-type]
    assert caught.value.param == field


def test_weights_that_ask_for_nothing_are_refused() -> None:
    with pytest.raises(ControlError, match="above 0"):
        Weights(r=0)
    with pytest.raises(ControlError, match="both 0"):
        Weights(q=0, q_f=0)
    assert Weights(q=0, q_f=1).q == 0
    assert Weights(q=1, q_f=0).q_f == 0


def test_what_does_not_fit_is_refused() -> None:
    A, v = jacobians(3, 4, 0), directions(4, 4, 0)
    with pytest.raises(DimensionMismatch, match=r"\(L, D, D\)"):
        regulate(A[0], Weights())
    with pytest.raises(DimensionMismatch, match="Layer 6: expected a Jacobian"):
        regulate(A[:, :3], Weights(), last_layer=6)
    with pytest.raises(DimensionMismatch, match=r"Layer -2: expected a Jacobian \(4, 4\), got shape \(5, 5\)"):
        list(riccati(iter([A[0], torch.eye(5)]), Weights()))
    costs: tuple[Cost, Cost] = ("state", "output")
    for cost in costs:
        for wrong in (A[:2], A.repeat(4, 1, 1), torch.eye(5).expand(3, 5, 5)):
            with pytest.raises(DimensionMismatch):
                regulate_along(wrong.unbind(), v, Weights(), cost)
    for wrong in (A[:2], A.repeat(2, 1, 1)):
        with pytest.raises(DimensionMismatch, match="4 directions need 3 Jacobians"):
            list(riccati(wrong.unbind(), Weights(), v))
    with pytest.raises(DimensionMismatch, match="directions"):
        regulate_along(A.unbind(), v[:1], Weights())
    with pytest.raises(ControlError, match="cost: expected one of state, output"):
        regulate_along(A.unbind(), v, Weights(), "both")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_jacobian_that_is_not_finite_names_its_layer(value: float) -> None:
    A, v = jacobians(3, 4, 0), directions(4, 4, 0)
    A[1, 2, 3] = value
    with pytest.raises(ControlError, match="Layer 5: the Jacobian holds a value that is not finite"):
        regulate(A, Weights(), last_layer=6)
    v[2, 0] = value
    with pytest.raises(ControlError, match="Direction 2 of 4"):
        regulate_along(A.unbind(), v, Weights())


def test_lost_accuracy_is_an_error_not_a_gain() -> None:
    A, v = jacobians(3, 4, 0), directions(4, 4, 0)
    with pytest.raises(IllConditioned, match="raise r"):
        dense_gains(A, Weights(r=1e-18), v)
    with pytest.raises(IllConditioned, match="Layer 1"):
        regulate(1e160 * A, Weights(), last_layer=2)
