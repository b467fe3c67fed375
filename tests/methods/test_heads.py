"""Shifted heads are a bias of the attention's last map, held heads stay where they are put, others are as they were."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from steering.errors import SpecError
from steering.law import Law
from steering.methods import Heads, compile_program
from steering.methods.heads import usual
from steering.program import Scope
from steering.types import at, edit_at
from tests.plans import WIDTH, heads, noise, stored
from tests.tolerances import CORE
from tests.toy import toy

PLAN = heads()
BENCH = replace(toy(), plans={"truth": PLAN})
X = noise(7, WIDTH, seed=8)
BEST = [(1, 1), (0, 1), (0, 0), (1, 0)]
"""(row of the plan, head), best first; rows 0 and 1 are blocks 1 and 3."""
SHUFFLED = [(1, 0), (1, 1), (0, 0), (0, 1)]


def steered(**fields: Any) -> dict[int, torch.Tensor]:
    """What becomes of X, by block, as (T, H, d)."""
    laws = Heads(plan="truth", **fields).compile(BENCH).laws
    return {route.write.layer: law(X, X).reshape(-1, 2, 3) for route, law in laws.items()}


def by_hand(chosen: list[tuple[int, int]], change: Any) -> dict[int, torch.Tensor]:
    """X with `change(row, head, x)` in the place of each chosen head."""
    found: dict[int, torch.Tensor] = {}
    for row, head in chosen:
        x = found.setdefault(PLAN.layers[row], X.reshape(-1, 2, 3).clone())
        x[:, head] = change(row, head, x[:, head])
    return found


def same(found: dict[int, torch.Tensor], expected: dict[int, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for layer, x in expected.items():
        torch.testing.assert_close(found[layer], x, **CORE["law"])


@pytest.mark.parametrize("alpha", [None, 2.0, -0.5])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_shift_is_a_bias_of_deviations(alpha: float | None, count: int | None) -> None:
    a = 15.0 if alpha is None else alpha
    expected = by_hand(BEST[:count], lambda r, h, x: x + a * PLAN.deviation[r, h] * PLAN.direction[r, h])
    same(steered(alpha=alpha, heads=count), expected)
    W = noise(5, WIDTH, seed=9)  # the attention's last map
    for layer, x in steered(alpha=alpha, heads=count).items():
        row = PLAN.layers.index(layer)
        theta = torch.stack(
            [PLAN.direction[row, h] * PLAN.deviation[row, h] * ((row, h) in BEST[:count]) for h in range(2)]
        )
        bias = W @ (a * theta).flatten()
        torch.testing.assert_close(x.flatten(1) @ W.mT, X @ W.mT + bias, **CORE["law"])


@pytest.mark.parametrize("setpoint", [0.0, 1.0, -0.5])
def test_a_clamp_holds_the_projection(setpoint: float) -> None:
    found = steered(mode="clamp", setpoint=setpoint, heads=4)
    for row, head in BEST:
        z = found[PLAN.layers[row]][:, head] @ PLAN.direction[row, head]
        low, high = PLAN.negative[row, head], PLAN.positive[row, head]
        torch.testing.assert_close(z, (low + setpoint * (high - low)).expand(7), **CORE["law"])
    aside = found[1] - X.reshape(-1, 2, 3)
    along = (aside * PLAN.direction[0]).sum(-1, keepdim=True) * PLAN.direction[0]
    torch.testing.assert_close(aside, along, **CORE["law"])  # nothing beside the direction moves
    again = Heads(plan="truth", mode="clamp", setpoint=setpoint, heads=4).compile(BENCH).laws[at("attn_act", 1)]
    torch.testing.assert_close(again(found[1].flatten(1), found[1].flatten(1)), found[1].flatten(1), **CORE["law"])


@pytest.mark.parametrize("strength", [1.0, 0.25])
@pytest.mark.parametrize(("mode", "factor"), [("zero", None), ("mean", None), ("scale", 0.5), ("scale", -2.0)])
def test_scaled_silent_and_fixed_heads(mode: Any, factor: float | None, strength: float) -> None:
    def change(row: int, head: int, x: torch.Tensor) -> torch.Tensor:
        new = PLAN.mean[row, head] if mode == "mean" else (factor or 0.0) * x
        return x + strength * (new - x)

    same(steered(mode=mode, factor=factor, heads=2, strength=strength), by_hand(BEST[:2], change))


def test_a_list_names_any_head_of_the_plan() -> None:
    found = steered(mode="zero", heads=((1, 0), (3, 0), (1, 0)))
    same(found, by_hand([(0, 0), (1, 0)], lambda _r, _h, x: 0 * x))


def test_layers_restrict_the_ranking() -> None:
    same(steered(mode="zero", heads=1, layers=(1,)), by_hand([(0, 1)], lambda _r, _h, x: 0 * x))


def test_the_usual_number_is_the_published_share() -> None:
    assert [usual(n) for n in (1, 4, 48, 1024, 4096)] == [1, 1, 2, 48, 48]
    same(steered(mode="zero"), by_hand(BEST[:1], lambda _r, _h, x: 0 * x))


def test_a_control_of_all_heads_would_be_the_choice_itself() -> None:
    with pytest.raises(SpecError) as caught:
        steered(mode="zero", heads=4, control=True)
    assert caught.value.param == "control"


def test_the_control_is_as_many_random_heads_and_others_where_there_are() -> None:
    same(steered(mode="zero", heads=1, control=True), by_hand([(1, 0)], lambda _r, _h, x: 0 * x))
    same(steered(mode="zero", heads=2, control=True), by_hand([(1, 0), (0, 0)], lambda _r, _h, x: 0 * x))
    same(steered(mode="zero", heads=3, control=True), by_hand(SHUFFLED[:3], lambda _r, _h, x: 0 * x))


def test_heads_of_one_block_are_one_law_or_one_mask() -> None:
    shift = Heads(plan="truth", alpha=1.0, heads=4).compile(BENCH)
    assert set(shift.laws) == {at("attn_act", 1), at("attn_act", 3)}
    assert (shift.rank, shift.target, shift.gauges) == (2, None, {})
    zero = Heads(plan="truth", mode="zero", heads=4).compile(BENCH)
    assert set(zero.laws) == {edit_at("mask", "attn_act", 1), edit_at("mask", "attn_act", 3)}
    assert zero.rank == 1


def test_a_clamp_reports_its_first_head_between_the_class_means() -> None:
    term = Heads(plan="truth", mode="clamp", setpoint=0.5, heads=4, apply=Scope("all", "none")).compile(BENCH)
    low, high = float(PLAN.negative[1, 1]), float(PLAN.positive[1, 1])
    assert term.gauges[at("attn_act", 3)] == pytest.approx((low, high - low))
    law = term.laws[at("attn_act", 3)]
    assert isinstance(law, Law)
    assert torch.equal(law.probe[0, 3:], PLAN.direction[1, 1])
    assert (term.target, term.units) == (0.5, "centred")
    assert term.scope.prompt_mask(3).tolist() == [False, True, True]


def test_alpha_and_setpoint_are_knobs_of_one_slot() -> None:
    bench = replace(BENCH, plans={"truth": stored(PLAN)})
    for field, mode in (("alpha", "shift"), ("setpoint", "clamp")):
        programs = [compile_program([Heads(plan="truth", mode=mode, **{field: v})], bench) for v in (0.5, 2.0)]  # type: ignore[arg-type]
        assert len({program.shape for program in programs}) == 1


def test_a_head_without_a_direction_is_not_moved() -> None:
    direction = PLAN.direction.clone()
    direction[1, 1] = 0
    bench = replace(BENCH, plans={"truth": replace(PLAN, direction=direction)})
    with pytest.raises(SpecError) as caught:
        Heads(plan="truth", heads=1).compile(bench)
    assert caught.value.param == "heads"
    assert list(Heads(plan="truth", heads=2).compile(bench).laws) == [at("attn_act", 1)]
    assert Heads(plan="truth", heads=1, mode="zero").compile(bench).acts


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"mode": "bend"}, "mode"),
        ({"mode": "clamp"}, "setpoint"),
        ({"mode": "scale"}, "factor"),
        ({"mode": "scale", "factor": 1}, "factor"),
        ({"mode": "zero", "alpha": 3.0}, "alpha"),
        ({"setpoint": 1.0}, "setpoint"),
        ({"factor": 2.0}, "factor"),
        ({"alpha": 0.0}, "alpha"),
        ({"heads": 0}, "heads"),
        ({"heads": True}, "heads"),
        ({"heads": ()}, "heads"),
        ({"heads": ((1, 0),), "layers": (1,)}, "layers"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as caught:
        Heads(plan="truth", **fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"heads": 5}, "heads"),
        ({"heads": 3, "layers": (1,)}, "heads"),
        ({"heads": ((2, 0),)}, "heads"),
        ({"heads": ((1, 2),)}, "heads"),
        ({"heads": ((1, -1),)}, "heads"),
        ({"layers": (2,)}, "layers"),
        ({"alpha": 3e38}, "alpha"),
        ({"mode": "clamp", "setpoint": 3e38}, "setpoint"),
    ],
)
def test_what_the_plan_does_not_have_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    wide = replace(PLAN, deviation=2 + PLAN.deviation, positive=PLAN.negative + 2)
    with pytest.raises(SpecError) as caught:
        Heads(plan="truth", **fields).compile(replace(BENCH, plans={"truth": wide}))
    assert caught.value.param == param
