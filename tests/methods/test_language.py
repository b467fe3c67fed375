"""The laws of a window are the published move, formed in the autoencoder's space and decoded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from steering.errors import SpecError
from steering.methods import Language, compile_program
from steering.types import at
from tests.plans import WIDTH, language, noise, sae, stored
from tests.tolerances import CORE
from tests.toy import toy

PLAN, DICTIONARY = language(), sae()
BENCH = replace(toy(), plans={"castellano": PLAN})
H = 3 * noise(50, WIDTH, seed=130)


def steered(layer: int, **fields: Any) -> Tensor:
    law = Language(plan="castellano", **fields).compile(BENCH).laws[at("resid_post", layer)]
    return law(H, H)


def oracle(row: int, lam: float, beta: float, *, contrast: bool = True) -> Tensor:
    """Δz = λ m t − λβ (z·s) s over the kept features, zero elsewhere; h + decode(Δz) from the whole autoencoder."""
    ae, k = DICTIONARY.autoencoder(row), PLAN.counts[row]
    kept = PLAN.number[row, :k].long()
    z = ae.encode(H)[:, kept]
    t, s = PLAN.target[row, :k], PLAN.source[row, :k]
    size = float(PLAN.shift[row]) if contrast else 1.0
    delta = torch.zeros(len(H), DICTIONARY.features, dtype=torch.float64)
    delta[:, kept] = lam * size * t - lam * beta * (z @ s)[:, None] * s
    return H + ae.decode(delta) - ae.decode(torch.zeros_like(delta))


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("lam", [1.0, 4.0, 0.5])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("units", ["contrast", "absolute"])
def test_equals_the_move_decoded(layer: int, lam: float, beta: float, units: Any) -> None:
    wanted = oracle(layer - 1, lam, beta, contrast=units == "contrast")
    torch.testing.assert_close(steered(layer, strength=lam, suppress=beta, units=units), wanted, **CORE["law"])


def test_channels_are_one_and_those_that_the_source_weighs() -> None:
    term = Language(plan="castellano", suppress=0.5).compile(BENCH)
    assert {str(route.write): law.rank for route, law in term.laws.items()} == {"resid_post.1": 4, "resid_post.2": 3}
    assert {law.rank for law in Language(plan="castellano").compile(BENCH).laws.values()} == {1}
    deaf = replace(PLAN, source=torch.tensor([[1.0, 0, 0], [0, 1.0, 0]], dtype=torch.float64))
    bench = replace(BENCH, plans={"castellano": deaf})
    assert {law.rank for law in Language(plan="castellano", suppress=1.0).compile(bench).laws.values()} == {2}


def test_the_control_has_the_control_s_features() -> None:
    k, ae = PLAN.counts[0], DICTIONARY.autoencoder(0)
    writes = ae.writes(torch.tensor([0, 5, 8]))
    wanted = H + float(PLAN.shift[0]) * (PLAN.target[0, :k] @ writes)
    torch.testing.assert_close(steered(1, control=True), wanted, **CORE["law"])


def test_a_window_may_be_cut_and_the_strengths_share_a_slot() -> None:
    assert list(Language(plan="castellano", layers=(2,)).compile(BENCH).laws) == [at("resid_post", 2)]
    bench = replace(BENCH, plans={"castellano": stored(PLAN)})
    made = [
        Language(plan="castellano", strength=a, suppress=0.5, units=u)
        for a in (1.0, 3.0)
        for u in ("contrast", "absolute")
    ]
    assert len({compile_program([one], bench).shape for one in made}) == 1


def test_the_cap_bounds_the_whole_control() -> None:
    moved = steered(1, strength=10.0, suppress=1.0, max_effort=0.05)
    effort = (moved - H).norm(dim=-1) / H.norm(dim=-1)
    assert 0.01 < float(effort.max()) <= 0.05 * (1 + CORE["bound"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"suppress": -0.1}, "suppress"), ({"suppress": float("nan")}, "suppress"), ({"units": "sigma"}, "units")],
)
def test_what_cannot_be_meant_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as caught:
        Language(plan="castellano", **fields)
    assert caught.value.param == param
