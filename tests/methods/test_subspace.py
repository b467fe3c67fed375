"""Subspaces: the law is the projector around the mean, formed explicitly, and position 0 stays out of `all`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from steering.errors import SpecError
from steering.law import Law
from steering.methods import Subspace
from steering.program import Positions, Scope, Window
from steering.types import at
from tests.plans import WIDTH, noise, subspace
from tests.tolerances import CORE
from tests.toy import toy

PLAN = subspace()
BENCH = replace(toy(), plans={"pca": PLAN})
X = noise(5, WIDTH, seed=9)
EYE = torch.eye(WIDTH, dtype=torch.float64)


def steered(layer: int, plan: Any = PLAN, **fields: Any) -> torch.Tensor:
    term = Subspace(plan="pca", layers=(layer,), **fields).compile(replace(BENCH, plans={"pca": plan}))
    (law,) = term.laws.values()
    return law(X, X)


def projector(rows: torch.Tensor) -> torch.Tensor:
    return rows.mT @ torch.linalg.inv(rows @ rows.mT) @ rows


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("n", [None, 1, 3])
def test_removing_equals_the_projector_around_the_mean(n: int | None, strength: float) -> None:
    mu, P = PLAN.mean[1], projector(PLAN.leading[1, : n or 1])
    expected = X - strength * (X - mu) @ P.mT
    torch.testing.assert_close(steered(2, components=n, strength=strength), expected, **CORE["law"])


@pytest.mark.parametrize("n", [3, 4, 5])
def test_keeping_equals_the_truncated_expansion(n: int) -> None:
    """x' = μ + U_n U_nᵀ (x − μ), with the whole eigenbasis: leading rows, then the trailing ones backwards."""
    U = torch.cat([PLAN.leading[0], PLAN.trailing[0].flip(0)])[:n]
    torch.testing.assert_close(U @ U.mT, torch.eye(n, dtype=torch.float64), **CORE["law"])
    expected = PLAN.mean[0] + (X - PLAN.mean[0]) @ U.mT @ U
    torch.testing.assert_close(steered(1, mode="keep", components=n), expected, **CORE["law"])


def test_keeping_means_the_spikes_by_default() -> None:
    plan = replace(PLAN, spikes=(4, 4, 4))
    torch.testing.assert_close(steered(1, plan, mode="keep"), steered(1, mode="keep", components=4), **CORE["law"])


def test_keeping_by_default_is_within_what_the_plan_can_do() -> None:
    assert PLAN.spikes[0] < WIDTH - PLAN.trailing.shape[1]
    torch.testing.assert_close(steered(1, mode="keep"), steered(1, mode="keep", components=3), **CORE["law"])


def test_the_control_takes_as_many_random_directions_away() -> None:
    term = Subspace(plan="pca", components=2, layers=(1,), control=True).compile(BENCH)
    (law,) = term.laws.values()
    assert isinstance(law, Law)
    torch.testing.assert_close(law.gain @ law.gain.mT, torch.eye(2, dtype=torch.float64), **CORE["law"])
    assert float((law.gain @ PLAN.leading[0].mT).abs().max()) < 0.99
    again = Subspace(plan="pca", components=2, layers=(1,), control=True).compile(BENCH)
    assert torch.equal(next(iter(again.laws.values())).gain, law.gain)  # type: ignore[union-attr]


@pytest.mark.parametrize(("n", "rows"), [(None, [1]), (1, [1]), (2, [1, 0])])
def test_filtering_takes_the_spikes_that_score_most(n: int | None, rows: list[int]) -> None:
    """Row 2 scores most of all and is no spike."""
    P = projector(PLAN.leading[2, rows])
    expected = X - (X - PLAN.mean[2]) @ P.mT
    torch.testing.assert_close(steered(3, mode="filter", components=n), expected, **CORE["law"])


def test_the_mean_is_a_fixed_point() -> None:
    term = Subspace(plan="pca", components=3, layers=(1,)).compile(BENCH)
    (law,) = term.laws.values()
    mu = PLAN.mean[:1]
    torch.testing.assert_close(law(mu, mu), mu, **CORE["law"])
    once = law(X, X)
    torch.testing.assert_close(law(once, once), once, **CORE["law"])


def test_layers_default_to_the_plan_s_and_are_of_the_plan() -> None:
    assert sorted(Subspace(plan="pca").compile(BENCH).laws) == [at("resid_pre", layer) for layer in (1, 2, 3)]
    with pytest.raises(SpecError, match=r"plan 'pca' has, \[1, 2, 3\], got 0") as caught:
        Subspace(plan="pca", layers=(0,)).compile(BENCH)
    assert caught.value.param == "layers"


@pytest.mark.parametrize(
    ("given", "position_0", "compiled"),
    [
        ("all", False, Window((1, 2**31))),
        ("all", True, "all"),
        ("last", False, "last"),
        (Positions((0,)), False, Positions((0,))),
        (Window((0, 2)), False, Window((0, 2))),
    ],
)
def test_position_0_is_left_out_of_all(given: Any, position_0: bool, compiled: Any) -> None:
    term = Subspace(plan="pca", apply=Scope(prompt=given), position_0=position_0).compile(BENCH)
    assert term.scope.prompt == compiled
    if given == "all":
        assert term.scope.prompt_mask(3).tolist() == [position_0, True, True]


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"mode": "invert"}, "mode"), ({"components": 0}, "components"), ({"components": 1.5}, "components")],
)
def test_what_cannot_be_meant_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as caught:
        Subspace(plan="pca", **fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"components": 4}, "at most 3"),
        ({"mode": "keep", "components": 2}, "3 to 6, for plan 'pca' can take 3 away, got 2"),
        ({"mode": "keep", "components": 7}, "3 to 6"),
        ({"mode": "filter", "components": 3}, "at most 2, the spikes .* at block 1"),
    ],
)
def test_what_the_plan_does_not_have_is_refused(fields: dict[str, Any], wanted: str) -> None:
    with pytest.raises(SpecError, match=wanted) as caught:
        Subspace(plan="pca", **fields).compile(BENCH)
    assert caught.value.param == "components"


def test_what_would_change_nothing_is_refused() -> None:
    with pytest.raises(SpecError, match="has an effect") as caught:
        Subspace(plan="pca", mode="keep", components=6).compile(BENCH)
    assert caught.value.param == "plan"


def test_the_cap_bounds_the_whole_control() -> None:
    effort = (steered(1, components=3, max_effort=0.05) - X).norm(dim=-1) / X.norm(dim=-1)
    assert 0.02 < float(effort.max()) <= 0.05 * (1 + CORE["bound"])
