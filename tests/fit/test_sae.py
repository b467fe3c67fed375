"""Autoencoders of a model's states beat a random dictionary, know which class a feature tells, and can be clamped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steering.artifact import Artifact
from steering.demo import MODEL
from steering.demo.contrast import contrast
from steering.errors import SpecError
from steering.fit.autoencoder import CHUNK
from steering.fit.plans import settings_of
from steering.fit.sae import SaeSettings, States, Trained, fit_sae, quality_of, trained
from steering.methods import Sae
from steering.plan import SaePlan
from steering.plant.capture import capture
from steering.plant.plant import Plant
from steering.types import Site
from tests.fit.test_concept import NEGATIVE, POSITIVE
from tests.plants import WIDTH, tiny, tiny_tokenizer

SETTINGS = SaeSettings(skip=2, features=20, steps=40, batch=32, layers=(0, 2))


@pytest.fixture(scope="module")
def plant() -> Plant:
    return Plant(tiny("llama"), tiny_tokenizer())


@pytest.fixture(scope="module")
def fitted(plant: Plant) -> SaePlan:
    return fit_sae(plant, "dictionary", POSITIVE, NEGATIVE, SETTINGS)


def test_a_fit_is_whole_and_reports_beside_its_control(plant: Plant) -> None:
    stages: list[tuple[str, float]] = []
    pauses: list[int] = []
    plan = fit_sae(
        plant, "d", POSITIVE, NEGATIVE, SETTINGS, lambda s, f: stages.append((s, f)), lambda: pauses.append(1)
    )
    assert SaePlan.from_artifact(plan.artifact()).layers == (0, 2)
    assert plan.encoder.shape == plan.decoder.shape == (2, 20, WIDTH)
    assert stages[-1] == ("done", 1.0)
    assert [f for _, f in stages] == sorted(f for _, f in stages)
    assert len(pauses) >= 80
    assert set(plan.quality["random"]) == {"explained_held_out", "auroc"}
    assert plan.quality["measured_on"] == "held-out"
    assert all(len(plan.quality[name]) == 2 for name in ("explained", "explained_held_out", "active", "dead", "auroc"))
    assert plan.provenance["settings"]["layers"] == [0, 2]


def test_the_same_fit_twice_is_the_same_plan(plant: Plant, fitted: SaePlan) -> None:
    again = fit_sae(plant, "dictionary", POSITIVE, NEGATIVE, SETTINGS)
    assert again.artifact().fingerprint == fitted.artifact().fingerprint


def test_with_little_memory_the_blocks_follow_each_other(
    plant: Plant, fitted: SaePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steering.fit.sae.HELD_AT_ONCE", 1)
    stages: list[float] = []
    again = fit_sae(plant, "dictionary", POSITIVE, NEGATIVE, SETTINGS, lambda _, f: stages.append(f))
    assert again.artifact().fingerprint == fitted.artifact().fingerprint
    assert stages == sorted(stages)
    assert stages[-1] == 1.0


def test_activity_is_that_of_the_fitted_examples_tokens(plant: Plant, fitted: SaePlan) -> None:
    """Every fifth example is held out, the first two tokens are not read."""
    site, z = Site("resid_post", 2), {}
    for side, texts in (("positive", POSITIVE), ("negative", NEGATIVE)):
        ids = [plant.encode(text) for i, text in enumerate(texts) if i % 5]
        x = torch.cat(capture(plant, ids, [site], "all", skip=2)[site])
        z[side] = fitted.autoencoder(1).encode(x).double()
    both = torch.cat([z["positive"], z["negative"]])
    torch.testing.assert_close(fitted.peak[1].double(), both.amax(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fitted.rate[1].double(), (both > 0).double().mean(0), rtol=1e-6, atol=1e-6)
    plus, minus = z["positive"], z["negative"]
    told = (plus.mean(0) - minus.mean(0)) / (plus.std(0, correction=0) + minus.std(0, correction=0) + 1e-6)
    torch.testing.assert_close(fitted.selectivity[1].double(), told, rtol=1e-3, atol=1e-4)
    order = fitted.order(1)
    assert bool((fitted.selectivity[1][order].diff() <= 0).all())
    assert bool((fitted.selectivity[1][order] > 0).all())


def test_tokens_are_thinned_evenly(plant: Plant) -> None:
    few = fit_sae(plant, "d", POSITIVE, NEGATIVE, replace(SETTINGS, tokens=30, steps=2))
    assert few.provenance["settings"]["tokens"] == 30
    assert few.quality["held_out_tokens"][0] < 20


def test_defaults_are_one_middle_block_and_four_times_the_width(plant: Plant) -> None:
    plan = fit_sae(plant, "d", POSITIVE[:4], NEGATIVE[:4], SaeSettings(skip=2, steps=1))
    assert (plan.layers, plan.features) == ((1,), 4 * WIDTH)
    assert plan.quality["measured_on"] == "fitted"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tap": "final"}, "tap"),
        ({"features": 1}, "features"),
        ({"features": 2**20}, "features"),
        ({"steps": 0}, "steps"),
        ({"batch": True}, "batch"),
        ({"tokens": 0}, "tokens"),
        ({"l1": -1.0}, "l1"),
        ({"lr": float("nan")}, "lr"),
        ({"seed": -1}, "seed"),
        ({"positions": "first"}, "positions"),
        ({"skip": -1}, "skip"),
    ],
)
def test_impossible_settings_are_refused_by_name(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as caught:
        SaeSettings(**changes)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("given", "param"), [({"layers": (3,)}, "layers"), ({"layers": ()}, "layers"), ({"candidates": 3}, "candidates")]
)
def test_what_the_model_or_the_kind_does_not_have_is_refused(plant: Plant, given: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as caught:
        settings_of("sae", given, plant)
    assert caught.value.param == param


def test_a_class_without_an_ordinary_token_is_refused(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Position 0 alone, and massive as in most models: its mean would be 0/0, and the plan one that no store reads."""
    monkeypatch.setattr("steering.fit.sae.are_massive", lambda x: torch.full(x.shape, len(x) == 1))
    with pytest.raises(SpecError, match="beside position 0") as caught:
        fit_sae(plant, "d", POSITIVE, ["cat", "dog"], SETTINGS)
    assert caught.value.param == "negative"


@pytest.mark.parametrize(
    ("changes", "param"), [({"tokens": 2**18}, "tokens"), ({"batch": 8192, "features": 2**15}, "batch")]
)
def test_a_training_that_does_not_fit_in_memory_is_refused(changes: dict[str, Any], param: str) -> None:
    class Wide:
        depth, width = 4, 8192

    with pytest.raises(SpecError) as caught:
        SaeSettings(**changes).for_model(Wide())  # type: ignore[arg-type]
    assert caught.value.param == param


def test_measuring_pauses_as_training_does(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tokens take seconds to measure too, and whoever cancels does not wait for them."""
    x = torch.randn(4 * CHUNK, WIDTH, generator=torch.Generator().manual_seed(0))
    example = torch.arange(len(x)) // CHUNK
    states = {side: States(x, example, torch.tensor([True, False, False, False])) for side in ("positive", "negative")}
    pauses: list[int] = []
    trained(plant, states, replace(SETTINGS, steps=1), lambda: pauses.append(1), None)
    # Each class and both of them, then both twice and the held-out chunks twice, then all by example.
    assert len(pauses) == 1 + (3 + 3 + 6) + (2 * 6 + 2 * 2) + 2 * 4


def told(**changes: float) -> Trained:
    """Figures that leave no doubt, but for `changes`."""
    good = {"explained": 0.9, "explained_held_out": 0.8, "active": 9.0, "dead": 0.0, "auroc": 0.9, "selectivity": 0.5}
    good |= {"random_explained_held_out": 0.4, "random_auroc": 0.6, "held_out_tokens": 50.0}
    nothing: Any = None
    return Trained(nothing, nothing, nothing, nothing, good | changes)


def test_doubts_are_told() -> None:
    assert "warning" not in quality_of([told()])
    for changes, said in (
        ({"explained_held_out": 0.3}, "random dictionary"),
        ({"dead": 0.95}, "never fire"),
        ({"auroc": 0.6}, "no better than random ones"),
        ({"held_out_tokens": 0.0}, "that were fitted"),
    ):
        assert said in quality_of([told(**changes)])["warning"]


def test_a_plan_that_no_file_may_hold_is_refused_before_anything_runs() -> None:
    class Wide:
        depth, width = 80, 8192

    with pytest.raises(SpecError, match="pass a gigabyte") as caught:
        SaeSettings(features=16384).for_model(Wide())  # type: ignore[arg-type]
    assert caught.value.param == "features"


def test_on_the_embedded_model_it_beats_a_random_dictionary_and_a_clamp_sets_the_feature(tmp_path: Path) -> None:
    """Spanish and English answers, from the fit to the disk to the model's own states."""
    plant = Plant.load(MODEL)
    examples = contrast("spanish", 30, 0)
    settings = SaeSettings(features=128, steps=150, batch=128, positions="answer", layers=(4,))
    fitted = fit_sae(plant, "dictionary", *examples, settings)
    assert fitted.quality["explained_held_out"][0] > fitted.quality["random"]["explained_held_out"][0] + 0.3
    assert fitted.quality["auroc"][0] > 0.75
    assert "warning" not in fitted.quality
    plan = SaePlan.from_artifact(Artifact.load(fitted.artifact().save(tmp_path)))

    class Bench:
        depth, width = plant.depth, plant.width

        def plan(self, name: str, kind: type) -> SaePlan:
            return plan

    term = Sae(plan="dictionary", value=1.0).compile(Bench())  # type: ignore[arg-type]
    (route, law), feature, ae = *term.laws.items(), int(plan.order(0)[0]), plan.autoencoder(0)  # type: ignore[misc]
    before: list[torch.Tensor] = []
    after: list[torch.Tensor] = []

    def steer(x: torch.Tensor) -> torch.Tensor:
        before.append(x[0].clone())
        after.append(law(x[0], x[0]))
        return after[-1][None]

    shell = plant.shell()
    plant.tap(shell, route.write, steer)
    ids = torch.tensor([plant.encode(examples[1][0])])
    with torch.no_grad():
        steered, plain = shell(ids).logits, plant.model(ids).logits
    c, z, moved = (float(plan.peak[0, feature]), ae.encode(before[0])[:, feature], after[0] - before[0])
    # What is added is exactly what takes the activation to c in the decoder, and the encoder sees most of it.
    torch.testing.assert_close(moved, (c - z)[:, None] * ae.writes(torch.tensor([feature])), rtol=1e-3, atol=1e-3)
    assert float((ae.encode(after[0])[1:, feature] / c).median()) > 0.5
    assert float((steered - plain).abs().max()) > 0.1
