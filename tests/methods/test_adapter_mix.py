"""Adapter mix: each law adds α s B A x, the narrowest key decides, and coefficients are knobs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from steering.errors import SpecError
from steering.methods import AdapterMix, compile_program
from steering.program import Scope
from steering.types import Route, Site
from tests.plans import WIDTH, adapter, noise, stored
from tests.tolerances import CORE
from tests.toy import toy

PLAN = adapter()
BENCH = replace(toy(), plans={"lora": PLAN})
X, Y = noise(5, WIDTH, seed=9), noise(5, WIDTH, seed=10)
Q = Route(Site("attn_in", 1), Site("q_out", 1))
DOWN = Route(Site("mlp_act", 1), Site("mlp_out", 1))
O = Route(Site("attn_act", 3), Site("attn_out", 3))


@pytest.mark.parametrize(("weights", "alphas"), [(1.0, (1, 1, 1)), (-0.5, (-0.5, -0.5, -0.5)), ({"mlp": 2}, (0, 2, 0))])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_the_law_adds_the_low_rank_product(weights: Any, alphas: tuple[float, ...], strength: float) -> None:
    laws = AdapterMix(plan="lora", weights=weights, strength=strength).compile(BENCH).laws
    for route, (_, _, A, B), alpha in zip((Q, DOWN, O), PLAN.factors(), alphas, strict=True):
        assert (route in laws) == (alpha != 0)
        if alpha:
            torch.testing.assert_close(laws[route](Y, X), Y + strength * alpha * X @ A.mT @ B, **CORE["law"])


@pytest.mark.parametrize(
    ("weights", "found"),
    [
        ({"*": 0.5, "layers.1": 2.0}, {"layers.1.q": 2.0, "layers.1.down": 2.0, "layers.3.o": 0.5}),
        ({"*": 0.5, "layers.1": 2.0, "layers.1.q": 3.0}, {"layers.1.q": 3.0, "layers.1.down": 2.0, "layers.3.o": 0.5}),
        ({"attn": 1.0, "layers.2-9.attn": -1.0}, {"layers.1.q": 1.0, "layers.3.o": -1.0}),
        ({"layers.0-1": 1.0}, {"layers.1.q": 1.0, "layers.1.down": 1.0}),
        ({"down": 0.25}, {"layers.1.down": 0.25}),
    ],
)
def test_the_key_that_names_the_fewest_maps_decides(weights: dict[str, float], found: dict[str, float]) -> None:
    assert AdapterMix(plan="lora", weights=weights).coefficients(PLAN) == found


def test_it_acts_at_every_token_and_leaves_no_coordinate_out_unless_asked() -> None:
    term = AdapterMix(plan="lora").compile(BENCH)
    assert (term.scope, term.is_always) == (Scope("all", "all"), True)
    assert not AdapterMix(plan="lora").spare_massive
    assert AdapterMix(plan="lora", apply=Scope("last")).compile(BENCH).scope == Scope("last")


def test_coefficients_share_a_slot_and_adapters_superpose() -> None:
    bench = replace(BENCH, plans={"lora": stored(PLAN), "other": stored(replace(PLAN, name="other", a=-PLAN.a))})
    one, two = (compile_program([AdapterMix(plan="lora", weights=w)], bench) for w in (0.3, {"*": 2.0, "mlp": -1.0}))
    assert one.shape == two.shape
    assert one.fingerprint != two.fingerprint
    both = compile_program([AdapterMix(plan="lora", weights=1.0), AdapterMix(plan="other", weights=1.0)], bench)
    x, y = X.float(), Y.float()
    torch.testing.assert_close(both.laws[O](y, x), y, **CORE["float32"])  # τ − τ


def test_layers_choose_among_the_plan_s() -> None:
    assert set(AdapterMix(plan="lora", layers=(3,)).compile(BENCH).laws) == {O}
    with pytest.raises(SpecError) as caught:
        AdapterMix(plan="lora", layers=(2,)).compile(BENCH)
    assert caught.value.param == "layers"


@pytest.mark.parametrize(
    "key", ["", "layers", "layers.x", "layers.1.", ".q", "layers.1.head", "model.layers.1", "q_proj"]
)
def test_keys_of_another_form_are_refused(key: str) -> None:
    with pytest.raises(SpecError, match=r"keys such as \*") as caught:
        AdapterMix(plan="lora", weights={key: 1.0})
    assert caught.value.param == "weights"


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        ({"*": 1.0, "layers.2": 0.5}, r"such as layers\.1\.q, got 'layers\.2'"),
        ({"gate": 1.0}, "that name linear maps"),
        ({"layers.1": 1.0, "attn": 2.0}, r"one coefficient for layers\.1\.q, got \[.layers\.1., .attn.\]"),
        ({}, "other than 0"),
        (0.0, "other than 0"),
        ({"*": 0}, "other than 0"),
    ],
)
def test_weights_that_mean_nothing_are_refused(weights: Any, wanted: str) -> None:
    with pytest.raises(SpecError, match=wanted) as caught:
        AdapterMix(plan="lora", weights=weights).compile(BENCH)
    assert caught.value.param == "weights"


def test_the_cap_bounds_the_update_of_a_map() -> None:
    laws = AdapterMix(plan="lora", max_effort=0.05).compile(BENCH).laws
    for law in laws.values():
        effort = (law(Y, X) - Y).norm(dim=-1) / X.norm(dim=-1)
        assert 0.01 < float(effort.max()) <= 0.05 * (1 + CORE["bound"])
