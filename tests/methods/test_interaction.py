"""Interaction: the law is x C_kept C⁺_kept around the mean, formed explicitly; the control is the projector."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from steering.errors import SpecError
from steering.methods import Interaction
from steering.program import Positions, Scope, Window
from steering.types import at
from tests.plans import WIDTH, interaction, noise, oblique
from tests.tolerances import CORE
from tests.toy import toy

PLAN = interaction()
BENCH = replace(toy(), plans={"local": PLAN})
X = noise(5, WIDTH, seed=9)


def steered(layer: int, plan: Any = PLAN, **fields: Any) -> torch.Tensor:
    term = Interaction(plan="local", layers=(layer,), **fields).compile(replace(BENCH, plans={"local": plan}))
    (law,) = term.laws.values()
    return law(X, X)


def kept(layer: int, features: list[int]) -> torch.Tensor:
    """μ + (x − μ) C C⁺ of some features."""
    (C, inverse), mu = oblique(layer), PLAN.mean[layer - 1]
    return mu + (X - mu) @ C[:, features] @ inverse[features]


@pytest.mark.parametrize(
    ("components", "left"), [(None, [1, 2, 3, 4, 5]), (1, [1, 2, 3, 4, 5]), (3, [3, 4, 5]), ((2, 0), [1, 3, 4, 5])]
)
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_removing_leaves_the_other_features(components: Any, left: list[int], strength: float) -> None:
    expected = X + strength * (kept(2, left) - X)
    torch.testing.assert_close(steered(2, components=components, strength=strength), expected, **CORE["law"])


@pytest.mark.parametrize("n", [None, 4, 5])
def test_keeping_leaves_the_leading_features(n: int | None) -> None:
    torch.testing.assert_close(steered(1, mode="keep", components=n), kept(1, list(range(n or 4))), **CORE["law"])


def test_it_is_oblique_and_idempotent() -> None:
    (C, _), row = oblique(1), 0
    orthogonal = PLAN.gain[row, :1]
    other = X - (X - PLAN.mean[row]) @ orthogonal.mT @ orthogonal
    assert float((steered(1) - other).norm()) > 0.1
    (law,) = Interaction(plan="local", components=3, layers=(1,)).compile(BENCH).laws.values()
    once = law(X, X)
    torch.testing.assert_close(law(once, once), once, **CORE["law"])
    features = (once - PLAN.mean[row]) @ C
    torch.testing.assert_close(features[:, :3], torch.zeros(5, 3, dtype=torch.float64), **CORE["law"])
    torch.testing.assert_close(features[:, 3:], ((X - PLAN.mean[row]) @ C)[:, 3:], **CORE["law"])


@pytest.mark.parametrize(("mode", "components"), [("remove", 2), ("keep", 5)])
def test_the_control_takes_as_many_principal_components(mode: Any, components: int) -> None:
    basis = PLAN.pca[1, :2] if mode == "remove" else PLAN.pca_rest[1, :1]
    expected = X - (X - PLAN.mean[1]) @ basis.mT @ basis
    torch.testing.assert_close(steered(2, mode=mode, components=components, control=True), expected, **CORE["law"])


def test_layers_and_position_0() -> None:
    assert sorted(Interaction(plan="local").compile(BENCH).laws) == [at("resid_pre", layer) for layer in (1, 2, 3)]
    given = {"all": Window((1, 2**31)), "last": "last", Positions((0,)): Positions((0,))}
    for prompt, compiled in given.items():
        assert Interaction(plan="local", apply=Scope(prompt)).compile(BENCH).scope.prompt == compiled  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"mode": "filter"}, "mode"),
        ({"components": 0}, "components"),
        ({"components": True}, "components"),
        ({"components": ()}, "components"),
        ({"components": (-1,)}, "components"),
        ({"components": (1,), "mode": "keep"}, "components"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as caught:
        Interaction(plan="local", **fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"components": 4}, "at most 3"),
        ({"components": (0, 3)}, "at most 3"),
        ({"mode": "keep", "components": 3}, "4 to 6, for plan 'local' can take 2 away, got 3"),
        ({"mode": "keep", "components": 7}, "4 to 6"),
    ],
)
def test_what_the_plan_does_not_have_is_refused(fields: dict[str, Any], wanted: str) -> None:
    with pytest.raises(SpecError, match=wanted) as caught:
        Interaction(plan="local", **fields).compile(BENCH)
    assert caught.value.param == "components"


def test_keeping_everything_is_refused() -> None:
    with pytest.raises(SpecError, match="has an effect") as caught:
        Interaction(plan="local", mode="keep", components=6).compile(BENCH)
    assert caught.value.param == "plan"


@pytest.mark.parametrize("control", [False, True])
def test_the_cap_bounds_the_whole_control(control: bool) -> None:
    effort = (steered(1, components=3, max_effort=0.05, control=control) - X).norm(dim=-1) / X.norm(dim=-1)
    assert 0.005 < float(effort.max()) <= 0.05 * (1 + CORE["bound"])
