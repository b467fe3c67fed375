"""A clamp is encode, edit, decode the difference, for ReLU and JumpReLU alike; the rest of the state stays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from steering.errors import SpecError
from steering.methods import Sae, compile_program
from steering.plan import SaePlan
from steering.program import Positions, Scope, Window
from steering.types import at
from tests.plans import WIDTH, noise, sae, stored
from tests.tolerances import CORE
from tests.toy import toy

PLAN = sae()
BENCH = replace(toy(), plans={"dictionary": PLAN})
H = 3 * noise(50, WIDTH, seed=120)


def law_of(layer: int, plan: SaePlan = PLAN, **fields: Any) -> Any:
    term = Sae(plan="dictionary", layers=(layer,), **fields).compile(replace(BENCH, plans={"dictionary": plan}))
    return term.laws[at("resid_post", layer)]


def oracle(row: int, features: list[int], values: Tensor, mode: str, strength: float = 1.0) -> Tensor:
    """Encode all features of H, change some, decode both, add the difference; from the stored tensors alone."""
    s, d = PLAN.scale[row], PLAN.decoder[row]
    p = H / s @ PLAN.encoder[row].mT + PLAN.encoder_bias[row]
    z = torch.where(p > PLAN.threshold[row], p, 0.0)
    edited = z.clone()
    edited[:, features] = values if mode != "add" else z[:, features] + values
    before, after = (s * (PLAN.decoder_bias[row] + a @ d) for a in (z, edited))
    return H + strength * (after - before)


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("mode", ["clamp", "add", "ablate"])
@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("features", [(4,), (8, 0, 3), tuple(range(9))])
def test_equals_encode_edit_decode(layer: int, mode: Any, features: tuple[int, ...], strength: float) -> None:
    row, value = layer - 1, 0.7
    peak = PLAN.peak[row, list(features)]
    fields = {"units": "a_max"} if mode != "clamp" else {}
    law = law_of(layer, mode=mode, features=features, value=value, strength=strength, **fields)
    wanted = torch.zeros_like(peak) if mode == "ablate" else value * peak
    torch.testing.assert_close(law(H, H), oracle(row, list(features), wanted, mode, strength), **CORE["law"])


def test_absolute_units_are_activations() -> None:
    law = law_of(1, features=(2, 5), value=-1.5, units="absolute")
    torch.testing.assert_close(
        law(H, H), oracle(0, [2, 5], torch.tensor([-1.5, -1.5], dtype=torch.float64), "clamp"), **CORE["law"]
    )


def test_a_feature_below_its_threshold_is_no_feature() -> None:
    """At block 2 the threshold is .4: what is between 0 and .4 is 0 there, and an ablation leaves it."""
    ae, h = PLAN.autoencoder(1), H / 20
    p = h / ae.scale @ ae.encoder[0] + 0.3
    plan = replace(PLAN, encoder_bias=torch.full_like(PLAN.encoder_bias, 0.3))
    quiet = (p > 0) & (p <= 0.4)
    assert quiet.any()
    assert (p > 0.4).any()
    law = law_of(2, plan, mode="ablate", features=(0,))
    torch.testing.assert_close(law(h, h)[quiet], h[quiet], **CORE["law"])
    assert not torch.equal(law(h, h)[p > 0.4], h[p > 0.4])


def test_a_tied_feature_is_driven_to_its_value_exactly_where_it_fires() -> None:
    """Where it does not, its activation counts as 0, and what it lacks to fire is still lacking after."""
    tied = replace(PLAN, encoder=PLAN.decoder)
    for layer, value in ((1, 2.0), (2, 30.0)):
        ae = tied.autoencoder(layer - 1)
        after = law_of(layer, tied, features=(6,), value=value, units="absolute")(H, H)
        p = H / ae.scale @ ae.encoder[6] + ae.encoder_bias[6]
        fires = p > ae.threshold[6]
        assert 0 < int(fires.sum()) < len(H)
        wanted = torch.where(fires, value, value + p)
        wanted = torch.where(wanted > ae.threshold[6], wanted, 0.0)
        torch.testing.assert_close(ae.encode(after)[:, 6], wanted, **CORE["law"])


def test_the_most_selective_are_the_default() -> None:
    assert torch.equal(law_of(1).gain, law_of(1, features=(4,)).gain)
    assert torch.equal(law_of(2, first=3).gain, law_of(2, features=(4, 7, 1)).gain)


def test_the_control_has_other_features_at_the_same_values() -> None:
    chosen, control = law_of(1, first=2), law_of(1, first=2, control=True)
    ae = PLAN.autoencoder(0)
    torch.testing.assert_close(control.gain, ae.writes(torch.tensor([0, 5])), **CORE["law"])  # 4 is chosen
    values = [law.setpoint + ae.encoder_bias[f] for law, f in ((chosen, [4, 7]), (control, [0, 5]))]
    torch.testing.assert_close(values[0], values[1], **CORE["law"])


@pytest.mark.parametrize("mode", ["clamp", "add", "ablate"])
def test_the_gauge_is_the_first_feature_s_activation(mode: Any) -> None:
    term = Sae(plan="dictionary", mode=mode, features=(3, 1), layers=(2,)).compile(BENCH)
    (route,) = term.gauges
    law, (origin, scale) = term.laws[route], term.gauges[route]
    raw = H @ law.probe[0]
    z = torch.where(raw <= law.knee[0], law.floor[0], raw)
    torch.testing.assert_close((z - origin) / scale, PLAN.autoencoder(1).encode(H)[:, 3], **CORE["law"])
    wanted = {"clamp": float(PLAN.peak[1, 3]), "add": None, "ablate": 0.0}[mode]
    assert term.target == (None if wanted is None else pytest.approx(wanted))
    assert term.units == "absolute"


def test_position_0_is_left_out_of_a_whole_prompt_alone() -> None:
    whole = Sae(plan="dictionary", apply=Scope(prompt="all")).compile(BENCH)
    assert isinstance(whole.scope.prompt, Window)
    assert whole.scope.prompt.window[0] == 1
    named = Scope(prompt=Positions((0,)))
    assert Sae(plan="dictionary", apply=named).compile(BENCH).scope == named


def test_values_and_strength_share_one_slot() -> None:
    bench = replace(BENCH, plans={"dictionary": stored(PLAN)})
    clamped = [Sae(plan="dictionary", value=v, strength=a) for v in (0.5, 2.0) for a in (0.5, 1.0)]
    assert len({compile_program([one], bench).shape for one in clamped}) == 1


def test_the_cap_bounds_the_whole_control() -> None:
    law = law_of(1, features=(0, 1, 2, 3), value=5.0, max_effort=0.05)
    effort = (law(H, H) - H).norm(dim=-1) / H.norm(dim=-1)
    assert float(effort.max()) <= 0.05 * (1 + CORE["bound"])
    assert float(effort.max()) > 0.01


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"mode": "set"}, "mode"),
        ({"units": "sigma"}, "units"),
        ({"value": float("nan")}, "value"),
        ({"mode": "add", "value": 0.0}, "value"),
        ({"features": ()}, "features"),
        ({"features": (1, 1)}, "features"),
        ({"features": tuple(range(128))}, "features"),
        ({"features": (1,), "first": 2}, "first"),
        ({"first": 0}, "first"),
        ({"first": 128}, "first"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as caught:
        Sae(plan="dictionary", **fields)
    assert caught.value.param == param


SILENT = PLAN.peak.clone()
SILENT[:, 4] = 0


@pytest.mark.parametrize(
    ("changes", "fields", "param"),
    [
        ({}, {"features": (9,), "layers": (1,)}, "features"),
        ({}, {"features": (-1,), "layers": (1,)}, "features"),
        ({}, {"features": (3,)}, "layers"),
        ({}, {"first": 4}, "first"),
        ({}, {"features": (0, 1, 2, 3, 4), "control": True, "layers": (2,)}, "control"),
        ({}, {"value": 3e38}, "value"),
        ({"measured": "texts"}, {}, "features"),
        ({"measured": "nothing"}, {"features": (1,), "layers": (1,)}, "units"),
        ({"peak": SILENT}, {}, "features"),
    ],
)
def test_what_the_plan_does_not_have_is_refused_by_name(
    changes: dict[str, Any], fields: dict[str, Any], param: str
) -> None:
    plan = replace(PLAN, **({"peak": 2 * PLAN.peak} | changes))
    bench = replace(BENCH, plans={"dictionary": plan})
    with pytest.raises(SpecError) as caught:
        Sae(plan="dictionary", **fields).compile(bench)
    assert caught.value.param == param


def test_an_unmeasured_plan_is_used_in_absolute_units() -> None:
    plan = replace(PLAN, measured="nothing", peak=torch.zeros_like(PLAN.peak))
    law = law_of(1, plan, features=(2,), value=2.0, units="absolute")
    assert torch.equal(law.gain, law_of(1, features=(2,)).gain)
    assert law_of(1, plan, features=(2,), mode="ablate").rank == 1
