"""Heads get the direction that was computed apart, the logistic one scipy's, and are ranked on held-out examples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from steering.errors import ControlError, SpecError
from steering.fit.concept import held_out
from steering.fit.heads import HeadsSettings, Probes, _probes, _quality, _ranked, _unseen, fit_heads, logistic
from steering.plan import HeadsPlan
from steering.plant.capture import capture_means
from steering.plant.plant import Plant
from steering.types import Site
from tests.fit.test_concept import NEGATIVE, POSITIVE
from tests.plans import noise
from tests.plants import tiny, tiny_tokenizer
from tests.tolerances import CORE

H, WIDE = 4, 8
"""Heads of the tiny model, and the width of one."""
HELD = held_out(len(POSITIVE))


@pytest.fixture(scope="module")
def plant() -> Plant:
    return Plant(tiny("llama"), tiny_tokenizer())


@pytest.fixture(scope="module")
def fitted(plant: Plant) -> HeadsPlan:
    return fit_heads(plant, "tone", POSITIVE, NEGATIVE)


def states(plant: Plant, texts: list[str], layer: int) -> torch.Tensor:
    """Each head's output at the last token, (N, H, d)."""
    site = Site("attn_act", layer)
    return capture_means(plant, [plant.encode(t) for t in texts], [site], "last")[site].reshape(-1, H, WIDE).double()


def test_directions_deviations_and_means_are_those_computed_apart(plant: Plant, fitted: HeadsPlan) -> None:
    assert (fitted.layers, fitted.direction.shape) == ((0, 1, 2), (3, H, WIDE))
    for layer in fitted.layers:
        plus, minus = (states(plant, texts, layer) for texts in (POSITIVE, NEGATIVE))
        difference = plus[~HELD].mean(0) - minus[~HELD].mean(0)
        theta = difference / difference.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(fitted.direction[layer].double(), theta, rtol=1e-4, atol=1e-4)
        both = torch.cat([plus, minus])
        z = (both * theta).sum(-1)
        torch.testing.assert_close(fitted.deviation[layer].double(), z.std(0, correction=0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fitted.mean[layer].double(), both.mean(0), **CORE["mean"])
        for found, x in ((fitted.positive, plus), (fitted.negative, minus)):
            torch.testing.assert_close(found[layer].double(), (x * theta).sum(-1).mean(0), rtol=1e-4, atol=1e-5)


def test_accuracy_is_the_share_of_held_out_examples_on_their_side(plant: Plant, fitted: HeadsPlan) -> None:
    for layer in fitted.layers:
        plus, minus = (states(plant, texts, layer) for texts in (POSITIVE, NEGATIVE))
        theta = fitted.direction[layer].double()
        middle = ((plus[~HELD].mean(0) + minus[~HELD].mean(0)) / 2 * theta).sum(-1)
        right = ((plus[HELD] * theta).sum(-1) > middle).double().mean(0)
        right += ((minus[HELD] * theta).sum(-1) < middle).double().mean(0)
        torch.testing.assert_close(fitted.accuracy[layer].double(), right / 2, **CORE["float32"])
    ranked = fitted.accuracy.flatten()[fitted.order.long()]
    assert (ranked.diff() <= 0).all()
    assert fitted.quality["measured_on"] == "held-out"
    assert fitted.quality["accuracy"] >= fitted.quality["random"]["accuracy"]


def cloud(seed: int = 0, n: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """Three heads of width 4 that overlap, with a shift of its own size in each; labels ±1."""
    x = noise(3, 2 * n, 4, seed=seed)
    x[:, :n, 1] += torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64)[:, None]
    return x, torch.cat([torch.ones(n), -torch.ones(n)]).double()


@pytest.mark.parametrize("ridge", [1e-3, 0.5])
def test_logistic_probes_are_scipy_s(ridge: float) -> None:
    x_BND, y = cloud()
    w_BD, b_B = logistic(x_BND, y, ridge)
    for head in range(3):
        x = x_BND[head].numpy()

        def loss(v: np.ndarray, x: np.ndarray = x) -> float:
            return float(np.logaddexp(0, -y.numpy() * (x @ v[:-1] + v[-1])).mean() + ridge / 2 * v[:-1] @ v[:-1])

        found = minimize(loss, np.zeros(5), method="BFGS", options={"gtol": 1e-8})
        np.testing.assert_allclose(np.append(w_BD[head].numpy(), float(b_B[head])), found.x, atol=1e-5)


def test_logistic_probes_are_stationary_where_classes_are_apart() -> None:
    x_BND, y = cloud()
    x_BND[:, :30, 0] += 50  # separable: without the ridge there is no minimum
    w_BD, b_B = (t.requires_grad_() for t in logistic(x_BND, y, 1e-3))
    margin = y * (torch.einsum("bnd,bd->bn", x_BND, w_BD) + b_B[:, None])
    (torch.nn.functional.softplus(-margin).mean(1) + 1e-3 / 2 * w_BD.square().sum(-1)).sum().backward()
    assert max(float(t.grad.abs().max()) for t in (w_BD, b_B) if t.grad is not None) <= 1e-8
    with pytest.raises(ControlError, match="ridge"):
        logistic(x_BND, y, 1e-3, steps=1)


@pytest.mark.parametrize("probe", ["mean_difference", "logistic"])
def test_a_planted_direction_is_found_whatever_the_scale(probe: Any) -> None:
    x, _ = cloud(n=400)
    plus, minus = x[1:2, :400], x[1:2, 400:]
    for size in (1e-3, 1e3):
        found = _probes(size * plus, size * minus, HeadsSettings(probe=probe), None)
        assert float(found.direction_BD[0, 1]) > 0.97
        assert float(found.direction_BD.norm()) == pytest.approx(1.0)
        assert float(found.threshold_B[0]) / size == pytest.approx(1.0, abs=0.1)  # half of the planted 2


def test_a_projection_at_the_threshold_is_half_right() -> None:
    probes = Probes(torch.ones(1, 1), torch.zeros(1))
    assert float(probes.right(torch.tensor([[0.0, 1.0]]), torch.tensor([[-1.0, 2.0]]))) == 0.625


def test_heads_that_know_nothing_are_not_made_good_by_their_choice() -> None:
    """Of five hundred heads of noise the best look right on the few examples that rank them, and only there."""
    probes = Probes(torch.ones(500, 1), torch.zeros(500))
    plus, minus = noise(500, 4, seed=1), noise(500, 4, seed=2)
    right = probes.right(plus, minus)
    unseen = _unseen(probes, plus, minus, 48)
    assert float(right[_ranked(right, right)][:48].mean()) > 0.8
    assert unseen == pytest.approx(0.5, abs=0.1)
    quality = _quality(right.sort().values[-48:], right[:48], right, True, unseen)
    assert "hardly tell" in str(quality["warning"])
    assert _unseen(probes, plus + 9, minus - 9, 48) == 1.0
    assert _unseen(probes, plus[:, :1], minus, 48) is None


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_a_fit_is_whole_in_other_families(family: str) -> None:
    plant = Plant(tiny(family), tiny_tokenizer())
    stages: list[tuple[str, float]] = []
    settings = HeadsSettings(probe="logistic", layers=(2, 0), positions="all", skip=2)
    plan = fit_heads(plant, "tone", POSITIVE, NEGATIVE, settings, lambda s, f: stages.append((s, f)))
    assert HeadsPlan.from_artifact(plan.artifact()).layers == (0, 2)
    assert plan.direction.shape == (2, plant.heads.count, plant.heads.width)
    assert stages[-1] == ("done", 1.0)
    assert [f for _, f in stages] == sorted(f for _, f in stages)
    again = fit_heads(plant, "tone", POSITIVE, NEGATIVE, settings)
    assert again.artifact().fingerprint == plan.artifact().fingerprint


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"probe": "best"}, "probe"),
        ({"ridge": 0.0}, "ridge"),
        ({"ridge": float("nan")}, "ridge"),
        ({"skip": -1}, "skip"),
    ],
)
def test_impossible_settings_are_refused_by_name(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as caught:
        HeadsSettings(**changes)
    assert caught.value.param == param


def test_what_cannot_be_fitted_is_refused_by_name(plant: Plant) -> None:
    with pytest.raises(SpecError) as caught:
        fit_heads(plant, "tone", POSITIVE, NEGATIVE, HeadsSettings(layers=(3,)))
    assert caught.value.param == "layers"
    with pytest.raises(SpecError, match="differ from the negative") as caught:
        fit_heads(plant, "tone", POSITIVE, POSITIVE)
    assert caught.value.param == "positive"
    few = fit_heads(plant, "tone", POSITIVE[:3], NEGATIVE[:3])
    assert few.quality["measured_on"] == "fitted"
    assert "that were fitted" in few.quality["warning"]
