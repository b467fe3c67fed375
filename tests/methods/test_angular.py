"""A turn is the published formula in float64, keeps the norm, and meets the angle that the receipt speaks of."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from steering.edit import Turn
from steering.errors import SpecError
from steering.methods import Angular
from steering.methods.angular import plane, second_direction
from steering.types import edit_at
from tests.tolerances import CORE
from tests.toy import states, toy

TOY = toy(depth=5)
X = states(40, TOY.width)


def turn(layer: int = 2, **fields: Any) -> Turn:
    (found,) = Angular(concept="tone", layers=(layer,), **fields).compile(TOY).laws.values()
    assert isinstance(found, Turn)
    return found


def basis(layer: int) -> tuple[Tensor, Tensor]:
    """b1, b2 by the definition: the leading eigenvector of the covariance of the unit directions."""
    V = TOY.tone.direction
    centred = V - V.mean(0)
    b2 = torch.linalg.eigh(centred.mT @ centred).eigenvectors[:, -1]
    if float(torch.arange(len(V)).double() @ (centred @ b2)) < 0:
        b2 = -b2
    b1 = V[layer]
    rest = b2 - (b2 @ b1) * b1
    return b1, rest / rest.norm()


@pytest.mark.parametrize("angle", [0, 30, 90, 180, 270, 360])
@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
def test_equals_the_published_formula(angle: float, site: Any) -> None:
    b1, b2 = basis(2 + (site == "resid_post"))
    P = torch.outer(b1, b1) + torch.outer(b2, b2)
    theta = math.radians(angle)
    aim = math.cos(theta) * b1 + math.sin(theta) * b2
    expected = X - X @ P + (X @ P).norm(dim=-1, keepdim=True) * aim
    found = turn(angle=angle, site=site)(X, X)
    torch.testing.assert_close(found, expected, **CORE["law"])
    torch.testing.assert_close(found.norm(dim=-1), X.norm(dim=-1), **CORE["law"])


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("angle", [45.0, 180.0])
def test_the_strength_is_the_share_of_the_way_and_the_norm_stays(angle: float, strength: float) -> None:
    b1, b2 = basis(2)
    before = torch.atan2(X @ b2, X @ b1)
    found = turn(angle=angle, strength=strength)(X, X)
    after = torch.atan2(found @ b2, found @ b1)
    way = torch.remainder(math.radians(angle) - before + math.pi, 2 * math.pi) - math.pi
    moved = torch.remainder(after - before + math.pi, 2 * math.pi) - math.pi
    torch.testing.assert_close(moved, strength * way, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.norm(dim=-1), X.norm(dim=-1), **CORE["law"])
    # what is outside the plane stays
    P = torch.outer(b1, b1) + torch.outer(b2, b2)
    torch.testing.assert_close(found - found @ P, X - X @ P, **CORE["law"])


def test_an_adaptive_turn_leaves_what_points_away() -> None:
    b1, _ = basis(2)
    along = (X @ b1) > 0
    assert 0 < int(along.sum()) < len(along)
    found, always = turn(angle=180, adaptive=True)(X, X), turn(angle=180)(X, X)
    assert torch.equal(found[~along], X[~along])
    torch.testing.assert_close(found[along], always[along], **CORE["law"])


def test_twice_is_once() -> None:
    one = turn(angle=100)
    torch.testing.assert_close(one(one(X, X), one(X, X)), one(X, X), **CORE["law"])


def test_the_second_direction_points_to_later_layers_whatever_the_sign_of_its_component() -> None:
    b2 = second_direction(TOY.tone)
    along = (TOY.tone.direction - TOY.tone.direction.mean(0)) @ b2
    assert float((torch.arange(len(along)).double() - (len(along) - 1) / 2) @ along) > 0
    assert float(b2.norm()) == pytest.approx(1.0)
    mirrored = replace(TOY.tone, direction=-TOY.tone.direction)
    torch.testing.assert_close(second_direction(mirrored), -b2, **CORE["law"])


def test_one_direction_for_all_layers_as_published() -> None:
    term = Angular(concept="tone", angle=90, direction_layer=3).compile(TOY)
    b1, b2 = basis(3)
    for found in term.laws.values():
        assert isinstance(found, Turn)
        torch.testing.assert_close(found.plane[0], torch.stack([b1, b2]), **CORE["law"])


def test_it_reports_the_angle_that_it_met() -> None:
    term = Angular(concept="tone", layers=(1, 3), angle=270).compile(TOY)
    (origin, scale), other = term.gauges.values()
    assert set(term.gauges) == {edit_at("turn", "resid_pre", layer) for layer in (1, 3)}
    assert (origin, scale) == other
    assert (math.pi - origin) / scale == pytest.approx(180)
    assert (term.units, term.target) == ("degrees", None)


def test_layers_without_a_direction_are_left_out() -> None:
    direction = TOY.tone.direction.clone()
    direction[2] = 0
    bench = replace(TOY, tone=replace(TOY.tone, direction=direction))
    assert {route.read.layer for route in Angular(concept="tone").compile(bench).laws} == {1, 3, 4}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"angle": -1.0}, "angle"),
        ({"angle": 361.0}, "angle"),
        ({"site": "attn_in"}, "site"),
        ({"direction_layer": 9}, "direction_layer"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as caught:
        Angular(concept="tone", **fields).compile(TOY)
    assert caught.value.param == param


def test_a_concept_without_a_plane_is_refused() -> None:
    flat = replace(TOY.tone, direction=TOY.tone.direction[:1].expand(6, -1))
    with pytest.raises(SpecError, match="differ between layers") as caught:
        Angular(concept="tone").compile(replace(TOY, tone=flat))
    assert caught.value.param == "concept"
    v = TOY.tone.direction[0]
    with pytest.raises(SpecError, match="vary across the direction itself") as caught:
        plane(v, -v, "tone")
    assert caught.value.param == "concept"
