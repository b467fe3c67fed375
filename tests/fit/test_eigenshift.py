"""The head's eigen-directions without its SVD, a selection that no sign decides, and a report with its control."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steering.artifact import Artifact
from steering.errors import SpecError
from steering.fit.eigenshift import (
    FINAL,
    Activations,
    EigenshiftSettings,
    _statistics,
    eigen_directions,
    fit_eigenshift,
    head_gram,
    matched,
)
from steering.methods import Eigenshift
from steering.plan import EigenshiftPlan, Selection
from steering.plant.capture import capture
from steering.plant.plant import Plant
from tests.fit.test_concept import NEGATIVE, POSITIVE
from tests.plants import WIDTH, tiny, tiny_tokenizer
from tests.tolerances import CORE

SETTINGS = EigenshiftSettings(components=4, skip=2)


@pytest.fixture(scope="module")
def plant() -> Plant:
    return Plant(tiny("llama"), tiny_tokenizer())  # its head is tied


@pytest.fixture(scope="module")
def fitted(plant: Plant) -> EigenshiftPlan:
    return fit_eigenshift(plant, "tone", POSITIVE, NEGATIVE, SETTINGS)


class Quantised(nn.Module):
    """A head that keeps eight bits and a scale a row, and a bias; its weight is no matrix of numbers."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = torch.arange(len(weight)) * 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.float() * self.scale).mT + self.bias


def test_the_eigen_directions_are_those_of_the_svd(plant: Plant) -> None:
    W = plant.model.get_output_embeddings().weight.double()
    _, sigma, V = torch.linalg.svd(W, full_matrices=False)
    found, directions = eigen_directions(plant)
    torch.testing.assert_close(found, sigma, **CORE["law"])
    cosine = (directions.mT @ V.mT).abs().diagonal()
    torch.testing.assert_close(cosine, torch.ones(WIDTH, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(head_gram(plant, chunk=7), head_gram(plant), **CORE["law"])


def test_a_quantised_head_is_asked_for_products(plant: Plant) -> None:
    model = tiny("llama")
    head = Quantised(model.get_output_embeddings().weight)
    model.set_output_embeddings(head)
    W = head.weight.double() * head.scale.double()
    found = head_gram(Plant(model, tiny_tokenizer()))
    torch.testing.assert_close(found, W.mT @ W, rtol=1e-5, atol=1e-5)  # bias and product in float32
    torch.testing.assert_close(found, head_gram(plant), rtol=0.05, atol=0.05)  # eight bits


def classes(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Example means (N, 4): a shift in 0 behind little noise, a larger one in 1 behind much, more energy in 2."""
    generator = torch.Generator().manual_seed(seed)
    plus, minus = (torch.randn(4000, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = torch.tensor([0.1, 5.0, 1.0, 1.0], dtype=torch.float64)
    shift = torch.tensor([0.5, 2.0, 0.0, 0.0], dtype=torch.float64)
    plus, minus = plus * scale, minus * scale
    plus[:, 2] *= 4
    return plus + shift, minus + torch.tensor([0.1, 0.0, 0.0, 0.0], dtype=torch.float64)


def scores(V: Tensor) -> dict[str, Tensor]:
    both = [Activations(x, x.mT @ x / len(x)) for x in classes()]
    return _statistics(V, *both)


def test_each_score_finds_what_it_is_for() -> None:
    found = scores(torch.eye(4, dtype=torch.float64))
    assert int(found["separation"].argmax()) == 0
    assert int(found["oriented"].argmax()) == 1
    assert int(found["energy"].argmax()) == 2
    assert float(found["energy"][2]) == pytest.approx(16, rel=0.1)
    plus, minus = classes()
    assert float(found["shift"][1]) == pytest.approx(float(plus[:, 1].mean() - minus[:, 1].mean()))
    pooled = ((plus[:, 1].var(correction=0) + minus[:, 1].var(correction=0)) / 2).sqrt()
    assert float(found["pooled"][1]) == pytest.approx(float(pooled))


def test_no_score_depends_on_the_signs_of_the_eigenvectors() -> None:
    """The published rule ranks by signed Δ, whose sign is the eigen-solver's whim."""
    turned = torch.diag(torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64))
    a, b = scores(torch.eye(4, dtype=torch.float64)), scores(turned)
    for name in ("oriented", "separation", "energy"):
        torch.testing.assert_close(a[name], b[name], **CORE["law"])
    torch.testing.assert_close(a["shift"], b["shift"] @ turned, **CORE["law"])


def test_both_classes_are_read_at_equally_many_places() -> None:
    plus = [([1] * n, range(2, n)) for n in (9, 4, 6)]
    minus = [([2] * n, range(2, n)) for n in (5, 12, 3, 7, 8)]
    a, b = matched(plus, minus)
    assert [len(chosen) for _, chosen in a] == [len(chosen) for _, chosen in b] == [1, 3, 6]
    assert all(list(chosen) == list(range(2, 2 + len(chosen))) for _, chosen in (*a, *b))


def test_the_plan_holds_the_difference_of_the_matched_means(plant: Plant, fitted: EigenshiftPlan) -> None:
    """All sentences are of one length, so every position from `skip` on is read; pairs 0, 5 and 10 are held out."""
    means = []
    for texts in (POSITIVE, NEGATIVE):
        ids = [plant.encode(text) for text in texts]
        states = capture(plant, ids, [FINAL], "all", skip=2)[FINAL]
        means.append(torch.stack([states[i].double().mean(0) for i in range(len(ids)) if i % 5]).mean(0))
    torch.testing.assert_close(fitted.shift.double(), fitted.basis.double() @ (means[0] - means[1]), **CORE["mean"])


@pytest.mark.parametrize("selection", ["signed", "separation", "energy"])
def test_a_fit_is_whole_and_reports_beside_its_control(plant: Plant, selection: Selection) -> None:
    stages: list[tuple[str, float]] = []
    plan = fit_eigenshift(
        plant, "tone", POSITIVE, NEGATIVE, replace(SETTINGS, selection=selection), lambda s, f: stages.append((s, f))
    )
    assert EigenshiftPlan.from_artifact(plan.artifact()).selection == selection
    assert (plan.basis.shape, plan.width, plan.depth) == ((4, WIDTH), WIDTH, 3)
    assert float((plan.basis @ plan.control.mT).abs().max()) < 1e-5, "the control is of other components"
    assert set(plan.quality["random"]) == set(plan.quality) - {"measured_on", "random", "pairs", "tokens"}
    assert (plan.quality["measured_on"], plan.quality["pairs"]) == ("held-out", 12)
    assert stages[-1] == ("done", 1.0)
    assert [f for _, f in stages] == sorted(f for _, f in stages)
    if selection == "separation":
        assert plan.quality["separation"] > plan.quality["random"]["separation"]


def test_the_same_fit_twice_is_the_same_plan(plant: Plant, fitted: EigenshiftPlan) -> None:
    again = fit_eigenshift(plant, "tone", POSITIVE, NEGATIVE, SETTINGS)
    assert again.artifact().fingerprint == fitted.artifact().fingerprint


def test_more_components_than_there_are_are_all(plant: Plant) -> None:
    plan = fit_eigenshift(plant, "tone", POSITIVE[:4], NEGATIVE[:3], EigenshiftSettings(components=100, skip=2))
    assert len(plan.basis) == len(plan.control) == WIDTH
    assert (plan.quality["measured_on"], plan.quality["pairs"]) == ("fitted", 3)
    assert plan.quality["shift_share"] == pytest.approx(1.0)
    assert plan.quality["logit_share_positive"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"components": 0}, "components"),
        ({"components": 129}, "components"),
        ({"components": True}, "components"),
        ({"selection": "largest"}, "selection"),
        ({"positions": "first"}, "positions"),
        ({"skip": -1}, "skip"),
    ],
)
def test_impossible_settings_are_refused_by_name(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as caught:
        EigenshiftSettings(**changes)
    assert caught.value.param == param


def test_equal_classes_are_refused(plant: Plant) -> None:
    with pytest.raises(SpecError, match="differ from the negative") as caught:
        fit_eigenshift(plant, "tone", POSITIVE, POSITIVE, SETTINGS)
    assert caught.value.param == "positive"


def test_the_shift_moves_the_model_s_own_logits(plant: Plant, fitted: EigenshiftPlan, tmp_path: Any) -> None:
    """From the disk to the head: h + s V Δ changes the logits by s W V Δ."""
    plan = EigenshiftPlan.from_artifact(Artifact.load(fitted.artifact().save(tmp_path)))

    class Bench:
        depth, width = plant.depth, plant.width

        def plan(self, name: str, kind: type) -> EigenshiftPlan:
            return plan

    (law,) = Eigenshift(plan="tone", shift=-1.0).compile(Bench()).laws.values()  # type: ignore[arg-type]
    head, h = plant.model.get_output_embeddings(), torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    moved = head(law(h, h)) - head(h)
    torch.testing.assert_close(moved, (-head(plan.shift @ plan.basis)).expand_as(moved), rtol=1e-4, atol=1e-5)
