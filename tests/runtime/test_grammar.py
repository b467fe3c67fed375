"""A completion with a grammar is what the grammar says, whoever shares its batch; its failure is its own."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from steering.demo import MODEL
from steering.errors import PlantError, SpecError
from steering.plant.plant import Plant
from steering.program import Guard, Program, Scope
from steering.runtime import Engine, EngineSettings, Finished, Grammar, GrammarCompiler, Request, Sampling, grammar
from steering.runtime.grammar import MAX_SCHEMA_BYTES, Matcher, common_multiple
from steering.runtime.sampler import Draw, forbid, sample
from tests.plants import tiny, tiny_tokenizer
from tests.runtime import naive
from tests.runtime.naive import across_program, run

TOKENIZER: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(MODEL)
KNOWN = len(TOKENIZER)
VOCAB = KNOWN + 11
"""Wider than the tokenizer, as padded checkpoints are, and no multiple of eight."""
EOS = 2
PLANT = Plant(tiny("llama", vocab=VOCAB), TOKENIZER)
COMPILER = GrammarCompiler(PLANT)
PROMPT = (1, 40, 50, 60)

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "mood": {"enum": ["glad", "sad"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "minItems": 1, "maxItems": 2},
        "ok": {"type": "boolean"},
    },
    "required": ["mood", "count", "tags", "ok"],
    "additionalProperties": False,
}


BLANKS = [token for token in range(KNOWN) if TOKENIZER.decode([token]).isspace()]
TIDY = dict.fromkeys(BLANKS, -20.0)
"""Bias against blanks, which a random model likes as well as any other token."""


def engine(plant: Plant = PLANT, **settings: int) -> Engine:
    return Engine(plant, EngineSettings(**{"max_batch": 16, "max_model_len": 128} | settings))


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False).input_ids)


def allowed(matcher: Matcher) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(matcher.mask(), bitorder="little")).tolist())


def assert_fulfils(text: str) -> None:
    value = json.loads(text)
    assert list(value) == ["mood", "count", "tags", "ok"]
    assert value["mood"] in ("glad", "sad")
    assert isinstance(value["count"], int)
    assert 0 <= value["count"] <= 99
    assert 1 <= len(value["tags"]) <= 2
    assert all(isinstance(tag, str) and len(tag) <= 3 for tag in value["tags"])
    assert isinstance(value["ok"], bool)


def test_every_completion_fulfils_its_schema_in_a_mixed_batch() -> None:
    form, noun = COMPILER.json_schema(SCHEMA), COMPILER.json_schema({"enum": ["yes", "no"]})
    guarded = across_program(2, scope=Scope("all"))
    programs = [across_program(1), across_program(0), Program(guarded.terms, Guard(max_kl=0.1))]
    requests = [
        Request(
            str(i),
            PROMPT,
            Sampling(
                max_tokens=110,
                temperature=(0.0, 1.0, 1.5)[i % 3],
                top_k=(0, 40)[i % 2],
                seed=i,
                logit_bias=TIDY,
                grammar=g,
            ),
            programs[i % 3] if i % 2 else Program(),
        )
        for i, g in enumerate([form, noun, None, form] * 3)
    ]
    together = run(engine(max_step_tokens=16), requests)
    for one, request in zip(together, requests, strict=True):
        assert one.error is None
        if request.sampling.grammar is form:
            assert one.reason == "stop"
            assert_fulfils(one.text)
        elif request.sampling.grammar is noun:
            assert (one.reason, one.stop_reason) == ("stop", None)
            assert one.text in ('"yes"', '"no"')
    assert len({one.text for one in together}) >= 8
    alone = [run(engine(), [request])[0] for request in requests[:4]]
    assert [one.tokens for one in together[:4]] == [one.tokens for one in alone]


def test_rows_without_a_grammar_draw_bit_for_bit_what_they_drew() -> None:
    logits_BV = 3 * torch.randn(4, VOCAB)
    rules = [Sampling(seed=i, logprobs=2, temperature=(0.0, 1.0)[i % 2], top_p=0.9) for i in range(4)]
    start = COMPILER.json_object().matcher()
    assert torch.equal(forbid(logits_BV, {2: start.mask()})[[0, 1, 3]], logits_BV[[0, 1, 3]])
    draws = [Draw.of(rule, PROMPT, frozenset({EOS})) for rule in rules]
    free, bound = sample(logits_BV, draws), sample(logits_BV, draws, {2: start.mask()})
    assert [bound[i] for i in (0, 1, 3)] == [free[i] for i in (0, 1, 3)]
    assert bound[2].token in allowed(start)
    assert free[2].token not in allowed(start)


def test_logprobs_stay_those_of_the_model() -> None:
    (one,) = run(engine(), [Request("a", PROMPT, Sampling(grammar=COMPILER.json_object(), temperature=0, logprobs=1))])
    raw_V = naive.logits_of(PLANT.model, PROMPT, 1)[0].log_softmax(-1)
    assert one.logprobs is not None
    first = one.logprobs[0]
    assert TOKENIZER.decode([first.token]) == "{"
    assert first.logprob == pytest.approx(float(raw_V[first.token]), abs=1e-4)
    assert first.top[0][0] == int(raw_V.argmax()) != first.token
    assert first.rank > 1


def test_a_mask_allows_what_continues_the_text_and_an_end_where_it_may_end() -> None:
    word = COMPILER.json_schema({"enum": ["yes", "no"]}).matcher()
    begins = {TOKENIZER.decode([token]) for token in allowed(word)}
    assert begins <= {'"', '"y', '"ye', '"yes', '"yes"', '"n', '"no', '"no"'}
    for token in ids('"yes"'):
        assert not word.is_complete
        assert EOS not in allowed(word)
        word.accept(token)
    assert word.is_complete
    assert allowed(word) == {EOS}

    number = COMPILER.json_schema({"type": "integer"}).matcher()
    assert EOS not in allowed(number)
    number.accept(ids("7")[0])
    assert EOS in allowed(number)
    assert allowed(number) == allowed(number), "looking changes nothing"
    assert not number.is_complete


def test_an_end_of_sequence_waits_for_the_grammar() -> None:
    eager = Sampling(
        grammar=COMPILER.json_schema({"type": "integer"}), temperature=0, max_tokens=9, logit_bias={EOS: 100.0}
    )
    (one,) = run(engine(), [Request("a", PROMPT, eager)])
    assert (one.reason, one.stop_reason, one.tokens[-1]) == ("stop", None, EOS)
    assert len(one.tokens) >= 2
    assert isinstance(json.loads(one.text), int)
    assert one.usage.completion == len(one.tokens)


def test_neither_padding_nor_special_tokens_are_text() -> None:
    bias = dict.fromkeys([*range(KNOWN, VOCAB), *(i for i in TOKENIZER.all_special_ids if i != EOS)], 100.0)
    (one,) = run(
        engine(), [Request("a", PROMPT, Sampling(grammar=COMPILER.json_schema(SCHEMA), max_tokens=99, logit_bias=bias))]
    )
    assert_fulfils(one.text)
    assert not bias.keys() & set(one.tokens)


def test_a_tokenizer_may_know_more_tokens_than_there_are_logits() -> None:
    narrow = Plant(tiny("llama", vocab=KNOWN - 5), TOKENIZER)
    form = GrammarCompiler(narrow).json_schema(SCHEMA)
    assert form.matcher().mask().shape == (math.ceil(narrow.vocab / 8),)
    text = form.matcher()
    for token in ids('{"mood": "sad", "count": 5, "tags": ["'):
        text.accept(token)
    assert max(allowed(text)) < narrow.vocab
    (one,) = run(engine(narrow), [Request("a", PROMPT, Sampling(grammar=form, max_tokens=99, seed=1))])
    assert_fulfils(one.text)


def test_a_minimum_length_yields_to_the_grammar_and_to_nothing_else() -> None:
    short = Sampling(grammar=COMPILER.json_schema({"enum": ["yes", "no"]}), max_tokens=40, min_tokens=30)
    number = Sampling(
        grammar=COMPILER.json_schema({"type": "integer"}), max_tokens=9, min_tokens=5, logit_bias={EOS: 100.0}
    )
    quote = Sampling(
        grammar=COMPILER.json_schema({"const": "a"}),
        max_tokens=9,
        min_tokens=5,
        stop_token_ids=tuple(t for t in range(KNOWN) if TOKENIZER.decode([t]).startswith('"')),
    )
    done = run(engine(), [Request(str(i), PROMPT, s) for i, s in enumerate((short, number, quote))])
    assert done[0].text in ('"yes"', '"no"')
    assert done[0].reason == "stop"
    assert len(done[1].tokens) == 6
    assert done[1].tokens[-1] == EOS
    assert done[2].stop_reason in quote.stop_token_ids


def test_a_text_cut_short_says_so_and_stop_strings_still_stop() -> None:
    form = COMPILER.json_schema(SCHEMA)
    cut, stopped = run(
        engine(),
        [
            Request("a", PROMPT, Sampling(grammar=form, max_tokens=6, temperature=0)),
            Request("b", PROMPT, Sampling(grammar=form, max_tokens=99, stop=('"count"',))),
        ],
    )
    assert (cut.reason, len(cut.tokens)) == ("length", 6)
    assert cut.text.startswith("{")
    assert (stopped.reason, stopped.stop_reason) == ("stop", '"count"')
    assert '"mood"' in stopped.text


def test_blanks_between_tokens_are_bounded() -> None:
    blank = dict.fromkeys(BLANKS, 100.0)
    sampling = Sampling(
        grammar=COMPILER.json_schema({"type": "array", "items": {"enum": [1]}, "maxItems": 1}),
        max_tokens=110,
        temperature=0,
        logit_bias=blank,
    )
    (one,) = run(engine(), [Request("a", PROMPT, sampling)])
    assert one.reason == "stop"
    assert json.loads(one.text) in ([], [1])


def good_and(bad: Sampling) -> tuple[Finished, Finished]:
    """A request with `bad` and a neighbour of it, which must not notice."""
    free = Sampling(max_tokens=8, temperature=0, ignore_eos=True)
    failed, fine = run(engine(), [Request("bad", PROMPT, bad), Request("good", (1, 9, 8), free)])
    assert list(fine.tokens) == naive.generate(PLANT.model, (1, 9, 8), 8)
    return failed, fine


def test_a_grammar_that_outgrows_its_share_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "MAX_LEXER_STATES", 60)
    hungry = GrammarCompiler(PLANT).json_schema({"type": "string", "pattern": ".*[ab].{40}x"})
    failed, _ = good_and(Sampling(grammar=hungry, max_tokens=100, seed=3))
    assert failed.reason == "error"
    assert isinstance(failed.error, SpecError)
    assert failed.error.param == "schema"
    assert "too many states" in str(failed.error)
    assert len(failed.tokens) >= 1


@pytest.mark.parametrize("broken", ["matcher", "mask", "accept", "is_complete"])
def test_whatever_a_matcher_raises_ends_its_request_alone(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("broken")

    if broken == "matcher":
        monkeypatch.setattr(Grammar, "matcher", fails)
    else:
        monkeypatch.setattr(Matcher, broken, property(fails) if broken == "is_complete" else fails)
    failed, _ = good_and(Sampling(grammar=COMPILER.json_object()))
    assert failed.reason == "error"
    assert "RuntimeError" in str(failed.error)


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"type": "object", "not": {}}, "not"),
        ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "oneOf"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "objekt"}, "objekt"),
        ({"type": "string", "pattern": "(("}, "unclosed group"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"$ref": "http://127.0.0.1/other.json"}, "other.json"),
        ({"const": "\ud800"}, "escape"),
        ({"const": math.nan}, "not JSON compliant"),
        ({"const": b"bytes"}, "bytes"),
        ({"x-guidance": 5, "uniqueItems": True}, "x-guidance|uniqueItems"),
        ({"enum": ["x" * MAX_SCHEMA_BYTES]}, str(MAX_SCHEMA_BYTES)),
        ({"allOf": [{"anyOf": [{"properties": {f"k{i}{j}": {}}} for j in range(3)]} for i in range(12)]}, "large"),
        ({"type": "integer", "multipleOf": 99_401_119}, "common multiple"),
        ({"allOf": [{"type": "integer", "multipleOf": p} for p in (9973, 9967)]}, "common multiple"),
        ({"properties": {"enum": {"items": [{"multipleOf": 1e-300}]}}}, "common multiple"),
        ([1], "object"),
        (True, "object"),
    ],
)
def test_what_cannot_be_enforced_is_refused_and_named(schema: Any, told: str) -> None:
    with pytest.raises(SpecError, match=told) as error:
        COMPILER.json_schema(schema)
    assert error.value.param == "schema"
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 320


@pytest.mark.parametrize(
    ("values", "multiple"),
    [
        ([], 1),
        ([7], 7),
        ([0.01, 100], 1),
        ([0.25, 4], 4),
        ([4, 0.25], 4),
        ([6, 4], 12),
        ([1e15], 1),
        ([True, 0], 1),
        ([2.5, 1.5], 75),
    ],
)
def test_the_common_multiple_leaves_powers_of_ten_out(values: list[float], multiple: int) -> None:
    assert common_multiple({"anyOf": [{"multipleOf": value} for value in values]}) == multiple


def test_a_multiple_is_kept() -> None:
    form = COMPILER.json_schema({"type": "integer", "minimum": 1, "maximum": 999, "multipleOf": 7})
    done = run(engine(), [Request(str(i), PROMPT, Sampling(grammar=form, seed=i)) for i in range(4)])
    assert all(int(one.text) % 7 == 0 for one in done)


def test_a_bottomless_schema_is_refused() -> None:
    deep: dict[str, Any] = {"type": "integer"}
    for _ in range(200):
        deep = {"type": "object", "properties": {"a": deep}}
    with pytest.raises(SpecError, match="recursion"):
        COMPILER.json_schema(deep)
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(SpecError, match="recursion"):
        COMPILER.json_schema(deep)
    while deep:  # torn down from the outside: the interpreter would recurse
        deep = deep.pop("a", {})


def test_a_model_whose_tokens_have_no_bytes_or_no_end_is_refused() -> None:
    with pytest.raises(PlantError, match="decoder"):
        GrammarCompiler(Plant(tiny("llama"), tiny_tokenizer())).json_object()
    with pytest.raises(PlantError, match="tokenizer"):
        GrammarCompiler(Plant(tiny("llama"))).json_object()
    endless = tiny("llama", vocab=VOCAB)
    endless.config.eos_token_id = None
    endless.generation_config.eos_token_id = None
    with pytest.raises(PlantError, match="end-of-sequence"):
        GrammarCompiler(Plant(endless, TOKENIZER)).json_object()


def test_grammars_are_kept_and_equal_by_their_source() -> None:
    one, same = COMPILER.json_schema({"type": "object"}), COMPILER.json_object()
    assert one is same
    again = GrammarCompiler(PLANT).json_object()
    assert again is not one
    assert again == one
    assert hash(again) == hash(one)
    assert one != COMPILER.json_schema({"type": "array"})
    first, second = one.matcher(), one.matcher()
    first.accept(ids("{")[0])
    assert allowed(first) != allowed(second) == allowed(one.matcher())


def test_ignoring_the_end_and_a_grammar_exclude_each_other() -> None:
    with pytest.raises(SpecError, match="ignore_eos"):
        Sampling(grammar=COMPILER.json_object(), ignore_eos=True)


def test_a_grammar_made_on_one_thread_serves_requests_on_another() -> None:
    own = engine()
    own.start()
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(GrammarCompiler(PLANT).json_schema, [SCHEMA] * 4))
    assert len(set(made)) == 1
    samplings = [Sampling(grammar=form, max_tokens=110, seed=i, logit_bias=TIDY) for i, form in enumerate(made)]
    done = own.generate([Request(str(i), PROMPT, sampling) for i, sampling in enumerate(samplings)])
    own.stop()
    for one in done:
        assert_fulfils(one.text)
    assert len({one.text for one in done}) > 1
