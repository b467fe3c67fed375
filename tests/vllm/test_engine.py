"""The vLLM engine tells, word for word, what the native one tells; and ends what must end without touching the rest."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from steering import (
    Delta,
    Engine,
    EngineSettings,
    Finished,
    GrammarCompiler,
    Guard,
    PlantError,
    Program,
    QueueFull,
    Request,
    Scope,
    SpecError,
    SteeringError,
    TokenLogprob,
    VllmEngine,
    VllmSettings,
    When,
    Window,
)
from tests.tolerances import RUNTIME
from tests.vllm.common import chat, long_chat, plant, program, request, told

pytest.importorskip("vllm", reason="vLLM is not installed here: make vllm-test")

SCHEMA = {
    "type": "object",
    "properties": {"mood": {"enum": ["good", "bad"]}},
    "required": ["mood"],
    "additionalProperties": False,
}
LOW: dict[str, Any] = {"concept": "positive", "layer": 3, "below": 0.5}


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmEngine]:
    found = VllmEngine(plant(), VllmSettings(max_batch=4, queue_limit=8, kv_tokens=2048))
    yield found
    found.stop()


@pytest.fixture(scope="module")
def native() -> Iterator[Engine]:
    found = Engine(plant(), EngineSettings(max_batch=4))
    yield found
    found.stop()


def both(engine: VllmEngine, native: Engine, requests: list[Request]) -> list[tuple[Finished, Finished]]:
    return list(zip(engine.generate(requests), native.generate(requests), strict=True))


def streamed(engine: VllmEngine | Engine, one: Request) -> list[Delta]:
    deltas: list[Delta] = []
    ended = threading.Event()

    def deliver(event: Delta | Finished) -> None:
        if isinstance(event, Delta):
            deltas.append(event)
        else:
            ended.set()

    engine.submit(one, deliver)
    while not ended.is_set():
        if isinstance(engine, Engine):
            engine.step()
        else:
            ended.wait(0.01)
    return deltas


def idle(engine: VllmEngine) -> bool:
    """Whether nothing is left of any request, after a moment at most."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        stats = engine.stats()
        if not stats.running and not stats.waiting and stats.kv_used_ratio == 0:
            return True
        time.sleep(0.01)
    return False


VARIED: list[dict[str, Any]] = [
    {},
    {"max_tokens": 40, "stop": ("mood", "dog has")},
    {"max_tokens": 40, "stop": ("The",), "min_tokens": 12},
    {"max_tokens": 64},
    {"max_tokens": 64, "ignore_eos": True},
    {"max_tokens": 64, "ignore_eos": True, "min_tokens": 64},
    {"logit_bias": {2: 100.0}, "min_tokens": 3},
    {"stop_token_ids": (20,)},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.3, "logit_bias": {20: -5.0}},
    {"max_tokens": 1},
    {"temperature": 1.0, "top_k": 1, "seed": -1},
    {"temperature": 0.7, "top_p": 1e-6, "seed": 2**63 - 1},
]


def test_unsteered_requests_are_told_word_for_word(engine: VllmEngine, native: Engine) -> None:
    requests = [request(f"varied-{i}", **fields) for i, fields in enumerate(VARIED)]
    for found, expected in both(engine, native, requests):
        assert told(found) == told(expected)
    assert {end.reason for end, _ in both(engine, native, requests)} == {"stop", "length"}


def test_a_stream_has_the_same_pieces(engine: VllmEngine, native: Engine) -> None:
    one = request("stream", max_tokens=40, stop=("dog has",), own=program())
    found, expected = streamed(engine, one), streamed(native, one)
    assert [(d.token, d.text) for d in found] == [(d.token, d.text) for d in expected]
    assert len(found) > 10


def close(found: tuple[TokenLogprob | None, ...] | None, expected: tuple[TokenLogprob | None, ...] | None) -> None:
    assert found is not None
    assert expected is not None
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if one is None or other is None:
            assert one is other
            continue
        assert (one.token, one.rank, [t for t, _ in one.top]) == (other.token, other.rank, [t for t, _ in other.top])
        values = [one.logprob, *(value for _, value in one.top)]
        assert values == pytest.approx([other.logprob, *(value for _, value in other.top)], abs=RUNTIME["logprob"])


@pytest.mark.parametrize("own", [Program(), program()], ids=["unsteered", "steered"])
def test_log_probabilities_and_ranks(engine: VllmEngine, native: Engine, own: Program) -> None:
    requests = [
        request("generated", own=own, logprobs=5),
        request("unlikely", own=own, logprobs=2, logit_bias={20: 100.0}, max_tokens=3),
        request("prompt", own=own, prompt_logprobs=3),
        request("prompt alone", own=own, prompt_logprobs=0, max_tokens=0),
    ]
    for found, expected in both(engine, native, requests):
        assert told(found) == told(expected)
        if expected.logprobs is not None:
            close(found.logprobs, expected.logprobs)
        if expected.prompt_logprobs is not None:
            close(found.prompt_logprobs, expected.prompt_logprobs)


def programs() -> dict[str, Program]:
    return {
        "last and generation": program(),
        "whole prompt": program(apply=Scope(prompt="all")),
        "window": program(apply=Scope(prompt="none", generation=Window((3, 9)))),
        "token gate": program(when=When(**LOW, on="token")),
        "prompt gate": program(when=When(**LOW, on="prompt")),
        "closed gate": program(when=When(concept="positive", layer=3, below=-50.0, on="prompt")),
        "bounded": program(max_effort=0.05),
        "ablation": program("ablate", concept="refusal"),
        "at the last norm": program("eigenshift", plan="tone-eigenshift", alpha=0.0),
        "strength 0": program(strength=0.0),
    }


def receipts(found: Finished, expected: Finished) -> None:
    assert found.receipt is not None
    assert expected.receipt is not None
    one, other = found.receipt, expected.receipt
    assert (one.fingerprint, one.tokens_steered) == (other.fingerprint, other.tokens_steered)
    assert one.effort == pytest.approx(other.effort, **RUNTIME["receipt"], nan_ok=True)
    assert one.tracking.keys() == other.tracking.keys()
    for label, held in one.tracking.items():
        assert held.by_layer == pytest.approx(other.tracking[label].by_layer, **RUNTIME["receipt"], nan_ok=True)
    assert [(c.asked, c.met) for c in one.conditions] == [(c.asked, c.met) for c in other.conditions]


def test_steered_requests_with_their_receipts_and_traces(engine: VllmEngine, native: Engine) -> None:
    requests = [request(name, own=own, max_tokens=20, trace=True) for name, own in programs().items()]
    plain = native.generate([request("plain", max_tokens=20)])[0]
    pairs = both(engine, native, requests)
    for found, expected in pairs:
        assert told(found) == told(expected), found.request_id
        receipts(found, expected)
        assert found.trace is not None
        assert expected.trace is not None
        assert [[(r.label, r.layer) for r in token] for token in found.trace] == [
            [(r.label, r.layer) for r in token] for token in expected.trace
        ]
        values = [r.projection for token in found.trace for r in token]
        assert values == pytest.approx(
            [r.projection for token in expected.trace for r in token], **RUNTIME["receipt"], nan_ok=True
        )
    assert sum(found.tokens != plain.tokens for found, _ in pairs) >= 3, "the programs must matter"


def test_a_request_is_the_same_alone_and_in_any_batch(engine: VllmEngine) -> None:
    requests = [request(name, own=own) for name, own in programs().items()] + [request("plain")]
    together = engine.generate(requests)
    for one, expected in zip(requests, together, strict=True):
        (alone,) = engine.generate([one])
        assert told(alone) == told(expected)
        if expected.receipt is not None:
            receipts(alone, expected)


def test_a_seed_repeats_itself_and_another_does_not(engine: VllmEngine) -> None:
    def drawn(seed: int) -> tuple[int, ...]:
        (end,) = engine.generate([request("drawn", temperature=1.0, seed=seed, max_tokens=24, ignore_eos=True)])
        return end.tokens

    assert drawn(7) == drawn(7)
    assert len({drawn(seed) for seed in (-1, 0, 7, 2**62)}) > 1


def test_a_grammar_is_followed_as_on_the_native_engine(engine: VllmEngine, native: Engine) -> None:
    grammar = GrammarCompiler(plant()).json_schema(SCHEMA)
    decode = plant().tokenizer.decode
    # A model that was taught no JSON writes blanks to its last token.
    blanks = {token: -100.0 for token in range(plant().vocab) if not decode([token]).strip()}
    fields: dict[str, Any] = {"max_tokens": 60, "grammar": grammar, "logit_bias": blanks}
    requests = [
        request("greedy", **fields),
        request("steered", own=program(), **fields),
        request("drawn", temperature=1.0, seed=3, **fields),
    ]
    pairs = both(engine, native, requests)
    for found, expected in pairs[:2]:
        assert told(found) == told(expected)
    for found, _ in pairs:
        assert found.reason == "stop"
        assert json.loads(found.text)["mood"] in ("good", "bad")


def test_what_is_not_steered_is_shared_and_what_is_steered_is_measured_every_time(engine: VllmEngine) -> None:
    prompt = long_chat()
    first, again = (engine.generate([request("a", prompt)])[0] for _ in range(2))
    assert told(first) == told(again)
    assert again.usage.cached >= len(prompt) // 2
    last = program()
    one, two = (engine.generate([request("b", prompt, last)])[0] for _ in range(2))
    assert one.usage.cached >= len(prompt) // 2, "what comes before the first steered position is like everybody's"
    assert told(one) == told(two)
    receipts(two, one)
    whole = program(apply=Scope(prompt="all"))
    three, four = (engine.generate([request("c", prompt, whole)])[0] for _ in range(2))
    assert three.usage.cached == four.usage.cached == 0
    receipts(four, three)
    assert told(engine.generate([request("d", prompt)])[0]) == told(first), "nothing steered is left in the cache"
    (apart,) = engine.generate([request("e", prompt, cache_salt="a tenant")])
    assert apart.usage.cached == 0
    figures = engine.stats()
    assert figures.cached_tokens > 0
    assert figures.prefix_tokens > figures.cached_tokens


@pytest.mark.parametrize(
    ("change", "param", "part"),
    [
        ({"own": "kl"}, "guard.max_kl", "twin"),
        ({"own": "heads"}, "steering", "--model-impl transformers"),
        ({"prompt": (5,) * 512, "max_tokens": 0, "prompt_logprobs": 0}, "prompt", "511"),
        ({"max_tokens": 600}, "max_tokens", "512"),
        ({"prompt": (5, 99999)}, "prompt", "token ids"),
        ({"stop_token_ids": (99999,)}, "stop_token_ids", "token ids"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_name_before_it_runs(
    engine: VllmEngine, change: dict[str, Any], param: str, part: str
) -> None:
    owns = {
        "kl": lambda: replace(program(), guard=Guard(max_kl=0.1)),
        "heads": lambda: program("heads", plan="tone-heads", heads=2, mode="zero"),
    }
    fields = dict(change)
    if "own" in fields:
        fields["own"] = owns[fields["own"]]()
    with pytest.raises((SpecError, PlantError), match=part) as raised:
        engine.submit(request("refused", **fields), lambda event: None)
    assert raised.value.param == param
    assert idle(engine)


def test_one_diverges_and_the_others_go_on(engine: VllmEngine, native: Engine) -> None:
    requests = [
        request("fine", own=program()),
        request("diverged", long_chat(), own=program("add", concept="polite", strength=1e38), max_tokens=32),
        request("plain"),
    ]
    for found, expected in both(engine, native, requests):
        assert told(found) == told(expected)
    lost = engine.stats().nonfinite
    assert lost >= 1
    # Nobody sees what it left in blocks that others get: the pool is small enough that these use all of it.
    after = [request(f"after-{i}", long_chat()[: 60 + 7 * i], max_tokens=32) for i in range(24)]
    for found, expected in both(engine, native, after):
        assert told(found) == told(expected)
    assert engine.stats().nonfinite == lost


def test_an_aborted_request_ends_and_leaves_its_place(engine: VllmEngine) -> None:
    ends: dict[str, Finished] = {}
    begun = threading.Event()

    def deliver(event: Delta | Finished) -> None:
        if isinstance(event, Finished):
            ends[event.request_id] = event
        elif event.request_id == "long":
            begun.set()

    engine.submit(request("long", max_tokens=400, ignore_eos=True, own=program()), deliver)
    engine.submit(request("short", max_tokens=4), deliver)
    assert begun.wait(30)
    engine.abort("long")
    engine.abort("nobody")
    assert idle(engine)
    assert ends["long"].reason == "abort"
    assert 0 < len(ends["long"].tokens) < 400
    assert ends["long"].receipt is not None
    assert ends["long"].receipt.tokens_steered == len(ends["long"].tokens), (
        "of the prompt the last, of these all but one"
    )
    assert ends["short"].reason == "length"


def test_a_receiver_that_fails_ends_its_own_request_alone(engine: VllmEngine) -> None:
    def deliver(event: Delta | Finished) -> None:
        raise ConnectionError

    engine.submit(request("gone", max_tokens=400, ignore_eos=True), deliver)
    (other,) = engine.generate([request("other", max_tokens=4)])
    assert other.reason == "length"
    assert idle(engine)


def test_a_step_that_fails_ends_its_requests_and_no_later_one(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret detail")

    with monkeypatch.context() as patched:
        patched.setattr(engine._llm.engine_core.engine_core.model_executor, "execute_model", fail)
        ends = engine.generate([request("one"), request("two", own=program())])
    assert [end.reason for end in ends] == ["error", "error"]
    assert all(end.error is not None and "secret" not in end.error.message for end in ends)
    (after,) = engine.generate([request("after")])
    assert after.reason == "length"
    assert idle(engine)


def test_what_cannot_be_told_of_one_request_ends_it_alone(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("secret detail")

    monkeypatch.setattr("steering.vllm.engine.reported", fail)
    fields: list[dict[str, Any]] = [{"prompt_logprobs": 1}, {"logprobs": 1}, {}]
    ends = engine.generate([request(f"told-{i}", max_tokens=4, **more) for i, more in enumerate(fields)])
    assert [end.reason for end in ends] == ["error", "error", "length"]
    assert idle(engine)


def test_too_many_are_turned_away_and_an_id_is_used_once(engine: VllmEngine) -> None:
    many = [request(f"many-{i}", max_tokens=300, ignore_eos=True) for i in range(13)]
    for one in many[:12]:
        engine.submit(one, lambda event: None)
    with pytest.raises(QueueFull, match="12 places"):
        engine.submit(many[12], lambda event: None)
    for one in many:
        engine.abort(one.id)
    assert idle(engine)
    engine.submit(request("twice", max_tokens=300, ignore_eos=True), lambda event: None)
    with pytest.raises(SpecError, match="no running request"):
        engine.submit(request("twice"), lambda event: None)
    engine.abort("twice")
    assert idle(engine)


def test_its_place_and_its_tokens_are_counted(engine: VllmEngine) -> None:
    before = engine.stats()
    ends = engine.generate([request(f"counted-{i}", max_tokens=5) for i in range(6)])
    after = engine.stats()
    assert after.generated_tokens - before.generated_tokens == sum(len(end.tokens) for end in ends)
    assert after.prompt_tokens - before.prompt_tokens == 6 * len(chat())
    assert sum(after.finished.values()) - sum(before.finished.values()) == 6
    assert all(end.queued_seconds is not None and 0 <= end.queued_seconds < 30 for end in ends)


def test_interrupted_requests_are_measured_once_and_stopping_takes_no_more(native: Engine) -> None:
    own = VllmEngine(plant(), VllmSettings(max_batch=3, max_model_len=128, kv_tokens=160))
    assert own.max_model_len == 128
    requests = [
        request(name, own=program(apply=Scope(prompt="all")), max_tokens=90, ignore_eos=True)
        for name in ("a", "b", "c")
    ]
    for found, expected in both(own, native, requests):
        assert told(found) == told(expected)
        receipts(found, expected)
    assert own.stats().preempted > 0
    ends: list[Finished] = []
    own.submit(
        request("running", max_tokens=20, own=program()), lambda e: ends.append(e) if isinstance(e, Finished) else None
    )
    own.stop(30.0)
    assert own.is_closing
    assert [end.reason for end in ends] == ["length"]
    with pytest.raises(QueueFull, match="shutting down"):
        own.submit(request("late"), lambda event: None)
    own.stop()


def test_what_vllm_cannot_start_with_is_told_in_one_sentence() -> None:
    with pytest.raises(SpecError, match="max_model_len") as raised:
        VllmEngine(plant(), VllmSettings(max_model_len=4096))
    assert raised.value.param == "max_model_len"
    with pytest.raises(SpecError, match="kv_tokens"):
        VllmEngine(plant(), VllmSettings(kv_tokens=64))
    with pytest.raises(SteeringError, match=r"^[^\n]+$"):
        VllmEngine(plant(), VllmSettings(quantization="nf4"))
