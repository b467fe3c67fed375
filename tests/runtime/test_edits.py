"""Edits in the engine: equal to the naive loop in every family, gated, bounded and accounted for like laws; and modules
that nobody wants are not run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels import sparse_linear
from steering.condition import Gate, When
from steering.edit import Acting, Mask, Sparse, Turn
from steering.errors import DimensionMismatch
from steering.law import Law
from steering.plant.plant import Plant
from steering.program import Guard, Positions, Program, Scope, Term, Window
from steering.runtime import Event, Finished, Request
from steering.runtime.bank import Bank
from steering.types import Route, Site, across, at, edit_at
from tests.plans import noise, orthonormal
from tests.plants import FAMILIES, WIDTH, tiny
from tests.runtime.naive import across_program, greedy, law, run
from tests.runtime.test_engine import LLAMA, PROMPTS, assert_naive, engine

EVERYWHERE = Scope("all", "all")


def mask(width: int, seed: int, *, strength: float = 1.0) -> Mask:
    """Damps and shifts a third of the coordinates, within bounds."""
    scale = torch.where(torch.arange(width) % 3 == 0, 0.3, 1.0)
    shift = torch.where(torch.arange(width) % 3 == 0, 0.5 * noise(width, seed=seed).float(), 0.0)
    return Mask.of(scale, shift, low=-2.0, high=3.0, strength=strength)


def turn(width: int, seed: int, angle: float = 2.0, *, adaptive: bool = False) -> Turn:
    return Turn.of(orthonormal(2, width, seed).float(), angle, adaptive=adaptive)


def sparse(width: int, seed: int, *, count: int = 0, rest: int = 0) -> Sparse:
    weight = 0.2 + noise(width, seed=seed).abs().float()
    basis = orthonormal(rest, width, seed + 1).float() if rest else None
    return Sparse.of(weight, threshold=0.0 if count else 0.3, count=count, rest=basis)


def program(laws: dict[Route, Acting], scope: Scope = EVERYWHERE, **fields: Any) -> Program:
    return Program((Term("edit", "test", laws, scope, **fields),))


def blank(site: str, *layers: int, width: int = WIDTH, strength: float = 1.0, scope: Scope = EVERYWHERE) -> Program:
    zeros = Mask.of(torch.zeros(width), strength=strength)
    return program({edit_at("mask", site, layer): zeros for layer in layers}, scope)  # type: ignore[arg-type]


def requests(pairs: list[tuple[tuple[int, ...], Program]], n: int = 8) -> list[Request]:
    return [Request(str(i), prompt, greedy(n, logprobs=0), one) for i, (prompt, one) in enumerate(pairs)]


@pytest.mark.parametrize("family", FAMILIES)
def test_edits_at_every_site_equal_the_naive_loop(family: str) -> None:
    plant = Plant(tiny(family))
    taps = ["resid_pre", "attn_in", "attn_act", "attn_out", "mlp_in", "mlp_out", "resid_post"]
    taps += ["mlp_act"] if plant.layout.mlp_act else []
    taps += list(plant.layout.outputs)
    pairs = []
    for n, tap in enumerate(taps):
        width = plant.width_of(Site(tap, 1))  # type: ignore[arg-type]
        forms: list[Acting] = [mask(width, n), turn(width, n), sparse(width, n, count=width // 2)]
        form = forms[n % 3]
        pairs.append((PROMPTS[n % len(PROMPTS)], program({edit_at(form.form, tap, 1): form})))  # type: ignore[arg-type]
    assert_naive(plant.model, run(engine(plant), requests(pairs)), pairs)


def test_edits_and_laws_of_one_site_keep_their_order() -> None:
    site = ("resid_post", 1)
    laws: dict[Route, Acting] = {
        edit_at("sparse", *site): sparse(WIDTH, 1, count=20, rest=3),  # type: ignore[arg-type]
        edit_at("mask", *site): mask(WIDTH, 2),  # type: ignore[arg-type]
        edit_at("turn", *site): turn(WIDTH, 3, adaptive=True),  # type: ignore[arg-type]
        at(*site): law(4),  # type: ignore[arg-type]
        across(1): law(5),
    }
    whole = program(laws, Scope("last", "all"))
    twice = Program((*whole.terms, *program({edit_at("mask", *site): mask(WIDTH, 9)}).terms))  # type: ignore[arg-type]
    pairs = [(PROMPTS[0], whole), (PROMPTS[1], Program()), (PROMPTS[2], twice), (PROMPTS[1], across_program(3))]
    together = run(engine(), requests(pairs))
    assert_naive(LLAMA.model, together, pairs)
    alone = [run(engine(), [request])[0] for request in requests(pairs)]
    assert [done.tokens for done in together] == [done.tokens for done in alone]
    for one, other in zip(together, alone, strict=True):
        assert _effort(one) == pytest.approx(_effort(other), rel=1e-5)


def test_edits_follow_scopes_and_chunks() -> None:
    pairs = [
        (PROMPTS[2], program({edit_at("mask", "mlp_act", 1): mask(LLAMA.width_of(Site("mlp_act", 1)), 1)}, scope))
        for scope in (Scope("none", "all"), Scope(Positions((0, -2)), Window((1, 3))), Scope("all", "none"))
    ]
    assert_naive(LLAMA.model, run(engine(max_step_tokens=3), requests(pairs)), pairs)


def test_channels_of_one_term_may_differ_in_their_scopes() -> None:
    both = Law.addition(2 * noise(WIDTH, seed=1).float()) + Law.addition(2 * noise(WIDTH, seed=2).float())
    scopes = (Scope(Positions((1,)), "none"), Scope(Positions((2,)), Window((0, 2))))
    term = Term("pair", "test", {across(1): both}, scopes=scopes)
    apart = tuple(
        Term("one", "test", {across(1): Law.addition(gain)}, scope)
        for gain, scope in zip(both.gain, scopes, strict=True)
    )
    pairs = [(PROMPTS[0], Program(apart))] * 2
    done = run(engine(max_step_tokens=2), requests([(PROMPTS[0], Program((term,))), pairs[1]]))
    assert_naive(LLAMA.model, done, pairs)
    assert done[0].receipt is not None
    assert done[0].receipt.tokens_steered == 4


@pytest.mark.parametrize("make", [mask, turn, sparse], ids=["mask", "turn", "sparse"])
def test_strength_zero_is_the_unsteered_model_bit_for_bit(make: Callable[[int, int], Any]) -> None:
    one = make(WIDTH, 1)
    off = program({edit_at(one.form, "resid_post", 1): 0.0 * one, across(0): 0.0 * law(1)})
    assert not off.acts
    late = across_program(2, layers=(2,), scope=Scope("last", "all"))
    with_it = Program((*off.terms, *late.terms))  # acts, so that the kernels meet the strength of 0
    for programs in ((Program(), off), (late, with_it)):
        (plain,), (steered,) = (run(engine(), requests([(PROMPTS[0], p)])) for p in programs)
        assert plain.tokens == steered.tokens
        assert [one.logprob for one in plain.logprobs or ()] == [one.logprob for one in steered.logprobs or ()]
    assert plain.receipt is not None
    assert steered.receipt is not None
    assert plain.receipt.tokens_steered == steered.receipt.tokens_steered == 8


def test_a_condition_rules_edits_as_it_rules_laws() -> None:
    probe = noise(WIDTH, seed=8).float()
    pairs = []
    for bound in (-1e9, 1e9, 0.0):
        for on in ("prompt", "token"):
            when = When(concept="c", layer=1, above=bound, on=on)  # type: ignore[arg-type]
            gate = Gate(when, probe, bound, math.inf, 0.0, 1.0)
            laws: dict[Route, Acting] = {edit_at("turn", "resid_post", 1): turn(WIDTH, 3)}
            laws |= {edit_at("mask", "attn_out", 2): Mask.of(torch.zeros(WIDTH))}
            pairs.append((PROMPTS[len(pairs) % 3], program(laws, Scope(), gate=gate)))
    assert_naive(LLAMA.model, run(engine(), requests(pairs)), pairs)


def test_a_cap_and_a_budget_bound_edits() -> None:
    def served(cap: float = math.inf, budget: float | None = None) -> Finished:
        laws: dict[Route, Acting] = {
            edit_at("mask", "resid_post", layer): Mask.of(torch.zeros(WIDTH), cap=cap) for layer in (0, 1)
        }
        one = Program(program(laws).terms, Guard(max_effort=budget))
        return run(engine(), requests([(PROMPTS[0], one)]))[0]

    free, capped, budgeted = served(), served(cap=0.25), served(budget=0.6)
    assert _effort(free)["max"] == 1.0
    assert _effort(capped)["max"] == pytest.approx(0.25)
    assert _effort(capped)["sum_max"] == pytest.approx(0.5)
    assert _effort(budgeted)["sum_max"] == pytest.approx(0.6)
    assert _effort(budgeted)["saturated_tokens"] == budgeted.receipt.tokens_steered  # type: ignore[union-attr]
    assert _effort(free)["saturated_tokens"] == 0


def test_a_receipt_says_what_edits_met() -> None:
    route = edit_at("sparse", "mlp_act", 1)
    width = LLAMA.width_of(route.write)
    one = program(
        {route: sparse(width, 1, count=width // 4)}, units="fraction", target=0.75, gauges={route: (0.0, 1.0)}
    )
    (done,) = run(engine(), requests([(PROMPTS[0], one)]))
    assert done.receipt is not None
    told = done.receipt.to_json()["tracking"]["edit"]  # type: ignore[index]
    assert told["units"] == "fraction"
    assert told["mean"] == pytest.approx(1 - (width // 4) / width)
    assert told["sites"] == ["mlp_act.1"]


def test_a_module_that_nobody_wants_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Program((*blank("attn_out", 1, 2).terms, *blank("mlp_out", 1).terms))
    only = blank("attn_out", 1)
    watched = engine()
    calls = _count_calls(watched)
    pairs = [(PROMPTS[0], both), (PROMPTS[1], only)]
    done = run(watched, requests(pairs))
    assert_naive(LLAMA.model, done, pairs)
    steps = watched.stats().steps
    assert calls == {"attn 0": steps, "attn 1": 0, "attn 2": steps, "mlp 0": steps, "mlp 1": steps, "mlp 2": steps}


def test_a_left_out_module_is_the_same_beside_a_neighbour_that_wants_it() -> None:
    skips = Program((*blank("attn_out", 1).terms, *blank("mlp_out", 0, 2).terms, *across_program(2).terms))
    inner = program(
        {at("attn_act", 1): law(3, read=LLAMA.width_of(Site("attn_act", 1)), write=LLAMA.width_of(Site("attn_act", 1)))}
    )
    pairs = [(PROMPTS[0], skips), (PROMPTS[1], Program()), (PROMPTS[2], skips), (PROMPTS[2], inner)]
    together = run(engine(), requests(pairs))
    assert_naive(LLAMA.model, together, pairs)
    for done, (prompt, one) in zip(together, pairs, strict=True):
        (alone,) = run(engine(), [Request("alone", prompt, greedy(8), one)])
        assert alone.tokens == done.tokens
        assert _effort(alone) == pytest.approx(_effort(done), rel=1e-5)


def test_what_may_leave_something_is_never_left_out() -> None:
    scoped = blank("attn_out", 1, scope=Scope("last", "all"))
    partly = blank("attn_out", 1, strength=0.5)
    bounded = Program(blank("attn_out", 1).terms, Guard(max_effort=9.0))
    gated = Program((Term("x", "test", scoped.terms[0].laws, EVERYWHERE, gate=_gate()),))
    twice = Program((*blank("attn_out", 1).terms, *program({edit_at("mask", "attn_out", 1): mask(WIDTH, 1)}).terms))
    assert all(not one.blanks for one in (scoped, partly, bounded, gated, twice))
    assert blank("attn_out", 1).blanks == {Site("attn_out", 1)}


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_linear_maps_behind_a_sparse_site_read_columns_and_say_the_same(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant = Plant(tiny(family))
    laws: dict[Route, Acting] = {}
    for tap in ("attn_in", "attn_act", "mlp_in", "mlp_act"):
        route = edit_at("sparse", tap, 1)  # type: ignore[arg-type]
        laws[route] = sparse(plant.width_of(route.write), 3, count=plant.width_of(route.write) // 3)
    pairs = [(PROMPTS[0], program(laws)), (PROMPTS[1], program(laws, Scope("none", "all")))]
    read = []

    def counted(x_TD: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        read.append(float((x_TD != 0).float().mean()))
        return sparse_linear(x_TD, weight, bias)

    monkeypatch.setattr("steering.runtime.shortcuts.sparse_linear", counted)
    watched = engine(plant)
    watched._runner._shortcuts.few = 2
    assert_naive(plant.model, run(watched, requests(pairs)), pairs)
    if family == "gpt2":  # stored the other way round
        assert read == []
    else:
        assert len(read) >= 4 * 7
        assert max(read) < 0.4


def test_columns_are_the_engine_s_own_and_only_where_a_linear_map_reads() -> None:
    plant = Plant(tiny("llama"))
    width = plant.width_of(Site("mlp_act", 1))
    laws: dict[Route, Acting] = {
        edit_at("sparse", "mlp_act", 1): sparse(width, 3, count=width // 3),
        edit_at("sparse", "resid_post", 1): sparse(WIDTH, 4, count=WIDTH // 2),
    }
    weight = plant.model.get_submodule("model.layers.1.mlp.down_proj").weight
    before = (weight.data_ptr(), weight.stride())
    watched = engine(plant)
    watched._runner._shortcuts.few = 2
    pairs = [(PROMPTS[0], program(laws))]
    assert_naive(plant.model, run(watched, requests(pairs)), pairs)
    assert ("sparse", Site("mlp_act", 1)) in watched._runner._shortcuts._ready
    assert (weight.data_ptr(), weight.stride()) == before, "other trees read this weight at any time"


def test_edits_of_two_widths_or_forms_cannot_share_a_route() -> None:
    route = edit_at("mask", "mlp_out", 0)
    with pytest.raises(DimensionMismatch):
        _ = Program((*program({route: mask(5, 1)}).terms, *program({route: mask(6, 1)}).terms)).laws
    with pytest.raises(DimensionMismatch):
        _ = program({route: turn(6, 1)}).laws


def test_the_bank_grows_with_what_a_route_needs() -> None:
    bank = Bank(3, torch.device("cpu"))
    route = edit_at("sparse", "mlp_out", 0)
    narrow, deep = program({route: sparse(6, 1)}), program({route: sparse(6, 2, rest=2)})
    first, second = bank.acquire(narrow), bank.acquire(deep)
    tensors = bank.routes[route]
    assert tensors["rest"].shape == (4, 1, 2, 6)
    assert not tensors["rest"][first].any()
    assert torch.equal(tensors["weight"][first], narrow.laws[route].weight)  # type: ignore[union-attr]
    third = bank.acquire(Program((*narrow.terms, *deep.terms)))
    assert bank.routes[route]["channel"].tolist()[first] == [0, -1]
    assert bank.routes[route]["channel"].tolist()[third] == [0, 1]
    assert bank.routes[route]["channel"].tolist()[0] == [-1, -1]
    assert torch.equal(bank.routes[route]["rest"][second, 0], deep.laws[route].rest[0])  # type: ignore[union-attr]


def test_a_term_that_measures_nothing_is_traced_by_its_effort() -> None:
    one = Program((Term("pair", "test", {across(0): law(1), across(2): law(2)}, Scope("none", "all")),))
    (done,) = run(engine(), [Request("0", PROMPTS[0], greedy(4), one, trace=True)])
    readings = (done.trace or ())[-1]
    assert [(reading.label, reading.layer) for reading in readings] == [("pair", 0), ("pair", 2)]
    assert all(math.isnan(reading.projection) and reading.effort > 0 for reading in readings)
    assert sum(reading.effort for reading in readings) <= _effort(done)["sum_max"] * (1 + 1e-5)


def test_a_law_at_its_own_site_reports_what_it_met_and_claims_no_error() -> None:
    held = law(1)
    route = at("resid_post", 1)
    one = program({route: held}, units="absolute", target=float(held.setpoint[0]), gauges={route: (0.0, 1.0)})
    (done,) = run(engine(), requests([(PROMPTS[0], one)]))
    assert done.receipt is not None
    told = done.receipt.to_json()["tracking"]["edit"]  # type: ignore[index]
    assert (told["sites"], told["error"]) == (["resid_post.1"], None)
    assert told["setpoint"] == pytest.approx(float(held.setpoint[0]), rel=1e-6)
    assert isinstance(done.receipt.to_json()["effort"]["saturated_tokens"], int)  # type: ignore[index]


def _gate() -> Gate:
    return Gate(When(concept="c", layer=0, above=0.0), noise(WIDTH, seed=1).float(), 0.0, math.inf, 0.0, 1.0)


def _effort(done: Finished) -> dict[str, float]:
    return {} if done.receipt is None else dict(done.receipt.effort)


def _count_calls(watched: Any) -> dict[str, int]:
    """How often the attentions and MLPs of an engine compute, by an inner module of each."""
    calls: dict[str, int] = {}
    for layer, block in enumerate(watched._runner._shell.model.layers):
        for name, module in (("attn", block.self_attn.q_proj), ("mlp", block.mlp.up_proj)):
            calls[f"{name} {layer}"] = 0
            module.register_forward_hook(lambda *_, key=f"{name} {layer}": calls.__setitem__(key, calls[key] + 1))
    return calls


def test_what_lay_in_a_block_before_does_not_reach_a_layer_that_ran_only_sometimes() -> None:
    """Alone the layer is left out; in company it runs, over places that it left empty."""
    wanted: list[tuple[int, ...]] = []
    for stale in (0.0, math.nan):
        own = engine()
        for tensor in (*own._pool.keys, *own._pool.values):
            tensor.fill_(stale)
        events: list[Event] = []
        for i, program in enumerate((blank("attn_out", 1), Program())):
            own.submit(Request(str(i), tuple(range(3, 12)), greedy(8), program), events.append)
            for _ in range(3):
                own.step()
        while own.step():
            pass
        ends = [event for event in events if isinstance(event, Finished)]
        assert len(ends) == 2
        assert not [end.error for end in ends if end.error]
        wanted.append(next(end.tokens for end in ends if end.request_id == "0"))
    assert wanted[0] == wanted[1]
