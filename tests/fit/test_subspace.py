"""The spectrum is numpy's, the noise edge is where noise ends, and planted spikes are found and told apart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from steering.errors import SpecError
from steering.fit.subspace import (
    Moments,
    SubspaceSettings,
    _decomposed,
    fit_subspace,
    marchenko_pastur_median,
    noise_edge,
)
from steering.plan import SubspacePlan
from steering.plant.capture import capture
from steering.plant.plant import Plant
from steering.types import Site
from tests.fit.test_concept import NEGATIVE, POSITIVE
from tests.plants import WIDTH, tiny, tiny_tokenizer
from tests.tolerances import CORE

SETTINGS = SubspaceSettings(skip=2, leading=5, trailing=7)


@pytest.fixture(scope="module")
def plant() -> Plant:
    return Plant(tiny("llama", layers=4), tiny_tokenizer())


@pytest.fixture(scope="module")
def fitted(plant: Plant) -> SubspacePlan:
    return fit_subspace(plant, "pca", POSITIVE, NEGATIVE, SETTINGS)


# The law of noise


@pytest.mark.parametrize("gamma", [0.02, 0.3, 1.0, 2.5])
def test_half_of_the_law_lies_below_its_median(gamma: float) -> None:
    low, high = (1 - math.sqrt(gamma)) ** 2, (1 + math.sqrt(gamma)) ** 2

    def density(x: float) -> float:
        return math.sqrt(max((high - x) * (x - low), 0.0)) / (2 * math.pi * gamma * x)

    median = marchenko_pastur_median(gamma)
    below, whole = (quad(density, low + 1e-15, end, limit=500)[0] for end in (median, high))
    assert whole == pytest.approx(min(1.0, 1 / gamma), rel=1e-3)
    assert below / whole == pytest.approx(0.5, abs=1e-3)


def sample(n: int, width: int, theta: float, seed: int = 0) -> torch.Tensor:
    """Noise of variance 4, and 4(1 + θ) along the first axis."""
    x = 2 * torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:, 0] *= math.sqrt(1 + theta)
    return x


@pytest.mark.parametrize(("n", "width"), [(2000, 100), (300, 100), (80, 200)])
def test_noise_has_no_spikes_and_what_is_planted_has_one(n: int, width: int) -> None:
    gamma = width / n
    for theta, spikes in ((0.0, 0), (0.3 * math.sqrt(gamma), 0), (4 * math.sqrt(gamma), 1)):
        x = sample(n, width, theta)
        spectrum = torch.linalg.eigvalsh(x.mT @ x / n).flip(0).clamp_min(0)
        edge = noise_edge(spectrum, n)
        assert edge == pytest.approx(4 * (1 + math.sqrt(gamma)) ** 2, rel=0.08)
        assert int((spectrum > 1.05 * edge).sum()) == spikes


def test_the_spike_that_tells_the_classes_apart_is_flagged() -> None:
    """Three spikes; the positive class differs along the second."""
    generator = torch.Generator().manual_seed(3)
    minus, plus = (torch.randn(3000, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    for x in (minus, plus):
        x[:, :3] *= torch.tensor([6.0, 4.0, 3.0], dtype=torch.float64)
    plus[:, 1] += 4
    moments = []
    for x in (plus, minus):
        moments.append(Moments(40, square=True))
        moments[-1].add(x)
    found = _decomposed(*moments, K=10, M=5, quantile=0.9)
    assert found.spikes == 3
    assert found.flagged == 1
    assert int(found.score_K.argmax()) == 1
    assert float(found.score_K[1]) == pytest.approx(1.0, abs=0.1)
    assert float(found.leading_KD[1, 1].abs()) > 0.99


# Moments


def test_massive_activations_are_left_out_and_counted() -> None:
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[3, 5] = 2400.0
    moments = Moments(8, square=True)
    moments.add(x)
    kept = np.delete(x.numpy(), 3, axis=0)
    assert (moments.massive, moments.count) == (1, 19)
    torch.testing.assert_close(moments.mean(), torch.from_numpy(kept.mean(0)), **CORE["law"])
    torch.testing.assert_close(moments.covariance(), torch.from_numpy(np.cov(kept.T, bias=True)), **CORE["law"])
    large = Moments(8, square=False)
    large.add(500 + x[:3])  # large, but like its neighbours
    assert large.massive == 0


# The fit


def test_the_plan_is_the_covariance_of_the_reference_class(plant: Plant, fitted: SubspacePlan) -> None:
    assert fitted.layers == (1, 2, 3)
    assert SubspacePlan.from_artifact(fitted.artifact()).layers == (1, 2, 3)
    ids = [plant.encode(text) for text in NEGATIVE]
    for row, layer in enumerate(fitted.layers):
        states = torch.cat(capture(plant, ids, [Site("resid_pre", layer)], "all", skip=2)[Site("resid_pre", layer)])
        C = np.cov(states.double().numpy().T, bias=True)
        torch.testing.assert_close(fitted.mean[row], states.mean(0), **CORE["mean"])
        spectrum, U = np.linalg.eigh(C)
        largest = float(spectrum[-1])
        torch.testing.assert_close(
            fitted.spectrum[row].double(), torch.from_numpy(spectrum[::-1].copy()), rtol=1e-5, atol=1e-6 * largest
        )
        for rows, wanted in ((fitted.leading[row], U[:, ::-1][:, :5]), (fitted.trailing[row], U[:, :7])):
            variance = np.einsum("kd,de,ke->k", rows.double().numpy(), C, rows.double().numpy())
            assert np.allclose(variance, np.einsum("dk,de,ek->k", wanted, C, wanted), atol=1e-6 * largest)
    assert fitted.quality["tokens"] == [len(states)] * 3
    assert fitted.quality["massive_tokens"] == [0, 0, 0]
    assert fitted.quality["spikes"] == list(fitted.spikes)


def test_the_score_is_the_difference_of_means_in_deviations(plant: Plant, fitted: SubspacePlan) -> None:
    site = Site("resid_pre", 2)
    ids = [plant.encode(text) for text in POSITIVE]
    plus = torch.cat(capture(plant, ids, [site], "all", skip=2)[site]).mean(0)
    expected = (fitted.leading[1] @ (plus - fitted.mean[1])).abs() / fitted.spectrum[1, :5].sqrt()
    torch.testing.assert_close(fitted.score[1], expected, rtol=1e-3, atol=1e-4)


def test_progress_ends_and_layers_may_be_chosen(plant: Plant) -> None:
    stages: list[tuple[str, float]] = []
    settings = SubspaceSettings(layers=(2, 0), skip=2)
    plan = fit_subspace(plant, "pca", POSITIVE, NEGATIVE, settings, lambda s, f: stages.append((s, f)))
    assert plan.layers == (0, 2)
    assert plan.leading.shape == plan.trailing.shape == (2, WIDTH, WIDTH)
    assert stages[-1] == ("done", 1.0)
    assert [f for _, f in stages] == sorted(f for _, f in stages)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"leading": 0}, "leading"),
        ({"leading": 129}, "leading"),
        ({"trailing": -1}, "trailing"),
        ({"quantile": 1.0}, "quantile"),
        ({"positions": "first"}, "positions"),
    ],
)
def test_impossible_settings_are_refused_by_name(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as caught:
        SubspaceSettings(**changes)
    assert caught.value.param == param


@pytest.mark.parametrize("layers", [(), (4,), (-1,)])
def test_layers_that_the_model_lacks_are_refused(plant: Plant, layers: tuple[int, ...]) -> None:
    with pytest.raises(SpecError) as caught:
        fit_subspace(plant, "pca", POSITIVE, NEGATIVE, SubspaceSettings(layers=layers))
    assert caught.value.param == "layers"
