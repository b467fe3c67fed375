"""Massive coordinates and position 0 stay as they are, what LayerNorm hides is not spent, others see nothing of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from steering.concept import Concept
from steering.edit import Mask, Turn
from steering.errors import SpecError
from steering.fit import FitSettings, fit_concept
from steering.law import Law
from steering.methods import Ablate, Add, Angular, Clamp, Lqr, compile_program
from steering.methods.guards import guarded
from steering.plant.massive import Caution
from steering.plant.plant import Plant
from steering.program import Positions, Scope, Term, Window
from steering.types import Site, across, at, edit_at
from tests.fit.test_concept import NEGATIVE, POSITIVE
from tests.plants import SINK, tiny, tiny_tokenizer, with_sink
from tests.toy import states, toy

BENCH = toy(depth=4)
WILD = replace(BENCH, caution=Caution(((), (2,), (2, 4), (2, 4), ()), first=True))
LAYERED = replace(BENCH, caution=Caution(((),) * 5, mean_free=True))
BOTH = replace(BENCH, caution=replace(WILD.caution, mean_free=True))
X = states(9, BENCH.width)


def moved(law: Any, x: Tensor = X) -> Tensor:
    return law(x, x) - x


def compiled(spec: Any, bench: Any) -> Term:
    (term,) = compile_program([spec], bench).terms
    return term


METHODS = [
    Lqr(concept="tone", setpoint=1.0),
    Clamp(concept="tone", setpoint=1.0),
    Ablate(concept="tone"),
    Add(concept="tone"),
    Add(concept="tone", scale="running_norm"),
    Angular(concept="tone", angle=120.0),
    Angular(concept="tone", angle=120.0, site="resid_post"),
]


@pytest.mark.parametrize("spec", METHODS, ids=lambda s: f"{s.type}{METHODS.index(s)}")
def test_massive_coordinates_stay_at_every_write(spec: Any) -> None:
    term, plain = compiled(spec, WILD), compiled(spec, BENCH)
    touched = 0
    for route, law in term.laws.items():
        dims = WILD.caution.at(route.write)
        assert not moved(law)[:, list(dims)].any(), route
        if dims and moved(plain.laws[route])[:, list(dims)].any():
            touched += 1
            others = [i for i in range(BENCH.width) if i not in dims]
            assert moved(law)[:, others].any(), route
    assert touched


@pytest.mark.parametrize("spec", METHODS, ids=lambda s: f"{s.type}{METHODS.index(s)}")
def test_what_layer_norm_hides_is_not_spent_and_what_it_shows_is_the_same(spec: Any) -> None:
    term, plain = compiled(spec, LAYERED), compiled(spec, BENCH)
    for route, law in term.laws.items():
        u, free = moved(law), moved(plain.laws[route])
        assert float(u.mean(-1).abs().max()) < 1e-12
        if isinstance(law, Law):
            torch.testing.assert_close(u, free - free.mean(-1, keepdim=True), rtol=1e-9, atol=1e-12)
            assert torch.equal(law.probe, plain.laws[route].probe)  # type: ignore[union-attr]
    both = compiled(spec, BOTH)
    for route, law in both.laws.items():
        assert float(moved(law).mean(-1).abs().max()) < 1e-12
        assert not moved(law)[:, list(WILD.caution.at(route.write))].any()


@pytest.mark.parametrize("spec", METHODS, ids=lambda s: f"{s.type}{METHODS.index(s)}")
def test_other_models_get_the_very_term(spec: Any) -> None:
    term = spec.compile(BENCH)
    assert guarded(term, BENCH) is term
    assert guarded(term, replace(BENCH, caution=Caution(((),) * 5))) is term


def test_a_turn_stays_a_turn() -> None:
    for bench in (WILD, LAYERED, BOTH):
        for law in compiled(Angular(concept="tone", angle=70.0), bench).laws.values():
            assert isinstance(law, Turn)
            torch.testing.assert_close(law.plane[0] @ law.plane[0].mT, torch.eye(2, dtype=torch.float64))
            torch.testing.assert_close(law(X, X).norm(dim=-1), X.norm(dim=-1))


def test_a_mask_leaves_massive_coordinates_and_a_block_is_left_out_whole() -> None:
    some = Mask.of(torch.full((6,), 0.5, dtype=torch.float64), 1.0, strength=0.7)
    none = Mask.of(torch.zeros(6, dtype=torch.float64))
    route, scope = edit_at("mask", "mlp_out", 1), Scope("all", "all")
    term = guarded(Term("x", "neurons", {route: some}, scope), WILD)
    assert not moved(term.laws[route])[:, [2, 4]].any()
    assert torch.equal(moved(term.laws[route])[:, [0, 1, 3, 5]], moved(some)[:, [0, 1, 3, 5]])
    massive = torch.tensor([1, 1, 0.5, 1, 0, 1], dtype=torch.float64)
    with pytest.raises(SpecError, match="more than change massive activations"):
        guarded(Term("x", "neurons", {route: Mask.of(massive)}, scope), WILD)
    skipped = Term("x", "skip_layers", {route: none}, scope)
    assert guarded(skipped, WILD) is skipped


def test_writes_behind_the_stream_are_free() -> None:
    v = BENCH.tone.direction[0]
    for route in (at("final"), at("mlp_act", 1), at("attn_in", 1)):
        law = Law.of(v, 0.0, v)
        assert guarded(Term("x", "x", {route: law}), BOTH).laws[route] is law


@pytest.mark.parametrize(
    ("given", "compiled_to"),
    [
        ("all", Window((1, 2**31))),
        ("last", "last"),
        (Positions((0,)), Positions((0,))),
        (Window((0, 3)), Window((0, 3))),
    ],
)
def test_position_0_is_left_out_where_it_is_massive_and_only_there(given: Any, compiled_to: Any) -> None:
    spec = Lqr(concept="tone", setpoint=1.0, apply=Scope(prompt=given))
    assert compiled(spec, WILD).scope.prompt == compiled_to
    assert compiled(spec, LAYERED).scope.prompt == given
    assert compiled(replace(spec, spare_massive=False), WILD).scope.prompt == given


def test_scopes_of_channels_too() -> None:
    v = BENCH.tone.direction[1]
    scopes = (Scope("all"), Scope(Positions((0,))))
    term = Term("x", "x", {across(1): Law.of(v, 0.0, v) + Law.of(v, 1.0, v)}, scopes=scopes)
    assert guarded(term, WILD).scopes == (Scope(Window((1, 2**31))), scopes[1])


def test_who_asks_for_it_touches_them() -> None:
    spec = Lqr(concept="tone", setpoint=1.0)
    free = compiled(replace(spec, spare_massive=False), BOTH)
    assert moved(free.laws[across(2)])[:, [2, 4]].any()
    assert float(moved(free.laws[across(2)]).mean(-1).abs().max()) < 1e-12  # the mean is hidden all the same


def test_what_only_changes_massive_coordinates_is_refused() -> None:
    lone = torch.zeros(6, dtype=torch.float64)
    lone[2] = 1.0
    tone = replace(BENCH.tone, direction=lone.expand(5, -1))
    bench = replace(WILD, tone=tone)
    with pytest.raises(SpecError) as caught:
        compile_program([Ablate(concept="tone", layers=(1,))], bench)
    assert caught.value.param == "interventions[0].spare_massive"
    plane = torch.eye(6, dtype=torch.float64)[[2, 4]]
    with pytest.raises(SpecError) as caught:
        guarded(Term("x", "angular", {edit_at("turn", "resid_pre", 2): Turn.of(plane, 1.0)}), WILD)
    assert caught.value.param == "spare_massive"


# On models


@dataclass(frozen=True)
class Tap:
    """The concept of a plant, as a bench."""

    plant: Plant
    tone: Concept

    @property
    def depth(self) -> int:
        return self.plant.depth

    @property
    def width(self) -> int:
        return self.plant.width

    @property
    def caution(self) -> Caution:
        return self.plant.caution

    def concept(self, name: str) -> Concept:
        return self.tone

    def plan(self, name: str, kind: Any) -> Any:
        raise SpecError("plan", expected="a plan", got=name)


def steered(plant: Plant, term: Term, ids: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Final state and block outputs of a run with the laws of block 1, at the tokens in scope."""
    shell, seen = plant.shell(), []
    mask = torch.from_numpy(term.scope.prompt_mask(len(ids)))[:, None]
    inputs: dict[int, Tensor] = {}

    def write(law: Any, layer: int) -> Any:
        return lambda y: torch.where(mask, law(y[0], inputs[layer]), y[0])[None]

    for route, law in term.laws.items():
        layer = route.read.layer
        plant.tap(shell, route.read, lambda x, layer=layer: inputs.__setitem__(layer, x[0]))
        plant.tap(shell, route.write, write(law, layer))
    for layer in range(plant.depth):
        plant.tap(shell, Site("resid_post", layer), lambda y: seen.append(y[0].clone()))
    final: list[Tensor] = []
    plant.tap(shell, Site("final", 0), lambda y: final.append(y[0].clone()))
    with torch.no_grad():
        shell.base_model(input_ids=torch.tensor([ids]), use_cache=False)
    return final[0], seen


def test_a_planted_sink_is_spared_token_and_coordinate() -> None:
    plant = Plant(with_sink(tiny("llama")), tiny_tokenizer())
    tone = fit_concept(plant, "tone", POSITIVE, NEGATIVE, FitSettings(gains=("identity",), skip=2))
    spec = Add(concept="tone", strength=40.0, layers=(1,), apply=Scope("all"))
    ids = plant.encode("the cat sat on the mat")
    _, plain = steered(plant, replace(compiled(spec, Tap(plant, tone)), laws={}), ids)
    term = compiled(spec, Tap(plant, tone))
    _, found = steered(plant, term, ids)
    assert torch.equal(found[1][0], plain[1][0])
    assert torch.equal(found[1][:, SINK], plain[1][:, SINK])
    assert bool((found[1][1:] != plain[1][1:]).any(-1).all())
    _, wild = steered(plant, compiled(replace(spec, spare_massive=False), Tap(plant, tone)), ids)
    assert bool((wild[1][:, SINK] != plain[1][:, SINK]).all())


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_readers_behind_layer_norm_see_the_same_with_less_effort(family: str) -> None:
    plant = Plant(tiny(family), tiny_tokenizer())
    tone = fit_concept(plant, "tone", POSITIVE, NEGATIVE, FitSettings(gains=("identity",), skip=2))
    assert float(tone.direction.mean(-1).abs().max()) < 1e-7
    loud = replace(tone, direction=torch.nn.functional.normalize(tone.direction + 0.2, dim=-1))
    spec = Add(concept="tone", strength=5.0, layers=(1,), apply=Scope("all"))
    ids = plant.encode("the cat sat on the mat")
    literal, careful = spec.compile(Tap(plant, loud)), compiled(spec, Tap(plant, loud))
    torch.testing.assert_close(steered(plant, careful, ids)[0], steered(plant, literal, ids)[0], rtol=1e-4, atol=1e-4)
    assert float(careful.laws[across(1)].gain.norm()) < 0.9 * float(literal.laws[across(1)].gain.norm())  # type: ignore[union-attr]
