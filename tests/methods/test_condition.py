"""A condition compiles to a gate with the bounds of its units, and one that cannot be asked is refused by its field."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from steering.condition import When
from steering.errors import SpecError
from steering.methods import Lqr, compile_program
from steering.program import Scope
from steering.types import across
from tests.toy import toy

TOY = toy(depth=5)


def lqr(layers: tuple[int, ...] | None = None, **when: Any) -> Lqr:
    return Lqr(concept="tone", setpoint=1.0, layers=layers, when=When(concept="tone", **when))


def test_bounds_are_those_of_the_units() -> None:
    for units, origin, scale in (
        ("centred", float(TOY.tone.origin[2]), float(TOY.tone.magnitude[2])),
        ("contrast", 0.0, float(TOY.tone.magnitude[2])),
        ("absolute", 0.0, 1.0),
    ):
        [term] = compile_program([lqr(layer=2, above=-0.5, below=0.75, units=units)], TOY).terms
        assert term.gate is not None
        assert term.gate.low == np.float32(origin - 0.5 * scale)
        assert term.gate.high == np.float32(origin + 0.75 * scale)
        assert term.gate.in_units(origin + 0.3 * scale) == pytest.approx(0.3)
        assert [term.gate.is_open(z) for z in (term.gate.low, term.gate.high, math.nan)] == [False] * 3


def test_a_gate_behind_all_blocks_is_for_the_steps_that_follow() -> None:
    [late] = compile_program([lqr((1, 2), layer=3, above=0.0)], TOY).terms
    [early] = compile_program([replace(lqr((1, 2), layer=2, above=0.0), apply=Scope("last", "none"))], TOY).terms
    assert (late.is_in_time, early.is_in_time) == (False, True)


def test_one_bound_leaves_the_other_side_open() -> None:
    [above] = compile_program([lqr(layer=2, above=0.0)], TOY).terms
    [below] = compile_program([lqr(layer=2, below=0.0)], TOY).terms
    assert above.gate is not None
    assert below.gate is not None
    assert (above.gate.high, below.gate.low) == (math.inf, -math.inf)


def test_asked_at_every_token_only_the_blocks_from_the_gate_on_are_ruled() -> None:
    [term] = compile_program([lqr(layer=3, above=0.0, on="token")], TOY).terms
    assert list(term.laws) == list(term.gauges) == [across(3), across(4)]
    [whole] = compile_program([lqr(layer=3, above=0.0, on="prompt")], TOY).terms
    assert list(whole.laws) == [across(layer) for layer in TOY.tone.layers]


@pytest.mark.parametrize(
    ("intervention", "param"),
    [
        (lambda: lqr(layer=5, above=0.0), "interventions[0].when.layer"),
        (lambda: lqr(layer=-1, above=0.0), "interventions[0].when.layer"),
        (lambda: lqr((1, 2), layer=3, above=0.0, on="token"), "interventions[0].when.layer"),
        (
            lambda: replace(lqr((1, 2), layer=3, above=0.0), apply=Scope("last", "none")),
            "interventions[0].when.layer",
        ),
        (lambda: lqr(layer=3, above=1e39, units="absolute"), "interventions[0].when.above"),
        (lambda: lqr(layer=3, above=1.0, below=1 + 1e-9, units="absolute"), "interventions[0].when.below"),
        (
            lambda: Lqr(concept="tone", setpoint=1.0, when=When(concept="other", layer=1, above=0.0)),
            "interventions[0].when.concept",
        ),
    ],
)
def test_a_condition_that_cannot_be_asked_is_refused(intervention: Any, param: str) -> None:
    with pytest.raises(SpecError) as refused:
        compile_program([intervention()], TOY)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "above"),
        ({"above": math.nan}, "above"),
        ({"below": math.inf}, "below"),
        ({"above": 1.0, "below": 1.0}, "below"),
        ({"above": 0.0, "on": "sometimes"}, "on"),
    ],
)
def test_bounds_that_nothing_can_meet_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as refused:
        When(concept="tone", layer=1, **fields)
    assert refused.value.param == param
