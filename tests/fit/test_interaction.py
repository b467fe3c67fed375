"""The basis is uncorrelated with orthonormal Jacobian columns, and M' is the sum over Jacobians formed by autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from steering.errors import SpecError
from steering.fit.interaction import (
    FINAL,
    InteractionSettings,
    _doubted,
    fit_interaction,
    interaction_basis,
    interactions,
)
from steering.fit.trial import Row
from steering.plan import InteractionPlan
from steering.plant.capture import capture
from steering.plant.plant import Plant
from steering.types import Site
from tests.fit.test_concept import NEGATIVE, POSITIVE
from tests.plans import noise
from tests.plants import WIDTH, prompts, tiny, tiny_tokenizer
from tests.tolerances import CORE, PLANT

TEXTS = POSITIVE + NEGATIVE
SETTINGS = InteractionSettings(leading=5, trailing=4, sources=2)
EYE = torch.eye(WIDTH, dtype=torch.float64)
ROWS = [Row(ids[:5], 1 + n) for n, ids in enumerate(prompts(2, longest=8))]


@pytest.fixture(scope="module")
def plant() -> Plant:
    return Plant(tiny("llama"), tiny_tokenizer())


@pytest.fixture(scope="module")
def fitted(plant: Plant) -> InteractionPlan:
    return fit_interaction(plant, "local", TEXTS, (), SETTINGS)


# The basis


@pytest.mark.parametrize("rank", [6, 4])
def test_a_linear_network_s_basis(rank: int) -> None:
    """x → x A: Cov(f̂) = Λ, the columns of ∂f/∂f̂ are orthonormal, and C C⁺ is the identity on what varies."""
    x = noise(400, rank, seed=1) @ noise(rank, 6, seed=2)
    A = noise(6, 8, seed=3)
    mean = x.mean(0)
    covariance = (x - mean).mT @ (x - mean) / len(x)
    basis = interaction_basis(covariance, A @ A.mT, 1e-9)  # the Jacobian is Aᵀ at every x
    C, inverse, spectrum = basis.C_DK, basis.pinv_KD, basis.lambda_K
    assert C.shape == (6, rank)
    features = (x - mean) @ C
    torch.testing.assert_close(features.mT @ features / len(x), spectrum.diag(), rtol=1e-8, atol=1e-8)
    by_feature = inverse @ A  # ∂f/∂f̂, a row for each feature
    torch.testing.assert_close(by_feature @ by_feature.mT, torch.eye(rank, dtype=torch.float64), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(inverse @ C, torch.eye(rank, dtype=torch.float64), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close((x - mean) @ C @ inverse, x - mean, rtol=1e-8, atol=1e-8)
    assert bool((spectrum.diff() <= 0).all())


def test_what_passes_nothing_on_is_in_no_feature() -> None:
    """Three of six directions are read: a basis of three, and the others' variance is none of it."""
    x = noise(300, 6, seed=4)
    A = torch.cat([noise(3, 5, seed=5), torch.zeros(3, 5, dtype=torch.float64)])
    basis = interaction_basis(x.mT @ x / len(x), A @ A.mT, 1e-9)
    assert len(basis.lambda_K) == 3
    assert basis.U_Dk.shape == (6, 6)
    moved = x @ basis.C_DK @ basis.pinv_KD
    torch.testing.assert_close(moved @ A, x @ A, rtol=1e-8, atol=1e-8)
    with pytest.raises(SpecError, match="states differ"):
        interaction_basis(torch.zeros(6, 6, dtype=torch.float64), A @ A.mT, 1e-9)
    with pytest.raises(SpecError, match="pass something on"):
        interaction_basis(torch.eye(6, dtype=torch.float64), torch.zeros(6, 6, dtype=torch.float64), 1e-9)


# The interactions


def jacobian(plant: Plant, row: Row, here: Site, behind: Site) -> Tensor:
    """∂ behind / ∂ here over the whole sequence, (T, D, T, D), by autograd's own functional."""

    def f(x_TD: Tensor) -> Tensor:
        shell = plant.shell()
        seen: list[Tensor] = []
        plant.tap(shell, here, lambda _: x_TD[None])
        plant.tap(shell, behind, lambda y: seen.append(y[0]))
        shell.base_model(input_ids=torch.tensor([row.ids]), use_cache=False)
        return seen[0]

    (x_TD,) = capture(plant, [row.ids], [here], [range(len(row.ids))])[here]
    return torch.autograd.functional.jacobian(f, x_TD.to(plant.dtype)).double()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("here", "behind", "K"), [(1, Site("resid_pre", 2), 3), (2, FINAL, WIDTH)])
def test_the_exact_sum_is_that_of_autograd_s_jacobians(plant: Plant, here: int, behind: Site, K: int) -> None:
    C = EYE if K == WIDTH else noise(WIDTH, K, seed=6)
    expected, count = torch.zeros(WIDTH, WIDTH, dtype=torch.float64), 0
    for row in ROWS:
        read = range(row.start, len(row.ids))
        J = torch.einsum("tdsj,dk->tksj", jacobian(plant, row, Site("resid_pre", here), behind), C)
        for s in read:
            part = J[list(read), :, s].flatten(0, 1)
            expected += part.mT @ part
        count += len(read)
    found = interactions(plant, ROWS, Site("resid_pre", here), (behind, C), 0, torch.Generator())
    size = float(expected.norm()) / count
    assert float((found - expected / count).norm()) <= PLANT["jacobian_float32"] * size


def test_random_signs_estimate_the_exact_sum(plant: Plant) -> None:
    """Without bias, and the error falls as one over the root of the sources."""
    where = Site("resid_pre", 1), (Site("resid_pre", 2), noise(WIDTH, 4, seed=7))
    exact = interactions(plant, ROWS[:1], *where, 0, torch.Generator())
    errors = {}
    for sources in (16, 400):
        found = interactions(plant, ROWS[:1], *where, sources, torch.Generator().manual_seed(1))
        errors[sources] = float((found - exact).norm() / exact.norm())
    assert errors[400] < 0.2
    assert errors[400] < 0.5 * errors[16]


# The fit


def test_features_are_uncorrelated_and_their_variance_is_lambda(plant: Plant, fitted: InteractionPlan) -> None:
    assert fitted.layers == (1, 2)
    assert InteractionPlan.from_artifact(fitted.artifact()).ranks == fitted.ranks
    held = {n for n in range(len(TEXTS)) if n % 5 == 0}
    ids = [plant.encode(text) for n, text in enumerate(TEXTS) if n not in held]
    for row, layer in enumerate(fitted.layers):
        site = Site("resid_pre", layer)
        x = torch.cat(capture(plant, ids, [site], "all", skip=1)[site]).double()
        torch.testing.assert_close(fitted.mean[row].double(), x.mean(0), **CORE["mean"])
        z = (x - x.mean(0)) @ fitted.probe[row].double().mT
        covariance = z.mT @ z / len(x)
        deviation = covariance.diagonal().sqrt()
        assert float((covariance / deviation / deviation[:, None] - torch.eye(5)).abs().max()) < 1e-3
        assert fitted.quality["tokens"][row] == len(x)
    assert fitted.quality["measured_on"] == "held-out"


def test_exact_fits_make_the_jacobian_orthonormal(plant: Plant) -> None:
    """At the last node: the mean of JᵀJ in feature coordinates is I, up to the lengths that the plan shares out."""
    texts = TEXTS[:4]
    settings = InteractionSettings(layers=(2,), leading=6, trailing=0, sources=0, longest=8)
    plan = fit_interaction(plant, "local", texts, (), settings)
    rows = [Row(plant.encode(text)[:8], 1) for text in texts]
    M = interactions(plant, rows, Site("resid_pre", 2), (FINAL, EYE), 0, torch.Generator())
    gain = plan.gain[0].double()
    gram = gain @ M @ gain.mT
    size = gram.diagonal().sqrt()
    assert float((gram / size / size[:, None] - torch.eye(6)).abs().max()) < 1e-3
    # Λ = Var(f̂): of z = f̂ ‖c⁺‖ the variance is Λ ‖c⁺‖², and ‖c⁺‖² is 1 over the gain's own JᵀJ.
    site = Site("resid_pre", 2)
    x = torch.cat(capture(plant, [row.ids for row in rows], [site], "all", skip=1)[site]).double()
    variance = ((x - x.mean(0)) @ plan.probe[0].double().mT).var(0, correction=0)
    torch.testing.assert_close(variance * size.square(), plan.spectrum[0, :6].double(), rtol=1e-3, atol=1e-6)


def test_quality_compares_with_components_and_chance(fitted: InteractionPlan) -> None:
    quality = fitted.quality
    assert quality["removed"] == 4
    assert set(quality["perplexity_ratio"]) == {"interaction", "pca"}
    assert quality["perplexity_ratio"]["interaction"] < quality["random"]
    assert quality["massive_tokens"] == [0, 0]


def test_few_tokens_are_told(plant: Plant) -> None:
    plan = fit_interaction(plant, "local", TEXTS[:2], (), SETTINGS)
    assert "do not span" in plan.quality["warning"]
    assert max(plan.ranks) < WIDTH
    assert plan.quality["measured_on"] == "fitted"


def test_figures_of_the_fitted_texts_are_told() -> None:
    figures = {"tokens": [99], "perplexity_ratio": {"interaction": 1.0, "pca": 2.0}}
    assert "that were fitted" in _doubted({**figures, "measured_on": "fitted"}, 8)["warning"]
    assert "warning" not in _doubted({**figures, "measured_on": "held-out"}, 8)


def test_an_exact_sum_stops_between_two_products(plant: Plant) -> None:
    """One of a text has thousands, seconds apart on the embedded model: whoever cancels does not wait for its end."""
    pauses: list[int] = []
    where = Site("resid_pre", 1), (Site("resid_pre", 2), noise(WIDTH, 4, seed=7))
    interactions(plant, ROWS[:1], *where, 0, torch.Generator(), None, lambda: pauses.append(1))
    assert len(pauses) == 4 * (len(ROWS[0].ids) - ROWS[0].start)


def test_an_exact_sum_that_would_take_hours_is_refused(plant: Plant) -> None:
    InteractionSettings(sources=0, jacobian_tokens=4096).for_model(plant)
    with pytest.raises(SpecError, match="a product for each token") as caught:
        InteractionSettings(sources=0, jacobian_tokens=4097).for_model(plant)
    assert caught.value.param == "jacobian_tokens"


def test_the_same_seed_gives_the_same_plan(plant: Plant, fitted: InteractionPlan) -> None:
    stages: list[tuple[str, float]] = []
    again = fit_interaction(plant, "local", TEXTS, (), SETTINGS, lambda s, f: stages.append((s, f)))
    assert again.artifact().fingerprint == fitted.artifact().fingerprint
    assert stages[-1] == ("done", 1.0)
    assert [f for _, f in stages] == sorted(f for _, f in stages)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"leading": 0}, "leading"),
        ({"trailing": 129}, "trailing"),
        ({"sources": -1}, "sources"),
        ({"tokens": 2}, "tokens"),
        ({"longest": True}, "longest"),
        ({"leading": 2.5}, "leading"),
        ({"threshold": 0.0}, "threshold"),
        ({"layers": ()}, "layers"),
        ({"layers": (3,)}, "layers"),
    ],
)
def test_impossible_settings_are_refused_by_name(plant: Plant, changes: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as caught:
        fit_interaction(plant, "local", TEXTS, (), InteractionSettings(**changes))
    assert caught.value.param == param


def test_examples_of_another_class_are_refused(plant: Plant) -> None:
    with pytest.raises(SpecError) as caught:
        fit_interaction(plant, "local", POSITIVE, NEGATIVE, SETTINGS)
    assert caught.value.param == "negative"
