"""A step that is launched before the one before it has landed changes nothing but when: the same tokens, receipts and
events, whoever ends, is aborted, fails or has to make room meanwhile."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from steering.errors import SpecError
from steering.plant.plant import Plant
from steering.program import Guard, Program
from steering.runtime import Delta, Engine, EngineSettings, Event, Finished, Request, Sampling
from steering.runtime.flights import Flight
from steering.runtime.runner import Output, Runner
from steering.runtime.scheduler import Batch
from tests.runtime import naive
from tests.runtime.naive import across_program, greedy, run
from tests.runtime.test_engine import LLAMA, PROMPTS, tokens
from tests.runtime.test_grammar import COMPILER, PLANT, PROMPT
from tests.runtime.test_graphs import assert_equal, mixed, requests


def engine(plant: Plant = LLAMA, *, pipeline: bool = True, **settings: Any) -> Engine:
    return Engine(plant, EngineSettings(**{"max_batch": 16, "max_model_len": 96, "pipeline": pipeline} | settings))


def served(own: Engine, asked: Sequence[Request], *, every: int = 0) -> list[Event]:
    """All events in their order; a request more comes each so many steps, all at once for 0."""
    events, coming = list[Event](), iter(asked)
    for request in () if every else coming:
        own.submit(request, events.append)
    for step in range(400):
        if every and step % every == 0 and (request := next(coming, None)) is not None:
            own.submit(request, events.append)
        if not own.step() and len([e for e in events if isinstance(e, Finished)]) == len(asked):
            return events
    raise AssertionError("the engine did not come to an end")


def told(events: Sequence[Event]) -> list[object]:
    """What a receiver sees, without the time."""
    return [replace(event, queued_seconds=None) if isinstance(event, Finished) else event for event in events]


def seen(event: Event) -> tuple[object, ...]:
    """Whose event it is, and what it says."""
    if isinstance(event, Delta):
        return event.request_id, event.token, event.text
    return event.request_id, event.reason, event.stop_reason, event.text, event.usage


def ends(events: Sequence[Event]) -> list[Finished]:
    return sorted((e for e in events if isinstance(e, Finished)), key=lambda e: e.request_id)


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that were launched before their tokens were known."""
    found, call = list[int](), Runner.__call__

    def counted(self: Runner, batch: Batch, frame: Any, drawn_T: torch.Tensor | None = None) -> Output:
        if drawn_T is not None:
            found.append(batch.n_tokens)
        return call(self, batch, frame, drawn_T)

    monkeypatch.setattr(Runner, "__call__", counted)
    return found


@pytest.mark.parametrize("has_graphs", [False, True])
def test_every_event_is_the_same(has_graphs: bool, ahead: list[int]) -> None:
    """Laws, edits, gates, bounds; greedy or not; ends by length in turn. Bit for bit: the batches are the same."""
    asked = requests(mixed(), trace=True)
    wanted = served(engine(pipeline=False, graphs=has_graphs), asked)
    assert not ahead
    assert told(served(engine(graphs=has_graphs), asked)) == told(wanted)
    assert len(ahead) == 17, "of 19 steps all but the one of the prompts and the one behind it"
    assert set(ahead) == set(range(1, 9))


def test_those_who_come_later_join_as_soon(ahead: list[int]) -> None:
    asked = requests(mixed(), 9)
    own, eager = engine(), engine(pipeline=False)
    events = served(own, asked, every=4)
    assert_equal(ends(events), ends(served(eager, asked, every=4)))
    assert ahead


def test_whoever_ends_early_is_left_out_of_the_step_in_the_air(ahead: list[int]) -> None:
    """By an end token, a stop token or a stop string: none of them is known when the next step is launched."""
    free = naive.generate(LLAMA.model, PROMPTS[0], 12)
    text = run(engine(pipeline=False), [Request("a", PROMPTS[0], greedy(12))])[0].text
    asked = [
        Request("stop", PROMPTS[0], greedy(40, stop_token_ids=(free[5],))),
        Request("string", PROMPTS[0], greedy(40, stop=(text.split()[4],))),
        Request("one", PROMPTS[1], greedy(1)),
        Request("steered", PROMPTS[0], greedy(20, logprobs=1), across_program(1)),
    ]
    for n in (4, 2):  # beside others, and with none left for the step in the air
        own, eager = engine(), engine(pipeline=False)
        got, wanted = served(own, asked[:n]), served(eager, asked[:n])
        assert [seen(event) for event in got] == [seen(event) for event in wanted]
        assert_equal(ends(got), ends(wanted))  # a batch with one row more rounds its last bits otherwise
        assert own.stats() == eager.stats()
        assert own._flight is None
    assert ahead
    assert own.stats().kv_used_ratio == 0


def test_an_abort_takes_effect_before_what_is_in_the_air_lands(ahead: list[int]) -> None:
    own = engine()
    events = list[Event]()
    asked = [Request(name, PROMPTS[i], greedy(20), across_program(1)) for i, name in enumerate("ab")]
    for request in asked:
        own.submit(request, events.append)
    for _ in range(5):
        own.step()
    assert own._flight is not None
    own.abort("a")
    own.step()
    [gone] = [e for e in events if isinstance(e, Finished)]
    assert (gone.request_id, gone.reason, len(gone.tokens)) == ("a", "abort", 5)
    assert gone.receipt is not None
    assert gone.receipt.tokens_steered == 5  # the last of the prompt, and the four that were fed
    again = list[Event]()
    own.submit(replace(asked[0], sampling=greedy(3), program=Program()), again.append)  # the id is free at once
    while own.step():
        pass
    assert [list(e.tokens) for e in again if isinstance(e, Finished)] == [naive.generate(LLAMA.model, PROMPTS[0], 3)]
    assert list(ends(events)[1].tokens) == naive.generate(LLAMA.model, PROMPTS[1], 20, across_program(1))


def test_an_id_that_comes_again_is_not_taken_for_the_one_in_the_air() -> None:
    """Its first life ends with a token that the step in the air does not know yet; the second waits for that step."""
    free = naive.generate(LLAMA.model, PROMPTS[0], 12)
    at = free.index(free[4])
    own, first, again = engine(), list[Event](), list[Event]()
    second = Request("a", PROMPTS[1], greedy(6), across_program(2))

    def deliver(event: Event) -> None:
        first.append(event)
        if isinstance(event, Finished):
            own.submit(second, again.append)

    own.submit(Request("a", PROMPTS[0], greedy(30, stop_token_ids=(free[4],)), across_program(1)), lambda _: None)
    own.abort("a")
    own.step()
    own.submit(Request("a", PROMPTS[0], greedy(30, stop_token_ids=(free[4],))), deliver)
    own.submit(Request("b", PROMPTS[2], greedy(30)), lambda _: None)
    while own.step():
        pass
    assert list(ends(first)[0].tokens) == free[: at + 1]
    assert list(ends(again)[0].tokens) == naive.generate(LLAMA.model, PROMPTS[1], 6, across_program(2))


def test_a_state_that_is_not_finite_ends_its_request_alone(ahead: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The step in the air went on from whatever token it drew."""
    call = Runner.__call__

    def spoils(self: Runner, batch: Batch, frame: Any, *rest: Any) -> Output:
        output = call(self, batch, frame, *rest)
        logits_BV = output.logits_BV.clone()
        for b, segment in enumerate(output.sampled):
            if segment.sequence.request.id == "bad" and segment.start > 16:
                logits_BV[b] = torch.nan
        return output._replace(logits_BV=logits_BV)

    monkeypatch.setattr(Runner, "__call__", spoils)
    good = [Request(str(i), p, greedy(), across_program(i)) for i, p in enumerate(PROMPTS)]
    sampling = Sampling(max_tokens=20, temperature=1.0, top_p=0.9, top_k=9, min_p=0.01, seed=1, ignore_eos=True)
    own = engine()
    done = run(own, [Request("bad", PROMPTS[0], sampling), *good])
    assert (done[0].reason, len(done[0].tokens)) == ("error", 4)
    assert own.stats().nonfinite == 1
    assert tokens(done[1:]) == [naive.generate(LLAMA.model, r.prompt, 10, r.program) for r in good]
    assert ahead


def breaks(monkeypatch: pytest.MonkeyPatch, name: str, when: Callable[..., bool]) -> list[int]:
    """Make launches or landings fail. Returns where those that did began."""
    found: list[int] = []
    if name == "launch":
        call = Runner.__call__

        def fails(self: Runner, batch: Batch, frame: Any, *rest: Any) -> Output:
            if when(batch, bool(rest and rest[0] is not None)):
                found.append(batch.segments[0].start)
                raise torch.OutOfMemoryError("no room")
            return call(self, batch, frame, *rest)

        monkeypatch.setattr(Runner, "__call__", fails)
    else:
        land = Flight.land

        def fails_late(self: Flight) -> Any:
            if self.error is None and when(self.batch, False):
                found.append(self.batch.segments[0].start)
                raise RuntimeError("an asynchronous error")
            return land(self)

        monkeypatch.setattr(Flight, "land", fails_late)
    return found


def test_a_step_that_fails_in_the_air_is_launched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests(mixed())
    wanted = told(served(engine(pipeline=False), asked))
    found = breaks(monkeypatch, "launch", lambda batch, is_ahead: is_ahead and batch.segments[0].start % 3 == 0)
    assert told(served(engine(), asked)) == wanted
    assert len(found) > 3


@pytest.mark.parametrize("name", ["launch", "land"])
def test_the_request_at_fault_ends_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_bad(batch: Batch, _: bool) -> bool:
        return any(s.sequence.request.id == "bad" and s.start > 16 for s in batch.segments)

    found = breaks(monkeypatch, name, is_bad)
    good = [Request(str(i), p, greedy(), across_program(i)) for i, p in enumerate(PROMPTS)]
    done = run(engine(), [Request("bad", PROMPTS[0], greedy()), *good])
    assert (done[0].reason, len(done[0].tokens)) == ("error", 4)
    assert tokens(done[1:]) == [naive.generate(LLAMA.model, r.prompt, 10, r.program) for r in good]
    assert found


def test_sequences_that_have_to_make_room_come_back_with_the_same_tokens(ahead: list[int]) -> None:
    asked = [Request(str(i), PROMPTS[i % 5], greedy(40), across_program(i)) for i in range(5)]
    own, eager = engine(kv_tokens=160), engine(kv_tokens=160, pipeline=False)
    events = served(own, asked)
    assert_equal(ends(events), ends(served(eager, asked)))
    assert own.stats().preempted > 0
    assert ahead
    assert own.stats().kv_used_ratio == 0


def test_a_full_batch_goes_on_while_others_wait(ahead: list[int]) -> None:
    """With all rows taken nobody could start anyway; whoever ends makes room for the next."""
    asked = requests([across_program(i) for i in range(7)], 6)
    events = served(engine(max_batch=3), asked)
    assert tokens([replace(e, error=None) for e in ends(events)]) == tokens(
        ends(served(engine(max_batch=3, pipeline=False), asked))
    )
    assert ahead


@pytest.mark.parametrize("seed", range(6))
def test_whatever_comes_and_goes_each_request_gets_what_it_gets_alone(seed: int, ahead: list[int]) -> None:
    """Arrivals, aborts, stop tokens, ids that come again, few rows, few blocks and few slots, with graphs as well."""
    rng = random.Random(seed)
    programs = [Program(), *(across_program(i, rank=1 + i % 2) for i in range(5)), mixed()[3], mixed()[6]]
    alone = engine(pipeline=False)
    asked, wanted = list[Request](), list[Finished]()
    for i in range(18):
        sampling = Sampling(
            max_tokens=rng.randint(1, 40),
            temperature=rng.choice((0.0, 1.0)),
            seed=i,
            stop_token_ids=tuple(rng.sample(range(3, 64), rng.choice((0, 3)))),
            min_tokens=rng.choice((0, 0, 0, 2)),
            ignore_eos=True,
        )
        asked.append(Request(str(i % 9), rng.choice(PROMPTS), sampling, rng.choice(programs)))
        wanted += run(alone, asked[-1:])
    own = engine(max_batch=6, program_slots=5, kv_tokens=288, max_model_len=64, graphs=seed % 2 == 0)
    ended, events = dict[int, Finished](), list[tuple[int, Event]]()
    coming, steps = list(enumerate(asked)), 0
    while coming or len(ended) < len(asked):
        if coming and rng.random() < 0.4 and asked[coming[0][0]].id not in own._outstanding:
            at, request = coming.pop(0)
            own.submit(request, lambda event, at=at: events.append((at, event)))  # type: ignore[misc]
        if rng.random() < 0.03:
            own.abort(str(rng.randrange(9)))
        own.step()
        ended = {at: event for at, event in events if isinstance(event, Finished)}
        assert (steps := steps + 1) < 2000
    for at, end in ended.items():
        told_of = [event.token for i, event in events if i == at and isinstance(event, Delta)]
        assert list(end.tokens) == told_of
        if end.reason == "abort":
            assert end.tokens == wanted[at].tokens[: len(end.tokens)]
        else:
            assert_equal([end], [wanted[at]])
    assert ahead
    assert own._flight is None
    assert own.stats().kv_used_ratio == 0
    assert not any(slot.users for slot in own._bank._held.values())


def test_rules_that_depend_on_the_last_token_wait_for_it(ahead: list[int]) -> None:
    cases: list[Sampling] = [
        greedy(8, repetition_penalty=1.3),
        greedy(8, frequency_penalty=0.5),
        greedy(8, logit_bias={3: 1.0}),
        greedy(8, min_tokens=8),
    ]
    for sampling in cases:
        asked = [Request("a", PROMPTS[0], sampling), Request("b", PROMPTS[1], greedy(8))]
        assert told(served(engine(), asked)) == told(served(engine(pipeline=False), asked))
        assert not ahead


def test_a_grammar_waits_for_the_last_token(ahead: list[int]) -> None:
    sampling = Sampling(max_tokens=12, temperature=0, grammar=COMPILER.json_object())
    asked = [Request("a", PROMPT, sampling), Request("b", PROMPT, greedy(9))]
    assert told(served(engine(PLANT), asked)) == told(served(engine(PLANT, pipeline=False), asked))
    assert set(ahead) == {1}, "only when the other one is alone"


def test_a_twin_and_a_prompt_that_is_read_are_not_followed(ahead: list[int]) -> None:
    guarded = replace(across_program(5), guard=Guard(max_kl=0.05))
    asked = [Request("g", PROMPTS[0], greedy(8), guarded)]
    assert told(served(engine(), asked)) == told(served(engine(pipeline=False), asked))
    assert not ahead
    asked = [Request("r", PROMPTS[0], Sampling(max_tokens=0, prompt_logprobs=2))]
    assert told(served(engine(max_step_tokens=3), asked)) == told(
        served(engine(max_step_tokens=3, pipeline=False), asked)
    )
    assert not ahead


def test_draining_and_stopping_leave_nothing_in_the_air() -> None:
    own = engine(max_model_len=96)
    own.start()
    done = own.generate(requests(mixed()))
    assert_equal(done, run(engine(pipeline=False), requests(mixed())))
    events = list[Event]()
    own.submit(Request("long", PROMPTS[1], greedy(80)), events.append)
    own.stop(drain_seconds=0)
    assert isinstance(events[-1], Finished)
    assert events[-1].reason in ("abort", "length")
    assert own._flight is None
    assert own.stats().kv_used_ratio == 0


@pytest.mark.parametrize("name", ["graphs", "pipeline"])
def test_a_switch_is_true_false_or_null(name: str) -> None:
    with pytest.raises(SpecError, match=name):
        EngineSettings(**{name: 1})  # type: ignore[arg-type]
