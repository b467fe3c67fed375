"""One table of fits: settings by kind, refused by name, and a warning where a plan is no better than chance."""

from __future__ import annotations

from typing import Any

import pytest

from steering.errors import SpecError
from steering.fit import FitSettings
from steering.fit.eigenshift import EigenshiftSettings
from steering.fit.plans import checked_rows, fit_plan, plan_warning, settings_of
from steering.fit.subspace import SubspaceSettings
from steering.plan import PLANS
from steering.plant.plant import Plant
from tests.fit.test_concept import NEGATIVE, POSITIVE
from tests.plants import tiny, tiny_tokenizer


def test_settings_are_of_their_kind() -> None:
    assert settings_of("concept", {"q": 2.0}) == FitSettings(q=2.0)
    assert settings_of("eigenshift", {"components": 3}) == EigenshiftSettings(components=3)
    assert settings_of("subspace", {"layers": (1,)}, Plant(tiny("llama"))) == SubspaceSettings(layers=(1,))


@pytest.mark.parametrize(
    ("kind", "given", "param"),
    [
        ("nonesuch", {}, "kind"),
        ("eigenshift", {"q": 1.0}, "q"),
        ("concept", {"components": 3}, "components"),
        ("subspace", {"selection": "signed"}, "selection"),
        ("subspace", {"layers": (99,)}, "layers"),
        ("concept", {"layers": (99,)}, "layers"),
        ("eigenshift", {"components": 0}, "components"),
        ("eigenshift", {"seed": 2**63}, "seed"),
        ("neurons", {"seed": -(2**63) - 1}, "seed"),
    ],
)
def test_what_a_kind_does_not_have_is_refused_by_name(kind: str, given: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as caught:
        settings_of(kind, given, Plant(tiny("llama")))
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("kind", "positive", "negative", "param"),
    [
        ("act_add", ["love", "joy"], ["hate"], "positive"),
        ("act_add", ["love"], ["hate", "woe"], "negative"),
        ("language", ["uno", "dos"], ["one", "two", "three"], "negative"),
        ("sparsity", ["one two", "three four"], ["five"], "negative"),
        ("channels", ["one"], [], "positive"),
        ("heads", ["one", "two"], [], "negative"),
    ],
)
def test_classes_of_a_wrong_size_are_refused_before_the_fit(
    kind: str, positive: list[str], negative: list[str], param: str
) -> None:
    plant = Plant(tiny("llama"), tiny_tokenizer())
    with pytest.raises(SpecError) as caught:
        checked_rows(plant, kind, settings_of(kind, {}), positive, negative)
    assert caught.value.param == param


@pytest.mark.parametrize("kind", ["eigenshift", "subspace"])
def test_a_fit_gives_a_plan_of_its_kind(kind: str) -> None:
    plant = Plant(tiny("llama"), tiny_tokenizer())
    settings: Any = settings_of(kind, {"skip": 2})
    plan = fit_plan(plant, "tone", POSITIVE, NEGATIVE, settings)
    assert type(plan) is PLANS[kind]
    assert (plan.name, plan.model, plan.provenance["examples"]) == (
        "tone",
        plant.fingerprint,
        {"positive": 12, "negative": 12},
    )


def test_doubts_are_told() -> None:
    good = {"auroc": 0.9, "separation": 2.0, "measured_on": "held-out", "random": {"separation": 1.0}}
    assert plan_warning({"spikes": [3]}) is None
    assert plan_warning(good) is None
    assert "do not tell the classes apart" in str(plan_warning({**good, "auroc": 0.6}))
    assert "no better than random" in str(plan_warning({**good, "separation": 1.0}))
    assert "that were fitted" in str(plan_warning({**good, "measured_on": "fitted"}))
