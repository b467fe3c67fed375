"""A shared prefix changes no number: of a text, of its log-probabilities, or of a receipt."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from steering.condition import Gate, When
from steering.errors import SpecError
from steering.law import Law
from steering.plant.plant import Plant
from steering.program import Guard, Program, Scope, Window
from steering.runtime import Engine, EngineSettings, Finished, Request, Sampling
from tests.plants import VOCAB, tiny
from tests.runtime import naive
from tests.runtime.naive import across_program

PLANT = Plant(tiny("llama"))
PROMPT = tuple((7 * i + 3) % (VOCAB - 3) + 3 for i in range(40))
REPORTED = Sampling(max_tokens=6, temperature=0, ignore_eos=True, logprobs=3)
LAST, ALL = across_program(1, scope=Scope("last", "all")), across_program(1, scope=Scope("all", "all"))


def engine(**settings: int | bool) -> Engine:
    return Engine(PLANT, EngineSettings(**{"max_batch": 8, "max_model_len": 96} | settings))  # type: ignore[arg-type]


def alone(own: Engine, program: Program | None = None, prompt: tuple[int, ...] = PROMPT, **more: str) -> Finished:
    """One request in a batch of its own."""
    alone.count += 1  # type: ignore[attr-defined]
    [done] = own.generate([Request(f"{alone.count}", prompt, REPORTED, program or Program(), **more)])  # type: ignore[attr-defined]
    assert done.error is None
    return done


alone.count = 0  # type: ignore[attr-defined]


def numbers(done: Finished) -> tuple[object, ...]:
    """All that must be the same bit for bit."""
    return done.tokens, done.logprobs, None if done.receipt is None else done.receipt.to_json()


@pytest.mark.parametrize("program", [None, LAST, ALL], ids=["none", "last", "all"])
def test_a_second_request_takes_the_prompt_over_and_gives_the_same_numbers(program: Program | None) -> None:
    own = engine()
    first, second = alone(own, program), alone(own, program)
    assert (first.usage.cached, second.usage.cached) == (0, 32)
    assert numbers(first) == numbers(second)
    without = alone(engine(prefix_cache=False), program)
    assert without.usage.cached == 0
    assert without.tokens == first.tokens
    if program is not None:
        assert first.receipt is not None
        assert first.receipt.tokens_steered == (45 if program is ALL else 6)
    assert [list(first.tokens)] == [naive.generate(PLANT.model, PROMPT, 6, program)]
    assert (own.stats().prefix_tokens, own.stats().cached_tokens) == (64, 32)


def test_who_steers_only_the_last_token_shares_with_the_unsteered_and_no_other_does() -> None:
    own = engine()
    alone(own)
    assert alone(own, LAST).usage.cached == 32
    assert alone(own, ALL).usage.cached == 0
    stronger = across_program(2, scope=Scope("all", "all"))
    assert alone(own, stronger).usage.cached == 0
    assert alone(own, ALL).usage.cached == 32
    late = across_program(1, scope=Scope(Window((20, 24)), "all"))
    assert alone(own, late).usage.cached == 16  # untouched up to position 20
    assert alone(own, late).usage.cached == 32
    for program in (LAST, ALL, stronger, late):
        assert list(alone(own, program).tokens) == naive.generate(PLANT.model, PROMPT, 6, program)


def test_the_same_law_with_another_setpoint_is_another_prefix() -> None:
    own = engine()
    alone(own, ALL)
    [term] = ALL.terms
    moved = {route: replace(law, setpoint=law.setpoint + 1) for route, law in term.laws.items()}  # type: ignore[type-var]
    assert alone(own, Program((replace(term, laws=moved),))).usage.cached == 0


def test_a_longer_prompt_goes_on_from_what_is_known() -> None:
    own = engine()
    alone(own, prompt=PROMPT[:20])
    done = alone(own)
    assert done.usage.cached == 16
    assert done.tokens == alone(engine()).tokens


def test_choices_and_twins_read_their_prompt_once() -> None:
    own = engine()
    requests = [Request(str(i), PROMPT, REPORTED, LAST if i % 2 else Program()) for i in range(6)]
    done = own.generate(requests)
    assert [one.usage.cached for one in done] == [0, *[32] * 5]
    assert own.stats().steps == 1 + 6
    for one in done:
        program = LAST if int(one.request_id) % 2 else None
        assert list(one.tokens) == naive.generate(PLANT.model, PROMPT, 6, program)


def test_salts_keep_prompts_apart_and_judged_prompts_are_read_whole() -> None:
    own = engine()
    alone(own)
    assert alone(own, cache_salt="a").usage.cached == 0
    assert alone(own, cache_salt="a").usage.cached == 32
    assert alone(own, cache_salt="\ud800").usage.cached == 0, "no text, but no reason to fail either"
    judged = replace(REPORTED, prompt_logprobs=0)
    [done] = own.generate([Request("judged", PROMPT, judged)])
    assert done.usage.cached == 0
    assert done.prompt_logprobs is not None
    assert len(done.prompt_logprobs) == len(PROMPT)


def gated(on: str, scope: Scope, above: float = -1e9) -> Program:
    """A program that acts where its own probe measures more than `above`."""
    [term] = across_program(1, scope=scope).terms
    law = term.laws[next(iter(term.laws))]
    assert isinstance(law, Law)
    gate = Gate(When(concept="c", layer=1, above=above, on=on), law.probe[0], above, math.inf, 0.0, 1.0)  # type: ignore[arg-type]
    return Program((replace(term, gate=gate),))


@pytest.mark.parametrize("on", ["prompt", "token"])
def test_what_a_condition_steers_is_not_shared_but_what_comes_before_is(on: str) -> None:
    own = engine()
    alone(own)
    program = gated(on, Scope(Window((20, 40)), "all"))
    done = [alone(own, program) for _ in range(2)]
    assert {one.usage.cached for one in done} == {32 if on == "prompt" else 16}
    assert numbers(done[0]) == numbers(done[1])
    assert done[0].receipt is not None
    [condition] = done[0].receipt.conditions
    assert condition.asked == (1 if on == "prompt" else 20 + 5)


def test_a_guarded_request_shares_its_prompt_with_its_twin() -> None:
    own = engine()
    guarded = replace(LAST, guard=Guard(max_kl=0.05))
    done = alone(own, guarded)
    assert own.stats().prompt_tokens == len(PROMPT)
    again = alone(own, guarded)
    assert again.usage.cached == 32
    assert numbers(done) == numbers(again)
    assert done.tokens == alone(engine(prefix_cache=False), guarded).tokens


def test_interrupted_requests_give_the_same_text_and_the_same_receipt() -> None:
    short = Sampling(max_tokens=30, temperature=0.8, seed=5, ignore_eos=True)
    asked = [gated(on, Scope("all", "all"), above=0.0) for on in ("prompt", "token")]
    programs = [Program(), LAST, ALL, *asked]
    requests = [
        Request(f"i{i}", tuple((p + i) % (VOCAB - 3) + 3 for p in PROMPT), short, programs[i % 5]) for i in range(10)
    ]
    roomy, tight = engine(), engine(max_model_len=96, kv_tokens=160)
    wanted, done = roomy.generate(requests), tight.generate(requests)
    assert roomy.stats().preempted == 0
    assert tight.stats().preempted > 0
    assert [one.tokens for one in done] == [one.tokens for one in wanted]
    for one, other in zip(done, wanted, strict=True):
        assert (one.receipt is None) == (other.receipt is None)
        if one.receipt is not None and other.receipt is not None:
            assert one.receipt.tokens_steered == other.receipt.tokens_steered
            assert [(c.asked, c.met) for c in one.receipt.conditions] == [
                (c.asked, c.met) for c in other.receipt.conditions
            ]
            assert one.receipt.effort == pytest.approx(other.receipt.effort, rel=1e-4)
            layers = [receipt.tracking["c"].by_layer for receipt in (one.receipt, other.receipt)]
            assert layers[0] == pytest.approx(layers[1], rel=1e-4, nan_ok=True)
    assert tight.stats().prompt_tokens == roomy.stats().prompt_tokens
    assert tight.stats().kv_used_ratio == 0


def test_what_is_read_again_in_pieces_is_measured_once() -> None:
    """Of three requests whose steps have room for three tokens the last is read again token by token."""
    asked = [
        Request(f"p{i}", PROMPT[i : i + n], replace(REPORTED, max_tokens=out), LAST)
        for i, (n, out) in enumerate([(14, 60), (14, 60), (10, 40)])
    ]
    tight = engine(kv_tokens=112, max_step_tokens=3)
    done = tight.generate(asked)
    assert tight.stats().preempted > 0
    assert [one.receipt.tokens_steered for one in done if one.receipt is not None] == [60, 60, 40]
    for one, other in zip(done, engine().generate(asked), strict=True):
        assert one.receipt is not None
        assert other.receipt is not None
        assert one.receipt.tracking["c"].mean == pytest.approx(other.receipt.tracking["c"].mean, rel=1e-4)


def test_who_takes_over_what_was_read_again_is_told_all_of_it() -> None:
    own = engine(kv_tokens=96)
    other = tuple(reversed(PROMPT))
    lengths = (50, 20)
    requests = [
        Request(f"r{i}", prompt, replace(REPORTED, max_tokens=n), (Program(), ALL)[i])
        for i, (prompt, n) in enumerate(zip((other, PROMPT), lengths, strict=True))
    ]
    own.generate(requests)
    assert own.stats().preempted == 1
    later = alone(own, ALL)
    assert later.usage.cached == 32
    assert later.receipt is not None
    first = alone(engine(), ALL).receipt
    assert first is not None
    assert later.receipt.tokens_steered == first.tokens_steered == 45
    assert later.receipt.effort == pytest.approx(first.effort, rel=1e-4)


def test_an_interrupted_judgement_is_not_judged_twice() -> None:
    judged = Sampling(max_tokens=40, temperature=0, ignore_eos=True, prompt_logprobs=0)
    requests = [Request(f"j{i}", PROMPT[i:], judged) for i in range(4)]
    tight = engine(kv_tokens=128)
    done = tight.generate(requests)
    assert tight.stats().preempted > 0
    for one, other in zip(done, engine().generate(requests), strict=True):
        assert one.prompt_logprobs is not None
        assert other.prompt_logprobs is not None
        assert len(one.prompt_logprobs) == len(other.prompt_logprobs)
        assert one.tokens == other.tokens


def test_a_diverged_prompt_leaves_nothing_behind() -> None:
    own = engine(kv_tokens=96)
    [term] = ALL.terms
    wild = Program((replace(term, laws={route: 1e38 * (1e38 * law) for route, law in term.laws.items()}),))
    for i in range(3):
        [failed] = own.generate([Request(f"w{i}", PROMPT, REPORTED, wild)])
        assert failed.error is not None
    first = alone(own)
    assert first.usage.cached == 0
    assert first.tokens == alone(engine()).tokens


def test_an_aborted_completion_leaves_its_prompt_for_the_next() -> None:
    """A client that stops reading asks on with the same text before; one that left earlier may leave anything."""
    for steps, cached in ((1, 0), (3, 32)):
        own = engine()
        own.submit(Request("gone", PROMPT, REPORTED, ALL), lambda _: None)
        for _ in range(steps):
            own.step()
        own.abort("gone")
        own.step()
        assert own.stats().kv_used_ratio == 0
        assert alone(own, ALL).usage.cached == cached


def test_a_twin_needs_room_for_itself() -> None:
    longer = replace(REPORTED, max_tokens=20)
    with pytest.raises(SpecError, match=r"guard\.max_kl"):
        engine(kv_tokens=96).generate([Request("k", PROMPT, longer, replace(LAST, guard=Guard(max_kl=0.1)))])


def test_many_prompts_pass_through_a_small_pool() -> None:
    own = engine(kv_tokens=112)
    prompts = [tuple((i * 5 + j) % (VOCAB - 3) + 3 for j in range(36)) for i in range(12)]
    for i, prompt in enumerate([*prompts, *prompts]):
        done = alone(own, ALL if i % 3 else None, prompt)
        assert done.reason == "length"
    assert own.stats().preempted == 0
