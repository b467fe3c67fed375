"""Conditions: an intervention acts exactly where the measured projection meets its bounds, and the receipt says so."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from steering.condition import Gate, On, When
from steering.program import Program, Scope, Term, Window
from steering.runtime import Engine, EngineSettings, Event, Finished, Request
from steering.runtime.scope import Spot, Steered, admitted
from steering.types import across, at
from tests.plants import WIDTH
from tests.runtime import naive
from tests.runtime.naive import across_program, greedy, law, run
from tests.runtime.test_engine import LLAMA, PROMPTS, assert_naive, engine

NEVER, ALWAYS = 1e9, -1e9


def gate(layer: int = 1, above: float = 0.0, *, on: On = "token", seed: int = 5) -> Gate:
    """Open where a random probe at the input of `layer` measures more than `above`."""
    probe = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    when = When(concept="c", layer=layer, above=above, on=on, units="absolute")
    return Gate(when, probe, above, math.inf, 0.0, 1.0)


def behind(condition: Gate, program: Program) -> Program:
    return Program(tuple(replace(term, gate=condition) for term in program.terms))


def measured(prompt: tuple[int, ...], condition: Gate) -> float:
    """What the gate measures at the prompt's last token of the plain model."""
    with torch.inference_mode():
        states = LLAMA.model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
    return float(states[condition.when.layer][0, -1] @ condition.probe)


def test_a_batch_of_conditions_equals_the_naive_loop() -> None:
    scope = Scope("all", Window((1, 8)))
    two = Program(
        (
            Term("a", "lqr", {across(1): law(1), across(2): law(2)}, scope, gate=gate(1, 0.3)),
            Term(
                "b", "add", {at("resid_pre", 2): law(3), at("final"): law(4)}, Scope("all"), gate=gate(2, -0.2, seed=6)
            ),
            Term("c", "lqr", {across(0): law(8)}),
        )
    )
    programs = [
        behind(gate(1, 0.1), across_program(1, scope=Scope("all"))),
        behind(gate(2, 0.0, on="prompt"), across_program(2, layers=(0, 1, 2))),
        two,
        Program(),
        behind(gate(2, 0.0, on="prompt", seed=9), across_program(3, scope=Scope("none"))),
    ]
    pairs = list(zip(PROMPTS, programs, strict=True))
    for budget in (64, 7):
        requests = [Request(str(i), p, greedy(logprobs=0), g) for i, (p, g) in enumerate(pairs)]
        done = run(engine(max_step_tokens=budget), requests)
        assert_naive(LLAMA.model, done, pairs)
        asked = [c for one in done if one.receipt for c in one.receipt.conditions]
        assert [c.asked for c in asked][1] == 1, "a condition on the prompt is asked once"
        assert any(0 < c.met < c.asked for c in asked), "a condition on tokens must open and close"


@pytest.mark.parametrize("on", ["token", "prompt"])
def test_an_open_gate_is_no_gate_and_a_closed_one_no_steering(on: On) -> None:
    free = across_program(1)
    requests = [
        Request("open", PROMPTS[0], greedy(logprobs=0), behind(gate(1, ALWAYS, on=on), free)),
        Request("free", PROMPTS[0], greedy(logprobs=0), free),
        Request("shut", PROMPTS[0], greedy(logprobs=0), behind(gate(1, NEVER, on=on), free)),
        Request("none", PROMPTS[0], greedy(logprobs=0)),
    ]
    is_open, is_free, shut, none = run(engine(), requests)
    assert (is_open.tokens, is_open.logprobs) == (is_free.tokens, is_free.logprobs)
    assert (shut.tokens, shut.logprobs) == (none.tokens, none.logprobs)
    assert is_free.tokens != none.tokens
    assert is_open.receipt
    assert is_free.receipt
    assert shut.receipt
    assert is_open.receipt.tokens_steered == is_free.receipt.tokens_steered == 10
    assert is_open.receipt.effort == is_free.receipt.effort
    assert shut.receipt.tokens_steered == 0
    assert shut.receipt.effort["max"] == 0
    assert all(math.isnan(value) for value in shut.receipt.tracking["c"].by_layer)


@pytest.mark.parametrize("prompt", PROMPTS[:3])
def test_a_condition_on_the_prompt_reads_what_a_capture_reads(prompt: tuple[int, ...]) -> None:
    value = measured(prompt, gate(2, 0.0, on="prompt"))
    close = 1e-4 * max(1.0, abs(value))
    requests = [
        Request(name, prompt, greedy(3), behind(gate(2, value + off, on="prompt"), across_program(1)))
        for name, off in (("met", -close), ("missed", close))
    ]
    met, missed = run(engine(), requests)
    assert met.receipt
    assert missed.receipt
    assert [c.met for c in (*met.receipt.conditions, *missed.receipt.conditions)] == [1, 0]
    assert met.receipt.conditions[0].mean == pytest.approx(value, abs=close)
    assert (met.receipt.tokens_steered, missed.receipt.tokens_steered) == (3, 0)


def test_blocks_before_the_gate_act_once_it_is_decided() -> None:
    """The gate measures block 2; at the prompt's last token block 0 is past, from the next token on it acts."""
    program = behind(gate(2, ALWAYS, on="prompt"), across_program(4, layers=(0,)))
    steered, plain = (naive.logits_of(LLAMA.model, PROMPTS[1], 2, p) for p in (program, None))
    assert torch.equal(steered[0], plain[0])
    assert not torch.equal(steered[1], plain[1])
    done = run(engine(), [Request("one", PROMPTS[1], greedy(5, logprobs=0), program)])
    assert_naive(LLAMA.model, done, [(PROMPTS[1], program)])


def test_a_token_whose_gate_comes_behind_every_law_is_not_steered() -> None:
    """What is decided at the prompt's last token behind block 0 reaches block 0 from the first decode step on."""
    program = behind(gate(2, ALWAYS, on="prompt"), across_program(4, layers=(0,)))
    [done] = run(engine(), [Request("one", PROMPTS[1], greedy(5), program)])
    assert done.receipt
    assert (done.receipt.conditions[0].met, done.receipt.tokens_steered) == (1, 4)


def test_gates_close_and_open_anew_in_steps_that_share_a_frame() -> None:
    """Steps of the same sequences share one frame; visitors force others in between, after which it comes again."""
    program = behind(gate(1, 0.1), across_program(3))
    own, ends = engine(), list[Event]()
    own.submit(Request("stays", PROMPTS[0], greedy(24, logprobs=0), program, trace=True), ends.append)
    for step in range(40):
        own.step()
        if step % 5 == 4:
            own.submit(Request(f"visitor {step}", PROMPTS[1], greedy(1)), lambda _: None)
    done = ends[-1]
    assert isinstance(done, Finished)
    assert_naive(LLAMA.model, [done], [(PROMPTS[0], program)])
    acted = [bool(readings) for readings in done.trace or ()]
    assert (False, True) in pairwise(acted), "a gate must open after it was closed"


def test_each_segment_asks_its_own_gates_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a step's work grows with the square of its requests: 14 ms on the host at 64 of them."""
    spots = [Spot(str(i), 0, gate(), np.array([i]), np.array([True])) for i in range(3)]
    asked: list[float] = []
    monkeypatch.setattr(Gate, "is_open", lambda _, z: bool(asked.append(z)))
    one = Steered("1", np.array([1]), np.array([[True]]))
    kept = admitted(one, spots, [np.array([float(i)]) for i in range(3)])
    assert asked == [1.0]
    assert len(kept.tokens_K) == 0


def test_tokens_that_a_gate_let_pass_are_traced_and_the_others_are_not() -> None:
    program = behind(gate(1, 0.1), across_program(1))
    [done] = Engine(LLAMA, EngineSettings(max_batch=1, max_model_len=96)).generate(
        [Request("one", PROMPTS[0], greedy(12), program, trace=True)]
    )
    assert done.trace is not None
    assert done.receipt is not None
    acted = [bool(readings) for readings in done.trace]
    assert sum(acted) == done.receipt.conditions[0].met == done.receipt.tokens_steered
    assert 0 < sum(acted) < len(acted)


def test_an_infinite_strength_behind_a_closed_gate_is_nothing() -> None:
    term = Term("c", "lqr", {across(1): replace(law(1), strength=torch.tensor([math.inf]))}, gate=gate(1, NEVER))
    done, plain = run(
        engine(), [Request("a", PROMPTS[0], greedy(), Program((term,))), Request("b", PROMPTS[0], greedy())]
    )
    assert done.tokens == plain.tokens


def test_the_condition_is_part_of_the_fingerprint_and_costs_no_slot() -> None:
    free = across_program(1)
    programs = [free, *(behind(gate(1, a, on=on), free) for a in (0.0, 1.0) for on in ("token", "prompt"))]
    assert len({program.fingerprint for program in programs}) == len(programs)
    assert len({program.shape for program in programs}) == 1
