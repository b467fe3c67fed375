"""What a prompt's own tokens were worth to the (steered) model, and requests that only read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from steering.errors import Diverged
from steering.plant.layouts import layout_of
from steering.plant.plant import Plant
from steering.plant.taps import tap
from steering.program import Guard, Positions, Program, Scope, Term
from steering.runtime import Delta, Engine, EngineSettings, Event, Finished, Request, Sampling, flights
from steering.runtime.runner import Output
from steering.types import across
from tests.plants import VOCAB, prompts, tiny, tiny_tokenizer
from tests.runtime import naive
from tests.runtime.naive import across_program, greedy, law, run
from tests.tolerances import RUNTIME

LLAMA = Plant(tiny("llama"), tiny_tokenizer())
PROMPTS = [tuple(prompt) for prompt in prompts(5)]
READ = Sampling(max_tokens=0, prompt_logprobs=3)


def engine(plant: Plant = LLAMA, **settings: int) -> Engine:
    return Engine(plant, EngineSettings(**{"max_batch": 16, "max_model_len": 96} | settings))


def logprobs_of(model: PreTrainedModel, prompt: tuple[int, ...], program: Program) -> Tensor:
    """(T − 1, V): log-probabilities after each prompt token but the last, in one pass of the whole prompt."""
    spot = naive.Spot(len(prompt))
    handles = [tap(model, layout_of(model), site, fn) for site, fn in naive.hooks(program, spot)]
    try:
        with torch.inference_mode():
            return model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    finally:
        for handle in handles:
            handle.remove()


def assert_naive(model: PreTrainedModel, done: Finished, prompt: tuple[int, ...], program: Program) -> None:
    assert done.error is None
    first, *rest = done.prompt_logprobs or ()
    assert first is None
    wanted_TV = logprobs_of(model, prompt, program)
    assert len(rest) == len(wanted_TV) == len(prompt) - 1
    for report, row_V, token in zip(rest, wanted_TV, prompt[1:], strict=True):
        assert report is not None
        assert report.token == token
        assert report.logprob == pytest.approx(float(row_V[token]), abs=RUNTIME["logprob"])
        assert [value for _, value in report.top] == pytest.approx(
            row_V.topk(3).values.tolist(), abs=RUNTIME["logprob"]
        )
        assert report.rank == pytest.approx(1 + int((row_V > row_V[token]).sum()), abs=1)  # a near tie may swap


PROGRAMS = [
    Program(),
    across_program(1, scope=Scope("all")),
    across_program(2, layers=(0, 1, 2), rank=2, scope=Scope(Positions((0, -2, 3)))),
    across_program(3),
    across_program(4, layers=(0,), scope=Scope("all", "none")),
]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("chunk", [5, 512])
def test_they_equal_one_pass_of_the_whole_prompt(family: str, chunk: int) -> None:
    plant = Plant(tiny(family))
    pairs = list(zip(PROMPTS, PROGRAMS, strict=True))
    done = run(engine(plant, max_step_tokens=chunk), [Request(str(i), p, READ, g) for i, (p, g) in enumerate(pairs)])
    for one, (prompt, program) in zip(done, pairs, strict=True):
        assert_naive(plant.model, one, prompt, program)
    plain = logprobs_of(plant.model, PROMPTS[1], Program())
    assert (plain - logprobs_of(plant.model, PROMPTS[1], PROGRAMS[1])).abs().max() > 0.1, "the programs must matter"


def test_readers_and_writers_share_a_batch() -> None:
    asked = greedy(6, prompt_logprobs=3)
    requests = [Request(str(i), p, (READ, asked, greedy(6))[i % 3], PROGRAMS[i]) for i, p in enumerate(PROMPTS)]
    done = run(engine(max_step_tokens=6), requests)
    for one, request in zip(done, requests, strict=True):
        n_tokens = request.sampling.max_tokens
        assert list(one.tokens) == naive.generate(LLAMA.model, request.prompt, n_tokens, request.program)
        if request.sampling.prompt_logprobs is None:
            assert one.prompt_logprobs is None
        else:
            assert_naive(LLAMA.model, one, request.prompt, request.program)


def events_of(own: Engine, request: Request) -> list[Event]:
    seen: list[Event] = []
    own.submit(request, seen.append)
    while own.step():
        pass
    return seen


def test_a_request_without_tokens_only_reads() -> None:
    own = engine(max_step_tokens=4)
    (end,) = events_of(own, Request("a", PROMPTS[0], Sampling(max_tokens=0), across_program(1, scope=Scope("all"))))
    assert isinstance(end, Finished)
    assert (end.reason, end.tokens, end.text, end.prompt_logprobs) == ("length", (), "", None)
    assert (end.usage.prompt, end.usage.completion) == (14, 0)
    assert end.receipt is not None
    assert end.receipt.tokens_steered == 14
    assert own.stats().generated_tokens == 0
    assert own.stats().running == 0
    # A prompt as long as a row has no place for a token, and needs none.
    assert run(engine(max_model_len=14), [Request("b", PROMPTS[0], READ)])[0].prompt_logprobs is not None


def test_a_prompt_of_one_token_has_nothing_before_it() -> None:
    own = engine()
    read, written = run(own, [Request("a", (5,), READ), Request("b", (5,), greedy(2, prompt_logprobs=0))])
    assert read.prompt_logprobs == written.prompt_logprobs == (None,)
    assert list(written.tokens) == naive.generate(LLAMA.model, (5,), 2)


def test_the_first_delta_carries_them() -> None:
    *deltas, end = events_of(engine(max_step_tokens=5), Request("a", PROMPTS[0], greedy(4, prompt_logprobs=2)))
    assert isinstance(end, Finished)
    carried = [delta.prompt_logprobs for delta in deltas if isinstance(delta, Delta)]
    assert carried == [end.prompt_logprobs, None, None, None]
    assert carried[0] is not None
    assert len(carried[0]) == 14


def test_a_prompt_that_was_not_read_to_its_end_has_none() -> None:
    own = engine(max_step_tokens=4)
    seen: list[Event] = []
    own.submit(Request("a", PROMPTS[0], READ), seen.append)
    own.step()
    own.abort("a")
    own.step()
    (end,) = seen
    assert isinstance(end, Finished)
    assert (end.reason, end.prompt_logprobs) == ("abort", None)


def test_a_trust_region_bounds_what_is_drawn_not_what_was_read() -> None:
    program = across_program(5, layers=(0, 1, 2), scope=Scope("all"))
    guarded = replace(program, guard=Guard(max_kl=0.0))
    for sampling in (READ, greedy(3, prompt_logprobs=3)):
        (one,) = run(engine(max_step_tokens=6), [Request("a", PROMPTS[0], sampling, guarded)])
        assert_naive(LLAMA.model, one, PROMPTS[0], program)


def test_a_state_that_is_not_finite_ends_its_reader_alone() -> None:
    wild = Program(
        (Term("x", "lqr", {across(1): replace(law(1), setpoint=torch.tensor([math.inf]))}, Scope(Positions((3,)))),)
    )
    lost, fine = run(engine(), [Request("a", PROMPTS[0], READ, wild), Request("b", PROMPTS[1], READ)])
    assert lost.reason == "error"
    assert isinstance(lost.error, Diverged)
    assert lost.prompt_logprobs is None
    assert_naive(LLAMA.model, fine, PROMPTS[1], Program())


def test_logits_are_judged_in_slices_and_only_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    own, kept, judge = engine(), list[int](), flights._judge

    def counted(output: Output) -> Iterator[flights._Judged]:
        kept.append(len(output.judged_JV))
        return judge(output)

    monkeypatch.setattr(flights, "_judge", counted)
    whole = run(own, [Request("a", PROMPTS[0], READ)])[0]
    assert kept == [13]
    monkeypatch.setattr(flights, "_SLICE", 3)
    sliced = run(own, [Request("a", PROMPTS[0], READ)])[0]
    for one, other in zip((whole.prompt_logprobs or ())[1:], (sliced.prompt_logprobs or ())[1:], strict=True):
        assert one is not None
        assert other is not None
        assert (one.token, one.rank) == (other.token, other.rank)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-6)
    kept.clear()
    run(own, [Request("a", PROMPTS[0], greedy(3)), Request("b", PROMPTS[1], greedy(3), across_program(1))])
    assert not any(kept)


def test_a_small_vocabulary_has_no_more_alternatives_than_tokens() -> None:
    (one,) = run(engine(), [Request("a", PROMPTS[0], Sampling(max_tokens=1, prompt_logprobs=20, logprobs=20))])
    assert all(report is None or len(report.top) == 20 <= VOCAB for report in one.prompt_logprobs or ())
    plant = Plant(tiny("llama", vocab=12))
    (few,) = run(engine(plant), [Request("a", (3, 4, 5), Sampling(max_tokens=1, prompt_logprobs=20, logprobs=20))])
    assert [len(report.top) for report in few.prompt_logprobs or () if report] == [12, 12]
