"""Thresholds are quantiles, rests are R-Sparse's, a perplexity that was asked for is met, and chance does worse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from steering.edit import Mask, Sparse
from steering.errors import PlantError, SpecError
from steering.fit.plans import FITS, fit_plan, settings_of
from steering.fit.quantiles import rest_basis, tabled
from steering.fit.sparsity import LEVELS, SparsitySettings, fit_sparsity
from steering.fit.trial import Row, Trial, calibration, ratio
from steering.plan import SparsityPlan
from steering.plan.sparsity import SPARSE_TAPS
from steering.plant.capture import capture
from steering.plant.plant import Plant
from steering.types import Site
from tests.fit.calibration import TEXTS, loss_by_hand, own_texts
from tests.plans import noise
from tests.plants import FAMILIES, tiny, tiny_tokenizer
from tests.tolerances import CORE, FIT


@pytest.fixture(scope="module")
def plant() -> Plant:
    return Plant(tiny("llama"), tiny_tokenizer())


@pytest.fixture(scope="module")
def fitted(plant: Plant) -> SparsityPlan:
    return fit_sparsity(plant, "light", TEXTS)


def held_in(plant: Plant) -> list[Row]:
    return calibration(plant, TEXTS, tokens=4096, longest=512)[1].fitted


def scores(plant: Plant, site: Site) -> torch.Tensor:
    """|x_i| ‖W_:,i‖ of the held-in texts (tokens, E)."""
    x = torch.cat(capture(plant, [ids for ids, _ in held_in(plant)], [site])[site])
    return x.abs() * torch.cat(plant.linears_at(site)).norm(dim=0)


# Scores and rests


def test_weights_are_norms_of_all_maps_that_read_a_site(plant: Plant, fitted: SparsityPlan) -> None:
    assert fitted.sites == SPARSE_TAPS
    for row, layer in enumerate(fitted.layers):
        for s, tap in enumerate(SPARSE_TAPS):
            W = torch.cat(plant.linears_at(Site(tap, layer)))
            torch.testing.assert_close(fitted.weight[row, fitted.span(s)], W.norm(dim=0))
            assert fitted.size[s] == W.numel()
    plain = fit_sparsity(plant, "light", TEXTS, (), SparsitySettings(score="magnitude"))
    assert bool((plain.weight == 1).all())


def test_thresholds_are_order_statistics(plant: Plant, fitted: SparsityPlan) -> None:
    for row, layer in enumerate(fitted.layers):
        for s, tap in enumerate(SPARSE_TAPS):
            pooled = scores(plant, Site(tap, layer)).flatten().double().numpy()
            expected = np.quantile(pooled, LEVELS, method="inverted_cdf")
            np.testing.assert_allclose(fitted.threshold[row, s].numpy(), expected, rtol=1e-4)


def test_quantiles_come_alike_in_one_pass_and_in_many(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    one = tabled(plant, held_in(plant), (0, 2), SPARSE_TAPS, score="wina")
    monkeypatch.setattr("steering.fit.quantiles.POOLED", 1)
    many = tabled(plant, held_in(plant), (0, 2), SPARSE_TAPS, score="wina")
    for a, b in zip(one.quantile, many.quantile, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("outer", "inner"), [(9, 14), (14, 9)])
def test_a_rest_is_the_low_rank_path_of_what_is_left_out(outer: int, inner: int) -> None:
    """R-Sparse's W(m⊙x) + U_r S_r V_rᵀ((1−m)⊙x), formed by numpy's decomposition, is W of the edited input."""
    W, x = noise(outer, inner, seed=1), noise(5, inner, seed=2)
    basis = rest_basis([W[: outer // 2], W[outer // 2 :]], 3)
    U, S, Vt = np.linalg.svd(W.numpy())
    m = (x.abs() > 0.7).double().numpy()
    low_rank = U[:, :3] * S[:3] @ Vt[:3]
    expected = (m * x.numpy()) @ W.numpy().T + ((1 - m) * x.numpy()) @ low_rank.T
    exact = Sparse.of(torch.ones(inner, dtype=torch.float64), threshold=0.7, rest=torch.from_numpy(Vt[:3]))
    np.testing.assert_allclose((exact(x, x) @ W.mT).numpy(), expected, **CORE["law"])
    found = torch.from_numpy(Vt[:3]) @ basis.double().mT
    np.testing.assert_allclose(np.abs(np.linalg.det(found.numpy())), 1.0, rtol=1e-5)
    assert rest_basis([W], 0).shape == (0, inner)


def test_what_counts_most_is_kept(plant: Plant, fitted: SparsityPlan) -> None:
    """At one sparsity the maps' outputs move least by WINA's score, more by magnitude, most by chance."""
    site = Site("mlp_act", 1)
    x = torch.cat(capture(plant, [ids for ids, _ in held_in(plant)], [site])[site])
    (W,) = plant.linears_at(site)
    W = W * torch.linspace(0.1, 3, W.shape[1])  # columns of unlike norms
    k = x.shape[1] // 2
    masks = [Sparse.of(w, count=k) for w in (W.norm(dim=0), torch.ones(x.shape[1]))]
    gone = torch.ones(x.shape[1])
    gone[torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))[:k]] = 0
    errors = [float(((edit(x, x) - x) @ W.mT).norm()) for edit in (*masks, Mask.of(gone))]
    assert errors == sorted(errors)
    assert errors[0] < 0.8 * errors[1]


# What is promised


def test_the_share_that_goes_is_the_share_asked_for(plant: Plant) -> None:
    """On the very texts that were fitted: exact where no other site is sparse before it, near it elsewhere."""
    given: dict[str, Any] = {"sparsity": 0.4}
    first = fit_sparsity(plant, "light", TEXTS[:8], (), SparsitySettings(sites=("attn_in",), layers=(0,), **given))
    assert first.quality["measured_on"] == "fitted"
    assert first.quality["realised"] == pytest.approx(0.4, abs=1e-3)
    for rule, near in (("threshold", 0.04), ("top_k", 0.5 / 32)):
        plan = fit_sparsity(plant, "light", TEXTS[:8], (), SparsitySettings(rule=rule, **given))  # type: ignore[arg-type]
        torch.testing.assert_close(plan.realised, torch.full_like(plan.realised, 0.4), rtol=0, atol=near)


def test_figures_are_of_the_modules_by_hand(plant: Plant, fitted: SparsityPlan) -> None:
    measured = calibration(plant, TEXTS, tokens=4096, longest=512)[1].measured
    keeps = {}
    for row, layer in enumerate(fitted.layers):
        for s, tap in enumerate(SPARSE_TAPS):
            threshold = float(fitted.threshold[row, s, fitted.levels.index(0.5)])
            weight = fitted.weight[row, fitted.span(s)]
            keeps[Site(tap, layer)] = lambda x, w=weight, t=threshold: (x.abs() * w > t).float()
    dense, sparse = loss_by_hand(plant, measured, {}), loss_by_hand(plant, measured, keeps)
    assert fitted.quality["perplexity_ratio"] == pytest.approx(ratio(sparse, dense), abs=FIT["perplexity_ratio"])
    assert fitted.quality["perplexity"] == pytest.approx(ratio(dense, 0.0), rel=1e-3)
    assert fitted.quality["perplexity_ratio_at"]["0.5"] == fitted.quality["perplexity_ratio"]


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ({"sites": ("mlp_act",), "allocation": "cett"}, FIT["perplexity_met"]),
        ({"sites": ("mlp_in", "attn_in")}, FIT["perplexity_step"]),
        ({"rule": "top_k"}, FIT["perplexity_step"]),
    ],
    ids=["cett", "two sites", "top_k"],
)
def test_the_perplexity_asked_for_is_met_on_the_fitted_texts(plant: Plant, given: dict[str, Any], near: float) -> None:
    asked, texts = 0.05, own_texts(plant, 9)
    plan = fit_sparsity(plant, "light", texts, (), SparsitySettings(perplexity_increase=asked, **given))
    told = plan.quality["perplexity_increase"]
    rows = [Row(plant.encode(text), 1) for text in texts]
    trial = Trial(plant, rows, list(plan.edits(0.5)), [1] * len(rows))
    risen = ratio(trial.loss(plan.edits(plan.target)), trial.loss()) - 1
    assert told["asked"] == asked
    assert risen == pytest.approx(told["fitted"], abs=2e-5)
    assert 0.05 < plan.target < 0.9
    assert risen == pytest.approx(asked, abs=near)


def test_one_tail_error_holds_in_every_block(plant: Plant) -> None:
    """Sparsing Law's CETT at the plan's thresholds, formed here, is the one that the plan tells."""
    settings = SparsitySettings(sites=("mlp_act",), allocation="cett", sparsity=0.6)
    plan = fit_sparsity(plant, "light", TEXTS, (), settings)
    level = plan.levels.index(0.6)
    assert float(plan.share[:, 0, level].mean()) == pytest.approx(0.6, abs=1e-6)
    found = []
    for row, layer in enumerate(plan.layers):
        site = Site("mlp_act", layer)
        h = torch.cat(capture(plant, [ids for ids, _ in held_in(plant)], [site])[site])
        (W,) = plant.linears_at(site)
        tail = h.where(h.abs() * W.norm(dim=0) <= plan.threshold[row, 0, level], 0.0)
        found.append(float(((tail @ W.mT).norm(dim=-1) / (h @ W.mT).norm(dim=-1)).mean()))
    assert found == pytest.approx([plan.quality["cett"]] * len(found), abs=0.01)
    assert plan.share[:, 0, level].std() > 0


def test_greedy_shares_move_the_blocks_less(plant: Plant) -> None:
    uniform, greedy = (
        fit_sparsity(plant, "light", TEXTS, (), SparsitySettings(allocation=a, step=0.25, layers=(1,)))  # type: ignore[arg-type]
        for a in ("uniform", "greedy")
    )
    rows = held_in(plant)
    trial = Trial(plant, rows, list(uniform.edits(0.5)), [1] * len(rows))
    trial.note_blocks()
    plain = trial.block(1)
    moved = [float((trial.block(1, plan.edits(0.5)) - plain).norm(dim=-1).mean()) for plan in (uniform, greedy)]
    assert moved[1] < moved[0]
    size = torch.tensor(greedy.size).double()
    for m, level in enumerate(greedy.levels):
        assert float(greedy.share[0, :, m].double() @ size / size.sum()) == pytest.approx(level, abs=1e-6)


def test_a_dense_beginning_is_neither_edited_nor_counted(plant: Plant) -> None:
    settings = SparsitySettings(dense_share=0.5)
    rows = [Row([1] * 10, 1), Row([1] * 3, 1), Row([1] * 7, 1)]
    assert settings.first(rows) == [5, 1, 4]
    assert SparsitySettings().first(rows) == [1, 1, 1]
    half = fit_sparsity(plant, "light", TEXTS, (), settings)
    whole = fit_sparsity(plant, "light", TEXTS)
    assert half.quality["perplexity"] != whole.quality["perplexity"]
    assert torch.equal(half.threshold, whole.threshold)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_sites(family: str) -> None:
    plant = Plant(tiny(family), tiny_tokenizer())
    plan = fit_sparsity(plant, "light", TEXTS, (), SparsitySettings(tokens=64, rank=2))
    assert plan.sites == (SPARSE_TAPS[:2] if family == "mixtral" else SPARSE_TAPS)
    assert plan.widths == tuple(plant.width_of(Site(tap, 0)) for tap in plan.sites)  # type: ignore[arg-type]
    assert SparsityPlan.from_artifact(plan.artifact()).target == 0.5
    assert plan.rest.shape == (plant.depth, 2, sum(plan.widths))


def test_the_embedded_model_can_do_without_half() -> None:
    """Of what its maps read; not without a random half."""
    from steering.demo import MODEL
    from steering.demo.documents import documents

    plant = Plant.load(MODEL)
    rows: Any = [list(document.messages) for document in documents(991, 40) if document.messages]
    plan = fit_sparsity(plant, "light", rows, (), SparsitySettings(tokens=400, longest=96))
    assert plan.quality["perplexity_ratio"] < 1.06
    assert plan.quality["random"]["perplexity_ratio"] > 3
    assert plan.quality["realised"] == pytest.approx(0.5, abs=0.03)
    assert "warning" not in plan.quality


# The fit


def test_a_fit_repeats_itself_and_gives_way(plant: Plant, fitted: SparsityPlan) -> None:
    stages: list[tuple[str, float]] = []
    pauses = 0

    def pause() -> None:
        nonlocal pauses
        pauses += 1

    again = fit_sparsity(plant, "light", TEXTS, (), None, lambda stage, done: stages.append((stage, done)), pause)
    assert again.artifact().fingerprint == fitted.artifact().fingerprint
    assert stages[-1] == ("done", 1.0)
    assert [done for _, done in stages] == sorted(done for _, done in stages)
    assert pauses > 50
    other = fit_sparsity(plant, "light", TEXTS, (), SparsitySettings(seed=1))
    assert not torch.equal(other.control, fitted.control)


def test_it_is_in_the_table_of_fits(plant: Plant) -> None:
    assert FITS["sparsity"].least == (2, 0)
    settings = settings_of("sparsity", {"sparsity": 0.3, "sites": ("mlp_act",)}, plant)
    plan = fit_plan(plant, "light", TEXTS, [], settings)
    assert isinstance(plan, SparsityPlan)
    assert (plan.target, plan.sites, plan.provenance["examples"]) == (0.3, ("mlp_act",), {"positive": 14})
    assert plan.levels == LEVELS


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"sparsity": 0.0}, "sparsity"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": float("nan")}, "sparsity"),
        ({"score": "teal"}, "score"),
        ({"rule": "random"}, "rule"),
        ({"sites": ()}, "sites"),
        ({"sites": ("mlp_out",)}, "sites"),
        ({"layers": (9,)}, "layers"),
        ({"layers": ()}, "layers"),
        ({"allocation": "best"}, "allocation"),
        ({"allocation": "cett"}, "allocation"),
        ({"allocation": "cett", "sites": ("mlp_act",), "score": "magnitude"}, "allocation"),
        ({"step": 0.0}, "step"),
        ({"step": 0.001}, "step"),
        ({"perplexity_increase": 0.0}, "perplexity_increase"),
        ({"rank": -1}, "rank"),
        ({"rank": 33}, "rank"),
        ({"dense_share": 1.0}, "dense_share"),
        ({"tokens": 1.5}, "tokens"),
        ({"longest": 3}, "longest"),
        ({"seed": -1}, "seed"),
        ({"other": 1}, "other"),
    ],
)
def test_impossible_settings_are_refused_by_name(plant: Plant, given: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as caught:
        settings_of("sparsity", given, plant)
    assert caught.value.param == param


def test_activations_that_do_not_fit_in_memory_are_refused(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    width = sum(plant.width_of(Site(tap, 0)) for tap in SPARSE_TAPS)
    monkeypatch.setattr("steering.fit.sparsity.MAX_NUMBERS", 100 * width)
    settings_of("sparsity", {"tokens": 100}, plant)
    with pytest.raises(SpecError, match="at most 100 at these sites") as caught:
        settings_of("sparsity", {"tokens": 101}, plant)
    assert caught.value.param == "tokens"


def test_impossible_examples_are_refused_by_name(plant: Plant) -> None:
    for positive, negative, param in (
        (TEXTS, TEXTS, "negative"),
        ([], [], "positive"),
        ([TEXTS[0], " "], [], "positive[1]"),
    ):
        with pytest.raises(SpecError) as caught:
            fit_sparsity(plant, "light", positive, negative)
        assert caught.value.param == param
    experts = Plant(tiny("mixtral"), tiny_tokenizer())
    with pytest.raises(SpecError) as missing:
        settings_of("sparsity", {"sites": ("mlp_act",)}, experts)
    assert missing.value.param == "sites"
    with pytest.raises(PlantError):
        fit_sparsity(Plant(tiny("llama")), "light", TEXTS)  # no tokenizer


def test_doubts_are_told(plant: Plant) -> None:
    few = fit_sparsity(plant, "light", TEXTS[:8])
    assert "that were fitted" in few.quality["warning"] or "at random" in few.quality["warning"]
    assert replace(few, quality={}).quality == {}
