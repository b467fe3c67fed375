"""The engine equals a naive loop, whoever shares the batch, and ends what must end without touching the rest."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from steering.errors import DimensionMismatch, Diverged, PlantError, QueueFull, SpecError
from steering.plant.plant import Plant
from steering.program import Guard, Positions, Program, Scope, Term, Window
from steering.runtime import Delta, Engine, EngineSettings, Event, Finished, Request, Sampling
from steering.types import Route, Site, across, at
from tests.plants import FAMILIES, VOCAB, prompts, tiny, tiny_tokenizer
from tests.runtime import naive
from tests.runtime.naive import across_program, greedy, law, run
from tests.tolerances import RUNTIME

LLAMA = Plant(tiny("llama"), tiny_tokenizer())
PROMPTS = [tuple(prompt) for prompt in prompts(5)]


def engine(plant: Plant = LLAMA, **settings: int) -> Engine:
    return Engine(plant, EngineSettings(**{"max_batch": 16, "max_model_len": 96} | settings))


def tokens(done: list[Finished]) -> list[list[int]]:
    assert not [d.error for d in done if d.error], [d.error for d in done]
    return [list(d.tokens) for d in done]


def assert_naive(model: PreTrainedModel, done: list[Finished], pairs: list[tuple[tuple[int, ...], Program]]) -> None:
    """Tokens equal those of the naive loop, and so do their log-probabilities, which show what tokens may hide."""
    for one, (prompt, program) in zip(done, pairs, strict=True):
        rows = naive.logits_of(model, prompt, len(one.tokens), program)
        assert tokens([one]) == [[int(row.argmax()) for row in rows]]
        reported = [report.logprob for report in one.logprobs or ()]
        assert reported == pytest.approx([float(row.log_softmax(-1).max()) for row in rows], abs=RUNTIME["logprob"])


@pytest.mark.parametrize("family", FAMILIES)
def test_unsteered_equals_the_naive_loop(family: str) -> None:
    model = tiny(family)
    done = run(
        engine(Plant(model), max_batch=4, max_step_tokens=9),
        [Request(str(i), p, greedy()) for i, p in enumerate(PROMPTS)],
    )
    assert tokens(done) == [naive.generate(model, prompt, 10) for prompt in PROMPTS]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "mixtral", "olmo2"])
def test_steered_equals_the_naive_loop(family: str) -> None:
    model = tiny(family)
    programs = [
        across_program(1),
        across_program(2, layers=(0, 1, 2), rank=2),
        Program(),
        Program(
            (
                Term(
                    "a",
                    "ablate",
                    {at("attn_out", 1): law(7), at("attn_in", 2): law(8), at("resid_pre", 1): law(9)},
                    Scope("all"),
                ),
            )
        ),
        Program(
            (
                Term(
                    "b",
                    "add",
                    {at("mlp_out", 0): law(3), at("final"): law(4), at("resid_post", 1): law(5)},
                    Scope("all"),
                ),
            )
        ),
    ]
    pairs = list(zip(PROMPTS, programs, strict=True))
    done = run(
        engine(Plant(model), max_step_tokens=7),
        [Request(str(i), p, greedy(logprobs=0), g) for i, (p, g) in enumerate(pairs)],
    )
    assert_naive(model, done, pairs)
    plain = [naive.generate(model, prompt, 10) for prompt in PROMPTS]
    assert sum(list(d.tokens) != p for d, p in zip(done, plain, strict=True)) >= 3, "the programs must matter"


def test_laws_that_read_another_layer_or_width_equal_the_naive_loop() -> None:
    far = Route(Site("resid_pre", 0), Site("resid_post", 2))
    back = Route(Site("mlp_act", 0), Site("resid_pre", 2))
    program = Program(
        (
            Term(
                "far",
                "pid",
                {far: law(1), back: law(2, read=48), across(2): law(3), at("resid_post", 2): law(4)},
                Scope("all"),
            ),
        )
    )
    pairs = [(PROMPTS[0], program), (PROMPTS[0], Program())]
    done = run(engine(), [Request(str(i), p, greedy(logprobs=0), g) for i, (p, g) in enumerate(pairs)])
    assert_naive(LLAMA.model, done, pairs)
    assert done[0].tokens != done[1].tokens


@pytest.mark.parametrize(
    "scope",
    [
        Scope("none", "all"),
        Scope("last", "none"),
        Scope("all", "all"),
        Scope(Positions((0, -2, 5)), "none"),
        Scope(Window((2, -3)), Window((1, 4))),
        Scope("last", Window((2, 3))),
    ],
    ids=str,
)
@pytest.mark.parametrize("chunk", [4, 512])
def test_scopes_equal_the_naive_loop(scope: Scope, chunk: int) -> None:
    both = Program(
        (*across_program(3, scope=scope).terms, *across_program(4, layers=(0,), scope=Scope("last", "all")).terms)
    )
    for program in (across_program(3, scope=scope), both):
        done = run(engine(max_step_tokens=chunk), [Request("a", PROMPTS[0], greedy(), program)])
        assert tokens(done) == [naive.generate(LLAMA.model, PROMPTS[0], 10, program)]


def test_sixteen_requests_with_sixteen_programs_equal_one_at_a_time() -> None:
    mix = [across_program(i, rank=1 + i % 3, scope=Scope(("last", "all")[i % 2])) for i in range(16)]
    requests = [
        Request(str(i), PROMPTS[i % 5], Sampling(max_tokens=12, temperature=(0, 1)[i % 2], seed=i, ignore_eos=True), g)
        for i, g in enumerate(mix)
    ]
    together = run(engine(max_step_tokens=16), requests)
    alone = [run(engine(), [request])[0] for request in requests]
    assert tokens(together) == tokens(alone)
    assert len({d.tokens for d in together}) == 16
    for a, b in zip(together, alone, strict=True):
        assert a.receipt is not None
        assert b.receipt is not None
        assert a.receipt.effort["mean"] == pytest.approx(b.receipt.effort["mean"], rel=1e-4)


def test_more_requests_than_rows_and_slots_are_served_in_turn() -> None:
    small = engine(max_batch=3, program_slots=2, queue_limit=0)
    requests = [Request(str(i), PROMPTS[i % 5], greedy(4), across_program(i % 6)) for i in range(11)]
    wanted = [naive.generate(LLAMA.model, r.prompt, 4, r.program) for r in requests]
    assert tokens(run(small, requests)) == wanted


def test_strength_zero_is_the_unsteered_model_bit_for_bit() -> None:
    term = across_program(1).terms[0]
    off = Program((replace(term, laws={route: 0.0 * law for route, law in term.laws.items()}),))
    sampling = Sampling(max_tokens=10, seed=3, logprobs=5, ignore_eos=True)
    company = Request("n", PROMPTS[1], greedy(), across_program(2))
    plain, zero, absent = (
        run(engine(), [Request("a", PROMPTS[0], sampling, *program), company])[0]
        for program in ((), (off,), (Program(),))
    )
    assert plain.tokens == zero.tokens == absent.tokens
    assert plain.logprobs == zero.logprobs == absent.logprobs
    assert zero.receipt is not None
    assert zero.receipt.tokens_steered == 0
    assert plain.receipt is None


def test_a_steered_neighbour_leaves_an_unsteered_one_bit_for_bit() -> None:
    sampling = Sampling(max_tokens=10, seed=3, logprobs=5, ignore_eos=True)
    pair = [Request("a", PROMPTS[0], sampling), Request("b", PROMPTS[1], sampling)]
    steered = [pair[0], replace(pair[1], program=across_program(2))]
    assert run(engine(), pair)[0].logprobs == run(engine(), steered)[0].logprobs


@pytest.mark.parametrize("setpoint", [1e30, math.inf])
def test_an_immense_setpoint_ends_its_request_alone(setpoint: float) -> None:
    def wild(scope: Scope, setpoint: float = setpoint) -> Program:
        route = across(1)
        return Program((Term("x", "lqr", {route: replace(law(1), setpoint=torch.tensor([setpoint]))}, scope),))

    neighbours = [Request(str(i), p, greedy(), across_program(i)) for i, p in enumerate(PROMPTS)]
    wanted = [naive.generate(LLAMA.model, r.prompt, 10, r.program) for r in neighbours]
    for scope in (Scope("last"), Scope("none", Window((3, 9))), Scope(Window((0, 2)), "none")):
        shared = engine(max_step_tokens=64)
        done = run(shared, [Request("wild", PROMPTS[0], greedy(), wild(scope)), *neighbours])
        assert done[0].reason == "error"
        assert isinstance(done[0].error, Diverged)
        assert done[0].error.param == "steering"
        assert tokens(done[1:]) == wanted
        # Its row goes to a shorter sequence beside longer ones: what was left there is masked, not overwritten.
        assert tokens(run(shared, neighbours[::-1])) == wanted[::-1]
    capped = replace(wild(Scope("last")), guard=Guard(max_effort=0.5))
    assert run(engine(), [Request("capped", PROMPTS[0], greedy(), capped)])[0].reason == "length"


def test_a_failing_step_ends_only_the_request_at_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = engine()
    call = type(shared._runner).__call__

    def breaks(runner, batch, *rest):  # type: ignore[no-untyped-def]
        if any(s.sequence.request.id == "bad" and s.start > 15 for s in batch.segments):
            raise torch.OutOfMemoryError("no room")
        return call(runner, batch, *rest)

    monkeypatch.setattr(type(shared._runner), "__call__", breaks)
    good = [Request(str(i), p, greedy(), across_program(i)) for i, p in enumerate(PROMPTS)]
    done = run(shared, [Request("bad", PROMPTS[0], greedy()), *good])
    assert done[0].reason == "error"
    assert "out of memory" in str(done[0].error)
    assert tokens(done[1:]) == [naive.generate(LLAMA.model, r.prompt, 10, r.program) for r in good]


def test_a_program_that_cannot_be_made_resident_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = engine()
    acquire = type(shared._bank).acquire

    def full(bank, program):  # type: ignore[no-untyped-def]
        if program.rank > 1:
            raise torch.OutOfMemoryError("no room")
        return acquire(bank, program)

    monkeypatch.setattr(type(shared._bank), "acquire", full)
    good = [Request(str(i), p, greedy(), across_program(i)) for i, p in enumerate(PROMPTS)]
    wide = across_program(9, rank=2)
    done = run(
        shared,
        [*good[:1], Request("a", PROMPTS[0], greedy(), wide), Request("b", PROMPTS[0], greedy(), wide), *good[1:]],
    )
    assert [d.reason for d in done[1:3]] == ["error", "error"]
    assert tokens([done[0], *done[3:]]) == [naive.generate(LLAMA.model, r.prompt, 10, r.program) for r in good]


def test_effort_stays_within_the_budget_and_is_reported() -> None:
    strong = across_program(1, layers=(0, 1, 2), size=5.0)
    free, bound = run(
        engine(),
        [
            Request("free", PROMPTS[0], greedy(), strong),
            Request("bound", PROMPTS[0], greedy(), replace(strong, guard=Guard(max_effort=0.25))),
        ],
    )
    assert free.receipt is not None
    assert bound.receipt is not None
    assert free.receipt.effort["sum_max"] > 0.3
    assert free.receipt.effort["saturated_tokens"] == 0
    assert bound.receipt.effort["sum_max"] <= 0.25 * (1 + 1e-5)
    assert bound.receipt.effort["saturated_tokens"] > 0
    assert bound.receipt.tokens_steered == 10  # the last prompt token and nine generated ones


def test_a_trust_region_runs_from_the_unsteered_to_the_steered_model() -> None:
    program = across_program(5, layers=(0, 1, 2), scope=Scope("all"))
    sampling = Sampling(max_tokens=10, seed=1, logprobs=0, ignore_eos=True)
    steered, plain = run(engine(), [Request("s", PROMPTS[0], sampling, program), Request("p", PROMPTS[0], sampling)])
    assert steered.tokens != plain.tokens

    def guarded(kappa: float) -> Finished:
        request = Request("g", PROMPTS[0], sampling, replace(program, guard=Guard(max_kl=kappa)))
        return run(engine(max_step_tokens=5), [request, Request("n", PROMPTS[1], sampling)])[0]

    loose, tight, middle = guarded(1e6), guarded(0.0), guarded(0.05)
    assert loose.tokens == steered.tokens
    assert tight.tokens == plain.tokens
    assert [x.logprob for x in tight.logprobs or ()] == pytest.approx(
        [x.logprob for x in plain.logprobs or ()], abs=1e-4
    )
    for done, top in ((loose, math.inf), (tight, 0.0), (middle, 0.05)):
        assert done.receipt is not None
        assert done.receipt.kl is not None
        assert done.receipt.kl["max"] <= top * (1 + 1e-6)
    assert loose.receipt is not None
    assert loose.receipt.kl is not None
    assert loose.receipt.kl["limited_tokens"] == 0
    assert middle.receipt is not None
    assert middle.receipt.kl is not None
    assert middle.receipt.kl["limited_tokens"] > 0


def test_deltas_join_to_the_final_text_and_carry_the_traces() -> None:
    seen: list[Event] = []
    own = engine()
    own.submit(Request("a", PROMPTS[0], greedy(), across_program(1), trace=True), seen.append)
    while own.step():
        pass
    *deltas, end = seen
    assert isinstance(end, Finished)
    assert "".join(d.text for d in deltas if isinstance(d, Delta)) == end.text
    assert end.text.split() == LLAMA.tokenizer.decode(list(end.tokens), skip_special_tokens=True).split()
    assert [d.trace for d in deltas if isinstance(d, Delta)] == list(end.trace or ())
    assert end.receipt is not None
    tracking = end.receipt.tracking["c"]
    by_layer = [
        [r.projection for r in readings if r.layer == layer] for readings in end.trace or () for layer in (1, 2)
    ]
    means = [sum(x[0] for x in by_layer[i::2]) / 10 for i in (0, 1)]
    assert tracking.by_layer == pytest.approx(means, rel=1e-5)
    assert tracking.mean == tracking.by_layer[1]
    assert all(r.setpoint == 1.0 and r.effort > 0 for readings in end.trace or () for r in readings)


def test_stop_ids_eos_and_lengths_end_a_request() -> None:
    free = naive.generate(LLAMA.model, PROMPTS[0], 10)
    third = free[2]
    at = free.index(third)
    stop, barred = run(
        engine(),
        [
            Request("stop", PROMPTS[0], greedy(stop_token_ids=(third,))),
            Request("late", PROMPTS[0], greedy(stop_token_ids=(third,), min_tokens=at + 2)),
        ],
    )
    assert (stop.reason, stop.stop_reason, list(stop.tokens)) == ("stop", third, free[: at + 1])
    assert stop.usage.completion == at + 1
    assert len(barred.tokens) >= at + 2
    assert barred.tokens[at] != third

    own = engine()
    own.eos = frozenset({third})
    ended, ignored = run(
        own, [Request("e", PROMPTS[0], greedy(ignore_eos=False)), Request("i", PROMPTS[0], greedy(ignore_eos=True))]
    )
    assert (ended.reason, ended.stop_reason, list(ended.tokens)) == ("stop", None, free[: at + 1])
    assert list(ignored.tokens) == free


def test_stop_strings_never_leave() -> None:
    free = run(engine(), [Request("a", PROMPTS[0], greedy())])[0]
    word = free.text.split()[3]
    stop = free.text[free.text.index(word) - 2 : free.text.index(word) + 1]
    assert " " in stop
    cut = run(engine(), [Request("a", PROMPTS[0], greedy(stop=(stop,)))])[0]
    assert cut.text == free.text[: free.text.index(stop)]
    assert (cut.reason, cut.stop_reason) == ("stop", stop)


def test_abort_frees_the_rows_before_the_next_step() -> None:
    own = engine(max_batch=1)
    seen: list[Event] = []
    own.submit(Request("a", PROMPTS[0], greedy(50), across_program(1)), seen.append)
    own.submit(Request("b", PROMPTS[1], greedy(50)), seen.append)
    own.step()
    own.abort("a")
    own.abort("nobody")
    own.step()
    ends = [e for e in seen if isinstance(e, Finished)]
    assert [(e.request_id, e.reason, len(e.tokens)) for e in ends] == [("a", "abort", 1)]
    assert list(own._scheduler.running) == ["b"]
    own.abort("b")
    own.step()
    assert own.stats().running == own.stats().waiting == 0
    assert own.stats().finished == {"abort": 2}


def test_a_receiver_that_fails_ends_its_own_request() -> None:
    own = engine()
    seen: list[Event] = []

    def fails(event: Event) -> None:
        raise RuntimeError("gone")

    own.submit(Request("bad", PROMPTS[0], greedy()), fails)
    own.submit(Request("good", PROMPTS[1], greedy()), seen.append)
    while own.step():
        pass
    assert own.stats().finished == {"abort": 1, "length": 1}
    assert isinstance(seen[-1], Finished)
    assert list(seen[-1].tokens) == naive.generate(LLAMA.model, PROMPTS[1], 10)


def test_the_queue_is_bounded() -> None:
    own = engine(max_batch=1, queue_limit=1)
    for name in "ab":
        own.submit(Request(name, PROMPTS[0], greedy(3)), lambda event: None)
    with pytest.raises(QueueFull, match="2 places"):
        own.submit(Request("c", PROMPTS[0], greedy(3)), lambda event: None)
    assert own.stats().rejected == 1
    while own.step():
        pass
    own.submit(Request("c", PROMPTS[0], greedy(3)), lambda event: None)


def test_what_does_not_fit_the_model_is_refused_at_once() -> None:
    own = engine(max_model_len=20)
    with pytest.raises(PlantError, match=r"14 tokens and max_tokens is 7: expected at most 20") as long:
        own.submit(Request("a", PROMPTS[0], greedy(7)), lambda event: None)
    assert long.value.param == "max_tokens"
    with pytest.raises(PlantError) as longer:
        own.submit(Request("a", PROMPTS[0] * 2, greedy(1)), lambda event: None)
    assert longer.value.param == "prompt"
    with pytest.raises(SpecError, match="prompt"):
        own.submit(Request("a", (1, VOCAB), greedy(1)), lambda event: None)
    with pytest.raises(SpecError, match="logit_bias"):
        own.submit(Request("a", (1,), greedy(1, logit_bias={VOCAB: 1.0})), lambda event: None)
    with pytest.raises(DimensionMismatch, match=r"resid_pre\.1"):
        own.submit(Request("a", (1,), greedy(1), across_program(1, read=16)), lambda event: None)
    with pytest.raises(PlantError, match="layer 9"):
        own.submit(Request("a", (1,), greedy(1), across_program(1, layers=(9,))), lambda event: None)
    with pytest.raises(SpecError, match="max_model_len"):
        engine(max_model_len=129)
    assert own.stats().waiting == 0


def test_what_fails_before_a_request_is_queued_is_told_to_its_sender_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    own, ended = engine(), list[Event]()
    own.submit(Request("a", PROMPTS[0], greedy(3)), ended.append)
    decode = own._decode
    monkeypatch.setattr(own, "_decode", lambda ids: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        own.submit(Request("b", PROMPTS[1], greedy(3)), ended.append)
    monkeypatch.setattr(own, "_decode", decode)
    assert own.stats().waiting == 1
    while own.step():
        pass
    assert [event.request_id for event in ended if isinstance(event, Finished)] == ["a"]


def test_a_thread_serves_aborts_and_drains() -> None:
    own = engine(max_model_len=96)
    own.start()
    done = own.generate([Request(str(i), p, greedy(), across_program(i)) for i, p in enumerate(PROMPTS)])
    assert tokens(done) == [naive.generate(LLAMA.model, p, 10, across_program(i)) for i, p in enumerate(PROMPTS)]

    ended: dict[str, Finished] = {}
    gate = threading.Event()

    def deliver(event: Event) -> None:
        gate.wait(10)
        if isinstance(event, Finished):
            ended[event.request_id] = event

    own.submit(Request("long", PROMPTS[1], greedy(80)), deliver)
    own.submit(Request("gone", PROMPTS[2], greedy(80)), deliver)
    own.abort("gone")
    threading.Timer(0.1, gate.set).start()
    own.stop(drain_seconds=30)
    assert ended["long"].reason == "length"
    assert ended["gone"].reason == "abort"
    with pytest.raises(QueueFull, match="shutting down"):
        own.submit(Request("late", PROMPTS[1], greedy()), deliver)


def test_stop_without_patience_aborts() -> None:
    own = engine(max_model_len=128)
    own.start()
    ends: list[Event] = []
    own.submit(Request("long", PROMPTS[1], greedy(100)), lambda e: (time.sleep(0.01), ends.append(e))[0])
    own.stop(drain_seconds=0)
    assert isinstance(ends[-1], Finished)
    assert ends[-1].reason == "abort"
