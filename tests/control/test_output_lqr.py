"""Output regulation by products against the dense recursion of the same cost."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from steering.control import Weights, output_regulate, regulate_along
from steering.errors import ControlError, DimensionMismatch, IllConditioned
from tests.control.cases import Problem, directions, jacobians, problems, relative, weights
from tests.tolerances import CONTROL


def pull(A_LDD: Tensor, first_layer: int = 0) -> Callable[[int, Tensor], Tensor]:
    return lambda layer, W_KD: W_KD @ A_LDD[layer - first_layer]


def dense(A_LDD: Tensor, v_LD: Tensor, weights: Weights) -> Tensor:
    return regulate_along(reversed(A_LDD.unbind()), v_LD, weights, "output")


@settings(max_examples=60, deadline=None)
@given(problem=problems, weights=weights)
def test_equals_the_dense_recursion(problem: Problem, weights: Weights) -> None:
    n_layers, width, seed, spread = problem
    A, v = jacobians(n_layers, width, seed, spread), directions(n_layers + 1, width, seed)
    regulator = output_regulate(pull(A), v, weights, range(n_layers))
    torch.testing.assert_close(regulator.w_LD, dense(A, v, weights), **CONTROL["recursion"])
    assert regulator.discarded < 1e-12  # more layers than dimensions is compressed, without loss
    assert regulator.products == sum(min(k, width) for k in range(1, n_layers + 1))


@pytest.mark.parametrize(("n_layers", "width", "spread"), [(8, 40, 0.2), (12, 24, 1.0), (32, 40, 0.1)])
def test_equals_the_dense_recursion_with_half_a_square_of_products(n_layers: int, width: int, spread: float) -> None:
    A, v, weights = jacobians(n_layers, width, 6, spread), directions(n_layers + 1, width, 6), Weights(0.1, 3.0, 0.1)
    rows: list[int] = []

    def counted(layer: int, W_KD: Tensor) -> Tensor:
        rows.append(W_KD.shape[0])
        return W_KD @ A[layer - 1]

    regulator = output_regulate(counted, v, weights, range(1, n_layers + 1))
    error = relative(regulator.w_LD, dense(A, v, weights))
    print(
        f"L={n_layers} D={width}: {regulator.products} products, {n_layers * width} dense; relative error {error:.1e}"
    )
    assert rows == list(range(1, n_layers + 1))
    assert regulator.products == sum(rows) == n_layers * (n_layers + 1) // 2
    assert error < CONTROL["matrix_free"]
    assert regulator.discarded == 0


def test_products_in_float32_still_give_five_digits() -> None:
    A, v, weights = jacobians(8, 40, 2), directions(9, 40, 2), Weights()
    regulator = output_regulate(lambda layer, W: W.float() @ A[layer].float(), v, weights, range(8))
    assert regulator.w_LD.dtype == torch.float64
    assert relative(regulator.w_LD, dense(A, v, weights)) < CONTROL["matrix_free_float32"]


def test_last_gain_is_along_the_direction_after_it() -> None:
    A, v, weights = jacobians(5, 9, 3, 2.0), directions(6, 9, 3), Weights(0.3, 2.0, 5.0)
    expected = 5.0 / (5.0 + 2.0) * (v[5] @ A[4] @ v[4]) * v[5]
    torch.testing.assert_close(output_regulate(pull(A), v, weights, range(5)).w_LD[4], expected, rtol=1e-12, atol=1e-14)


def test_only_the_ratios_of_the_weights_matter() -> None:
    A, v = jacobians(5, 9, 3), directions(6, 9, 3)
    expected = output_regulate(pull(A), v, Weights(0.3, 2.0, 0.7), range(5)).w_LD
    scaled = output_regulate(pull(A), v, Weights(0.3e5, 2.0e5, 0.7e5), range(5)).w_LD
    assert relative(scaled, expected) < CONTROL["identity"]


@pytest.mark.parametrize(("weights", "products"), [(Weights(0, 2, 3), 5), (Weights(3, 2, 0), 10)])
def test_a_price_of_zero_costs_no_product(weights: Weights, products: int) -> None:
    A, v = jacobians(5, 9, 3), directions(6, 9, 3)
    regulator = output_regulate(pull(A), v, weights, range(5))
    assert regulator.products == products
    torch.testing.assert_close(regulator.w_LD, dense(A, v, weights), **CONTROL["recursion"])


def test_directions_that_are_zero_give_no_gain_and_no_product() -> None:
    A, v = jacobians(3, 5, 4), directions(4, 5, 4)
    v[1] = 0
    regulator = output_regulate(pull(A), v, Weights(), range(3))
    assert not regulator.w_LD[1].any()
    assert regulator.products == 1 + 2 + 2
    torch.testing.assert_close(regulator.w_LD, dense(A, v, Weights()), **CONTROL["recursion"])


def test_truncation_costs_fewer_products_and_reports_what_it_discards() -> None:
    A, v, weights = jacobians(8, 30, 5, 0.3), directions(9, 30, 5), Weights()
    exact = output_regulate(pull(A), v, weights, range(8))
    errors, discarded = [], []
    for rank in (1, 2, 4, 8):
        cut = output_regulate(pull(A), v, weights, range(8), max_rank=rank)
        assert cut.products == sum(min(k, rank) for k in range(1, 9))
        errors.append(relative(cut.w_LD, exact.w_LD))
        discarded.append(cut.discarded)
    assert 0 < discarded[2] < discarded[1] < discarded[0] < 1
    assert discarded[3] == 0
    assert errors[2] < errors[0]
    assert errors[3] == 0


def test_discarded_energy_is_the_largest_share_of_a_cost_to_gos_trace() -> None:
    eye = torch.eye(3, dtype=torch.float64)
    # A = I, v = e₀, 0, e₁, e₂: S_3 = e₂e₂ᵀ and S_2 = 4 e₁e₁ᵀ + ½ e₂e₂ᵀ, of which rank 1 keeps the 4; then S_1 = ⅘ e₁e₁ᵀ
    v = torch.stack([eye[0], 0 * eye[0], eye[1], eye[2]])
    cut = output_regulate(lambda _, W: W, v, Weights(4, 1, 1), range(3), max_rank=1)
    assert cut.discarded == pytest.approx(0.5 / 4.5, rel=1e-12)
    assert output_regulate(lambda _, W: W, v, Weights(4, 1, 1), range(3), max_rank=2).discarded == 0


def test_what_does_not_fit_is_refused() -> None:
    A, v = jacobians(3, 4, 0), directions(4, 4, 0)
    with pytest.raises(DimensionMismatch, match="2 controlled layers need 3 directions, got 4"):
        output_regulate(pull(A), v, Weights(), range(2))
    with pytest.raises(DimensionMismatch, match="Layer 2: expected a product"):
        output_regulate(lambda _, W: W[0], v, Weights(), range(3))
    for layers in ([0, 2, 3], [2, 1, 0]):
        with pytest.raises(ControlError, match="consecutive ascending"):
            output_regulate(pull(A), v, Weights(), layers)
    with pytest.raises(ControlError, match="max_rank"):
        output_regulate(pull(A), v, Weights(), range(3), max_rank=0)
    with pytest.raises(IllConditioned, match="raise r"):
        output_regulate(pull(A), v.clone().index_fill_(0, torch.tensor([0, 1, 2]), 0.5), Weights(r=1e-20), range(3))


def test_a_product_that_is_not_finite_names_its_layer() -> None:
    A, v = jacobians(3, 4, 0), directions(4, 4, 0)
    A[1, 0, 0] = math.nan
    with pytest.raises(ControlError, match="Layer 4: a vector"):
        output_regulate(pull(A, 3), v, Weights(), range(3, 6))


def test_finite_differences_of_a_nonlinear_network_give_the_same_gains() -> None:
    """The products of torch's reverse mode, against a dense recursion on central differences."""
    generator = torch.Generator().manual_seed(0)
    W = 0.5 * torch.randn(3, 6, 6, generator=generator, dtype=torch.float64)
    points, v = directions(3, 6, 11), directions(4, 6, 12)

    def block(layer: int, x_D: Tensor) -> Tensor:
        return x_D + torch.tanh(W[layer] @ x_D)

    def vjp(layer: int, W_KD: Tensor) -> Tensor:
        x_D = points[layer].clone().requires_grad_()
        y_D = block(layer, x_D)
        return torch.stack([torch.autograd.grad(y_D, x_D, row, retain_graph=True)[0] for row in W_KD])

    step = 1e-5 * torch.eye(6, dtype=torch.float64)
    columns = [[block(t, points[t] + e) - block(t, points[t] - e) for e in step] for t in range(3)]
    A = torch.stack([torch.stack(column, dim=1) for column in columns]) / 2e-5
    gains = output_regulate(vjp, v, Weights(), range(3)).w_LD
    assert relative(gains, dense(A, v, Weights())) < CONTROL["finite_difference"]
