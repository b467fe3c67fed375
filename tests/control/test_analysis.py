"""The closed loop and its predictions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from steering.control import (
    Cost,
    Weights,
    closed_loop,
    identity_gains,
    regulate,
    regulate_along,
    scalar_gains,
    simulate,
    spectral_radius,
    transition,
)
from steering.errors import ControlError, DimensionMismatch
from tests.control.cases import directions, jacobians


def test_transition_is_what_the_loop_does_to_a_state() -> None:
    A, x = jacobians(5, 6, 1, 1.0), directions(1, 6, 2)[0]
    stepped = x
    for A_t in A:
        stepped = A_t @ stepped
    torch.testing.assert_close(transition(A) @ x, stepped, rtol=1e-12, atol=1e-12)


def test_regulation_holds_an_unstable_network() -> None:
    A = 1.5 * jacobians(30, 8, 3, 0.1)
    closed = closed_loop(A, regulate(A, Weights(1, 1, 1)).K_LDD)
    assert float(transition(A).norm()) > 1e4
    assert float(transition(closed).norm()) < 1e-4
    assert float(spectral_radius(closed).max()) < 1 < float(spectral_radius(A).min())


def test_spectral_radius_equals_numpy_on_a_matrix_that_is_not_symmetric() -> None:
    A = jacobians(3, 7, 4, 2.0)
    expected = [max(abs(np.linalg.eigvals(a))) for a in A.numpy()]
    np.testing.assert_allclose(spectral_radius(A).numpy(), expected, rtol=1e-12)
    assert float(spectral_radius(torch.tensor([[0.0, 1.0], [-4.0, 0.0]]))) == pytest.approx(2.0)


def test_scalar_gains_reach_the_closed_form_and_end_at_the_terminal_one() -> None:
    weights = Weights(0.2, 7.0, 0.2)
    gains = scalar_gains(200, weights)
    s = (0.2 + math.sqrt(0.04 + 4 * 0.2 * 7.0)) / 2
    assert float(gains[0]) == pytest.approx(s / (s + 7.0), rel=1e-12)
    assert float(gains[-1]) == pytest.approx(0.2 / 7.2, rel=1e-12)


@pytest.mark.parametrize("cost", ["state", "output"])
def test_identity_gains_equal_the_recursion_on_identity_layers(cost: Cost) -> None:
    v, weights = directions(7, 9, 5), Weights(0.1, 3.0, 0.4)
    expected = regulate_along(torch.eye(9).expand(6, 9, 9).unbind(), v, weights, cost)
    torch.testing.assert_close(identity_gains(v, weights, cost), expected, rtol=1e-11, atol=1e-13)


def test_error_contracts_by_one_less_the_gain_at_every_layer() -> None:
    v = directions(1, 5, 6).expand(9, 5)
    gains = scalar_gains(8, Weights())
    beta = torch.full((8,), 3.0, dtype=torch.float64)
    run = simulate(jacobians(8, 5, 0, 0.0), v, identity_gains(v, Weights()), beta, torch.zeros(5, dtype=torch.float64))
    left = torch.cat([torch.ones(1, dtype=torch.float64), (1 - gains).cumprod(0)])
    torch.testing.assert_close(run.z_L, 3.0 * (1 - left), rtol=1e-12, atol=1e-12)


def test_without_gains_the_network_runs_open_loop() -> None:
    A, v, x = jacobians(4, 6, 7, 1.0), directions(4, 6, 7), directions(1, 6, 8)[0]
    run = simulate(A, v, torch.zeros(4, 6, dtype=torch.float64), torch.ones(4, dtype=torch.float64), x)
    assert not run.u_LD.any()
    torch.testing.assert_close(run.x_LD[-1], transition(A) @ x)
    torch.testing.assert_close(run.z_L, (v * run.x_LD[:4]).sum(1))


def test_simulated_control_is_the_dense_gain_on_the_features_error() -> None:
    A, v, x, weights = jacobians(6, 8, 9), directions(7, 8, 9), directions(1, 8, 10)[0], Weights(1, 1, 1)
    K, beta = regulate(A, weights).K_LDD, torch.linspace(1, 2, 6, dtype=torch.float64)
    run = simulate(A, v, regulate_along(reversed(A.unbind()), v, weights), beta, x)
    for t in range(6):
        u = K[t] @ ((beta[t] - v[t] @ run.x_LD[t]) * v[t])
        torch.testing.assert_close(run.u_LD[t], u, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(run.x_LD[t + 1], A[t] @ run.x_LD[t] + u, rtol=1e-11, atol=1e-13)


def test_a_disturbance_of_the_feature_is_rejected_better_as_control_gets_cheaper() -> None:
    """Only the disturbance: with u = K (r − x) and no feedforward, A moves the setpoint itself, whatever r costs."""
    A, v, x = jacobians(8, 12, 11, 0.1), directions(1, 12, 11).expand(9, 12), directions(1, 12, 12)[0]
    beta = torch.full((8,), 4.0, dtype=torch.float64)
    left = []
    for r in (1e6, 1.0, 1e-2, 1e-8):
        w = regulate_along(reversed(A.unbind()), v, Weights(1, r, 1), "output")
        disturbed, nominal = simulate(A, v, w, beta, x + v[0]), simulate(A, v, w, beta, x)
        left.append(abs(float(disturbed.z_L[1] - nominal.z_L[1])))
    assert left[0] == pytest.approx(float(v[1] @ A[0] @ v[0]), rel=1e-4)
    assert left[0] > 2 * left[1] > 4 * left[2]
    assert left[3] < 1e-7


def test_what_does_not_fit_is_refused() -> None:
    A, v, x = jacobians(4, 6, 7), directions(4, 6, 7), directions(1, 6, 8)[0]
    with pytest.raises(DimensionMismatch):
        closed_loop(A, A[:2])
    with pytest.raises(DimensionMismatch, match="Expected A"):
        simulate(A, v, v[:3], torch.ones(4), x)
    with pytest.raises(ControlError, match="n_layers"):
        scalar_gains(0, Weights())
    with pytest.raises(ControlError, match="cost: expected one of"):
        identity_gains(v, Weights(), "both")  # type: ignore[arg-type]
