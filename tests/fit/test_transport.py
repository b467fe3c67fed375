"""The maps are least squares on sorted samples, and bring held-out texts of one class to where the other's are."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance
from torch import Tensor

from steering.demo import MODEL
from steering.demo.contrast import contrast
from steering.errors import SpecError
from steering.fit.transport import (
    Map,
    TransportSettings,
    distance,
    fit_transport,
    permuted,
    quantiles,
    transport,
)
from steering.plan import TransportPlan
from steering.plant.capture import capture
from steering.plant.plant import Plant
from steering.types import Site
from tests.fit.test_concept import NEGATIVE, POSITIVE
from tests.plants import tiny, tiny_tokenizer
from tests.tolerances import CORE

SETTINGS = TransportSettings()


def samples(n: int, seed: int, mean: float = 0.0, std: float = 1.0, width: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + std * torch.randn(n, width, generator=generator, dtype=torch.float64)


# One block


def test_equals_least_squares_on_sorted_columns() -> None:
    x, y = samples(17, 1, 2.0, 0.5), samples(17, 2, -1.0, 3.0)
    found = transport(x, y, SETTINGS)
    for d in range(3):
        slope, intercept = np.polyfit(np.sort(x[:, d].numpy()), np.sort(y[:, d].numpy()), 1)
        assert float(found.scale_D[d]) == pytest.approx(slope, rel=1e-9)
        assert float(found.shift_D[d]) == pytest.approx(intercept, rel=1e-9)
        assert (float(found.low_D[d]), float(found.high_D[d])) == (float(x[:, d].min()), float(x[:, d].max()))


def test_of_gaussians_the_scale_is_that_of_their_deviations() -> None:
    x, y = samples(20_000, 3, 2.0, 0.5), samples(20_000, 4, -1.0, 3.0)
    found = transport(x, y, SETTINGS)
    torch.testing.assert_close(found.scale_D, torch.full_like(found.scale_D, 6.0), rtol=0.03, atol=0)
    torch.testing.assert_close(found(torch.full((3,), 2.0).double()), torch.full((3,), -1.0).double(), rtol=0, atol=0.1)


def test_an_affine_target_is_recovered_exactly_also_from_fewer_texts_of_the_other_class() -> None:
    x = samples(15, 5)
    found = transport(x, 2.5 * x[torch.randperm(15)] + 1.0, SETTINGS)
    torch.testing.assert_close(found.scale_D, torch.full_like(found.scale_D, 2.5), **CORE["law"])
    torch.testing.assert_close(found.shift_D, torch.full_like(found.shift_D, 1.0), **CORE["law"])
    line = torch.arange(30, dtype=torch.float64)[:, None]
    unequal = transport(line, 3 * line[1::2] - 3 / 2, SETTINGS)  # equally spaced: quantiles lie on the line
    assert float(unequal.scale_D) == pytest.approx(3.0)


def test_the_mean_form_shifts_only() -> None:
    x, y = samples(9, 6, 2.0), samples(12, 7, -1.0, 4.0)
    found = transport(x, y, replace(SETTINGS, form="mean"))
    assert torch.equal(found.scale_D, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(found.shift_D, y.mean(0) - x.mean(0), **CORE["law"])


def test_a_coordinate_that_does_not_vary_is_shifted() -> None:
    x, y = samples(9, 8), samples(9, 9)
    x[:, 1] = 7.0
    found = transport(x, y, SETTINGS)
    assert float(found.scale_D[1]) == 1.0
    assert float(found.shift_D[1]) == pytest.approx(float(y[:, 1].mean()) - 7.0)
    assert bool(torch.isfinite(torch.stack(found)).all())


def test_the_support_is_that_of_the_quantiles() -> None:
    x, y = samples(50, 10), samples(50, 11, 5.0)
    inner = transport(x, y, replace(SETTINGS, low=0.1, high=0.8))
    low, high = np.quantile(x.numpy(), [0.1, 0.8], axis=0)
    np.testing.assert_allclose(inner.low_D.numpy(), low)
    np.testing.assert_allclose(inner.high_D.numpy(), high)
    z = torch.stack([torch.from_numpy(low) - 1e-9, torch.from_numpy(low), torch.from_numpy(high) + 1e-9])
    assert torch.equal(inner(z)[[0, 2]], z[[0, 2]])
    assert not torch.equal(inner(z)[1], z[1])
    everything = transport(x, y, replace(SETTINGS, support="all"))
    assert bool((everything(z) != z).all())
    assert bool((everything(1e30 * z) != 1e30 * z).all())


@given(st.integers(1, 12), st.integers(1, 12))
def test_quantiles_are_sorted_samples_or_numpy_s(n: int, count: int) -> None:
    x = samples(n, n)
    found = quantiles(x, count)
    wanted = np.quantile(x.numpy(), (np.arange(count) + 0.5) / count, axis=0, method="hazen")
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12, atol=1e-12)
    if n == count:
        assert torch.equal(found, x.sort(dim=0).values)


@given(st.integers(2, 9), st.integers(2, 9))
def test_the_distance_is_scipy_s(n: int, m: int) -> None:
    x, y = samples(n, n), samples(m, 20 + m, 1.0, 2.0)
    spread = ((x.var(0, correction=0) + y.var(0, correction=0)) / 2).sqrt()
    slow = [wasserstein_distance(x[:, d].numpy(), y[:, d].numpy()) / float(spread[d]) for d in range(3)]
    assert distance(x, y) == pytest.approx(sum(slow) / 3, rel=1e-9)
    assert distance(x, x) == 0.0


def test_the_control_moves_as_much_in_deviations_of_its_own() -> None:
    """Each coordinate gets another one's change: of mean and of spread, in units of its own spread."""
    x, y = samples(40, 12, width=5), samples(40, 13, 2.0, 3.0, width=5)
    x, y = x * torch.tensor([1.0, 10.0, 0.1, 2.0, 5.0]), y * torch.tensor([1.0, 20.0, 0.2, 2.0, 1.0])
    fitted = transport(x, y, replace(SETTINGS, support="all"))
    order = torch.tensor([3, 0, 4, 1, 2])
    control = permuted(fitted, x, order)

    def change(found: Map) -> tuple[Tensor, Tensor]:
        z, s = found(x), x.std(0, correction=0)
        return (z.mean(0) - x.mean(0)) / s, z.std(0, correction=0) / s

    for ours, theirs in zip(change(control), change(fitted), strict=True):
        torch.testing.assert_close(ours, theirs[order], rtol=1e-9, atol=1e-9)
    whole = permuted(fitted, x, torch.arange(5))
    torch.testing.assert_close(whole.shift_D, fitted.shift_D, rtol=1e-9, atol=1e-9)


def test_a_coordinate_that_varies_by_rounding_lends_its_map_to_no_other() -> None:
    """In its own deviations its shift is millions: the control would be a wreck, and any plan look good beside it."""
    x, y = samples(40, 12, width=2), samples(40, 13, width=2)
    x[:, 0], y[:, 0] = 5 + 1e-9 * x[:, 0], 6 + 1e-9 * y[:, 0]
    control = permuted(transport(x, y, replace(SETTINGS, support="all")), x, torch.tensor([1, 0]))
    assert float((control(x) - x)[:, 1].abs().max()) < 1e-6


# Settings


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"site": "resid_pre"}, "site"),
        ({"form": "cubic"}, "form"),
        ({"support": "none"}, "support"),
        ({"low": -0.1}, "low"),
        ({"high": 1.5}, "high"),
        ({"low": 0.6, "high": 0.5}, "low"),
        ({"low": float("nan")}, "low"),
        ({"positions": "first"}, "positions"),
        ({"skip": -1}, "skip"),
    ],
)
def test_impossible_settings_are_refused_by_name(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as caught:
        TransportSettings(**changes)
    assert caught.value.param == param


@pytest.mark.parametrize("layers", [(), (3,), (-1,)])
def test_impossible_layers_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(SpecError) as caught:
        TransportSettings(layers=layers).for_model(Plant(tiny("llama")))
    assert caught.value.param == "layers"


def test_a_bad_row_is_named() -> None:
    with pytest.raises(SpecError) as caught:
        fit_transport(Plant(tiny("llama"), tiny_tokenizer()), "moved", POSITIVE, ["a cat", ""])
    assert caught.value.param == "negative[1]"


# The whole fit


@pytest.fixture(scope="module")
def plant() -> Plant:
    return Plant(tiny("llama", layers=3), tiny_tokenizer())


def test_shapes_determinism_and_no_trace_left(plant: Plant) -> None:
    first, second = (fit_transport(plant, "moved", POSITIVE, NEGATIVE) for _ in range(2))
    assert first.artifact().fingerprint == second.artifact().fingerprint
    assert TransportPlan.from_artifact(first.artifact()).layers == (0, 1, 2)
    assert first.provenance["settings"] == asdict(SETTINGS) | {"layers": [0, 1, 2]}
    assert not any(module._forward_hooks for module in plant.model.modules())
    other = fit_transport(plant, "moved", POSITIVE, NEGATIVE, TransportSettings(seed=1))
    assert torch.equal(other.scale, first.scale)
    assert not torch.equal(other.control_shift, first.control_shift)


@pytest.mark.parametrize("site", ["resid_post", "mlp_out", "attn_out"])
def test_blocks_are_fitted_under_the_maps_before_them(plant: Plant, site: Any) -> None:
    """By hand: run every source text alone through a tree with the first maps in it, and fit the next block on that."""
    plan = fit_transport(plant, "moved", POSITIVE[:5], NEGATIVE[:5], TransportSettings(site=site, layers=(0, 2)))
    ids = [plant.encode(text) for text in NEGATIVE[:5]]
    shell, seen = plant.shell(), []

    def mapped(z_BTD: Tensor) -> Tensor:
        z = z_BTD.double()
        inside = (z >= plan.low[0]) & (z <= plan.high[0])
        inside[:, 0] = False
        return torch.where(inside, plan.scale[0] * z + plan.shift[0], z).to(z_BTD.dtype)

    plant.tap(shell, Site(site, 0), mapped)
    plant.tap(shell, Site(site, 2), lambda z: seen.append(z[0, 1:].double().mean(0)))
    with torch.no_grad():
        for row in ids:
            shell.base_model(input_ids=torch.tensor([row]), use_cache=False)
    target = capture(plant, [plant.encode(text) for text in POSITIVE[:5]], [Site(site, 2)])[Site(site, 2)]
    y = torch.stack([z.double().mean(0) for z in target])
    expected = transport(torch.stack(seen), y, TransportSettings())
    torch.testing.assert_close(plan.scale[1].double(), expected.scale_D, rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(plan.shift[1].double(), expected.shift_D, rtol=2e-3, atol=2e-4)


def test_on_fitted_examples_the_means_meet(plant: Plant) -> None:
    """With few texts the range of the source is all of it, so every fitted text is mapped: means agree exactly."""
    plan = fit_transport(plant, "moved", POSITIVE[:6], NEGATIVE[:6], TransportSettings(layers=(1,)))
    site = Site("resid_post", 1)
    x, y = (
        torch.stack([z.double().mean(0) for z in capture(plant, [plant.encode(t) for t in texts[:6]], [site])[site]])
        for texts in (NEGATIVE, POSITIVE)
    )
    found = plan.scale[0].double() * x.mean(0) + plan.shift[0].double()
    torch.testing.assert_close(found, y.mean(0), rtol=1e-4, atol=1e-4)
    assert plan.quality["measured_on"] == "fitted"
    assert "very examples" in plan.quality["warning"]


def test_on_the_embedded_model_the_classes_come_nearer_than_by_the_control() -> None:
    plant = Plant.load(MODEL)
    positive, negative = contrast("negative", 60, seed=3)
    plan = fit_transport(plant, "moved", positive, negative, TransportSettings(layers=(3, 5)))
    for before, after, random in zip(
        *(plan.quality["distance"][k] for k in ("before", "after", "random")), strict=True
    ):
        assert after < 0.75 * before
        assert after < 0.75 * random
    assert plan.quality["measured_on"] == "held-out"
    assert "warning" not in plan.quality
    shuffled = [*positive[::2], *negative[::2]], [*positive[1::2], *negative[1::2]]
    idle = fit_transport(plant, "moved", *shuffled, TransportSettings(layers=(3,)))
    assert "no nearer than" in idle.quality["warning"]
