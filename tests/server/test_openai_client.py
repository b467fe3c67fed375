"""Every field of the OpenAI surface through OpenAI's own client; what it cannot send itself goes by `extra_body`."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch

from server.settings import ServerSettings
from steering import Plant, SpecError
from steering.demo import CONCEPTS, MODEL
from steering.runtime.grammar import Matcher
from tests.server.conftest import serving
from tests.server.wire import CHAT
from tests.tolerances import RUNTIME

GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "extra_body": {"ignore_eos": True}}
UNICODE = "El niño — 数学 🙂"
CITY = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "size": {"enum": ["small", "large"]}},
    "required": ["name", "size"],
    "additionalProperties": False,
}


def client_of(address: str) -> Any:
    """The client, untyped: it is sent, and reads, fields that are not in its own types."""
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def api(address: str) -> Any:
    return client_of(address)


@pytest.fixture(scope="module")
def demo_plant() -> Plant:
    return Plant.load(MODEL)


@pytest.fixture(scope="module")
def demo(demo_plant: Plant, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server of the embedded model: its vocabulary is of bytes, so it can write JSON and any character."""
    folder = tmp_path_factory.mktemp("demo")
    shutil.copy(CONCEPTS / "positive.safetensors", folder)
    with serving(demo_plant, folder, ServerSettings()) as address:
        yield client_of(address)


def text_of(api: Any, prompt: Any = "the cat", **fields: Any) -> str:
    return api.completions.create(prompt=prompt, **{**GREEDY, "max_tokens": 12, **fields}).choices[0].text


def extra(**fields: Any) -> dict[str, Any]:
    return {"extra_body": {"ignore_eos": True, **fields}}


def refusal(call: Any, **fields: Any) -> str | None:
    """The field that a 400 names."""
    with pytest.raises(openai.BadRequestError) as caught:
        call(**{**GREEDY, **fields})
    assert caught.value.type == "invalid_request_error"
    return caught.value.param


# ── models, prompts, messages ────────────────────────────────────────────────────────────────────────────────────────


def test_models(api: Any) -> None:
    assert [model.id for model in api.models.list()] == ["tiny"]
    found = api.models.retrieve("tiny")
    assert found.id == "tiny"
    assert found.massive == {"dims": [], "position_0": False, "tokens": []}
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError):
        api.chat.completions.create(model="gpt-4", messages=CHAT)


def test_every_form_of_a_prompt(api: Any) -> None:
    ids = [1, 8, 10]  # <s> the cat
    assert text_of(api, ids) == text_of(api) == text_of(api, ["the cat"]) == text_of(api, [ids])
    two = api.completions.create(prompt=[ids, [1, 9]], **GREEDY)
    assert [c.text for c in two.choices] == [text_of(api, ids, max_tokens=16), text_of(api, [1, 9], max_tokens=16)]


def test_content_parts(api: Any) -> None:
    parts = [{"type": "text", "text": "the cat"}, {"type": "text", "text": "sat on the mat"}]
    messages: Any = [{"role": "user", "content": parts}]
    found = [api.chat.completions.create(messages=m, max_tokens=6, **GREEDY) for m in (messages, CHAT)]
    assert found[0].choices[0].message.content == found[1].choices[0].message.content


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_lengths(api: Any, field: str) -> None:
    answer = api.chat.completions.create(messages=CHAT, **{**GREEDY, field: 3})
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")


# ── sampling ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_whatever_leaves_one_token_is_greedy(api: Any) -> None:
    greedy = text_of(api)
    assert text_of(api, temperature=2, top_p=1e-9) == greedy
    assert text_of(api, temperature=2, **extra(top_k=1)) == greedy
    assert text_of(api, temperature=2, **extra(min_p=1.0)) == greedy
    assert text_of(api, temperature=2, seed=1) != greedy


def test_a_seed_repeats_and_choices_differ(api: Any) -> None:
    drawn = [text_of(api, temperature=1.5, seed=seed) for seed in (-(2**63), -(2**63), 7)]
    assert drawn[0] == drawn[1] != drawn[2]
    many = api.completions.create(prompt="the cat", **{**GREEDY, "temperature": 1.5}, seed=7, n=3, max_tokens=12)
    assert [c.text for c in many.choices] == [text_of(api, temperature=1.5, seed=7 + i) for i in range(3)]


def test_stops(api: Any) -> None:
    whole = text_of(api)
    word = whole.split()[2]
    answer = api.completions.create(prompt="the cat", stop=["nowhere", word], max_tokens=12, **GREEDY)
    assert answer.choices[0].text == whole[: whole.index(word)]
    assert answer.choices[0].finish_reason == "stop"
    token = api.completions.create(prompt="the cat", max_tokens=12, **{**GREEDY, **extra(return_token_ids=True)})
    third = token.choices[0].token_ids[2]
    cut = api.completions.create(prompt="the cat", max_tokens=12, **{**GREEDY, **extra(stop_token_ids=[third])})
    assert cut.choices[0].stop_reason == third


def test_penalties_and_bias_move_the_answer(api: Any) -> None:
    def distinct(**fields: Any) -> int:
        return len(set(text_of(api, max_tokens=40, **fields).split()))

    plain = distinct()
    assert distinct(frequency_penalty=2) > plain
    assert distinct(presence_penalty=2) > plain
    assert distinct(**extra(repetition_penalty=5.0)) > plain
    assert set(text_of(api, logit_bias={"9": 100}).split()) == {"a"}


def test_minimum_length_and_the_end_of_sequence(api: Any) -> None:
    ends = {"prompt": "the cat", "model": "tiny", "temperature": 0, "max_tokens": 8, "logit_bias": {"2": 100}}

    def length(**fields: Any) -> int:
        usage = api.completions.create(**ends, extra_body=fields).usage
        assert usage is not None
        return usage.completion_tokens

    assert length() == 1
    assert length(min_tokens=5) == 6
    assert length(ignore_eos=True) == 8


# ── log-probabilities, echo, token ids ───────────────────────────────────────────────────────────────────────────────


def reference(plant: Plant, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities (T, V) after each token, from one plain forward pass."""
    with torch.no_grad():
        found: torch.Tensor = plant.model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
    return found


def test_logprobs_of_a_chat(api: Any) -> None:
    answer = api.chat.completions.create(messages=CHAT, logprobs=True, top_logprobs=3, max_tokens=4, **GREEDY)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [one.top_logprobs[0].token for one in logprobs.content] == [one.token for one in logprobs.content]
    assert all(len(one.top_logprobs) == 3 for one in logprobs.content)


def test_the_chosen_token_is_among_the_top_ones(api: Any) -> None:
    answer = api.completions.create(
        prompt="the cat", max_tokens=30, logprobs=1, **{**GREEDY, "temperature": 2, "seed": 1}
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert {len(top) for top in logprobs.top_logprobs or ()} == {1, 2}
    for token, logprob, top in zip(
        logprobs.tokens, logprobs.token_logprobs or (), logprobs.top_logprobs or (), strict=True
    ):
        assert top[token] == logprob <= max(top.values())


def test_echo(api: Any) -> None:
    assert text_of(api, echo=True) == f"the cat{text_of(api)}"
    assert text_of(api, echo=True, max_tokens=0) == "the cat"
    assert text_of(api, [1, 8, 10], echo=True, max_tokens=0) == "<s> the cat"
    many = api.completions.create(prompt=["the cat", "a dog"], n=2, echo=True, max_tokens=0, logprobs=0, **GREEDY)
    assert [c.text for c in many.choices] == ["the cat", "the cat", "a dog", "a dog"]
    assert [c.finish_reason for c in many.choices] == ["length"] * 4
    assert many.usage is not None
    assert (many.usage.prompt_tokens, many.usage.completion_tokens) == (6, 0)


def test_echo_scores_the_prompt_as_the_model_does(demo: Any, demo_plant: Plant) -> None:
    """The call of an evaluation harness: token ids, echoed with their log-probabilities, nothing generated."""
    ids = [demo_plant.encode(text) for text in ("the dog is happy.", UNICODE)]
    answer = demo.completions.create(
        model="tiny", prompt=ids, temperature=0, max_tokens=0, logprobs=2, echo=True, seed=1234
    )
    for choice, tokens in zip(answer.choices, ids, strict=True):
        expected = reference(demo_plant, tokens)
        logprobs = choice.logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        assert logprobs.top_logprobs is not None
        assert (logprobs.token_logprobs[0], logprobs.top_logprobs[0]) == (None, None)
        own = expected[range(len(tokens) - 1), tokens[1:]].tolist()
        assert logprobs.token_logprobs[1:] == pytest.approx(own, abs=RUNTIME["logprob"])
        best = [max(top.values()) for top in logprobs.top_logprobs[1:]]
        assert best == pytest.approx(expected[:-1].amax(-1).tolist(), abs=RUNTIME["logprob"])


def test_offsets_of_an_echo_are_those_of_its_characters(demo: Any) -> None:
    answer = demo.completions.create(model="tiny", prompt=UNICODE, max_tokens=6, logprobs=0, echo=True, seed=1)
    choice = answer.choices[0]
    assert choice.text.startswith(UNICODE)
    assert choice.logprobs is not None
    pairs = list(zip(choice.logprobs.tokens or (), choice.logprobs.text_offset or (), strict=True))
    assert pairs[0] == ("<|bos|>", 0)  # it was added: the text does not have it
    assert [offset for _, offset in pairs] == sorted(offset for _, offset in pairs)
    whole = [(token, offset) for token, offset in pairs[1:] if "\ufffd" not in token]
    assert len(whole) > 3
    assert all(choice.text[offset : offset + len(token)] == token for token, offset in whole)


@pytest.mark.parametrize(
    "fields",
    [
        {"echo": True},
        {"echo": True, "logprobs": 1},
        {"echo": True, "logprobs": 0, "max_tokens": 0},
        {"echo": True, "logprobs": 2, "n": 2, "prompt": ["the cat", "a dog"], "temperature": 1, "seed": 3},
        {"logprobs": 1, "stop": ["mat"]},
    ],
    ids=str,
)
def test_a_joined_stream_is_the_whole(api: Any, fields: dict[str, Any]) -> None:
    given = {"prompt": "the cat", "max_tokens": 10, **GREEDY, **extra(return_token_ids=True), **fields}
    whole = api.completions.create(**given)
    chunks = list(api.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        assert (mine[-1].finish_reason, mine[-1].text) == (choice.finish_reason, "")
        assert all(c.finish_reason is None for c in mine[:-1])
        assert [t for c in mine for t in c.token_ids] == choice.token_ids
        assert mine[0].prompt_token_ids == choice.prompt_token_ids
        assert all(not hasattr(c, "prompt_token_ids") for c in mine[1:])
        if choice.logprobs is not None:
            for name, values in choice.logprobs.to_dict().items():
                assert values == list(itertools.chain(*(getattr(c.logprobs, name) for c in mine if c.logprobs)))


def test_prompt_logprobs(api: Any, plant: Plant) -> None:
    for n_top in (0, 2):
        body = extra(prompt_logprobs=n_top, return_token_ids=True)
        answer = api.chat.completions.create(messages=CHAT, max_tokens=0, **{**GREEDY, **body})
        tokens = answer.prompt_token_ids
        found = answer.prompt_logprobs
        expected = reference(plant, tokens)
        assert found[0] is None
        assert len(found) == len(tokens)
        for at in range(1, len(tokens)):
            own = found[at].pop(str(tokens[at]))
            row = expected[at - 1]
            assert own["logprob"] == pytest.approx(float(row[tokens[at]]), abs=RUNTIME["logprob"])
            assert own["rank"] == 1 + int((row > row[tokens[at]]).sum())
            assert own["decoded_token"] == plant.tokenizer.decode([tokens[at]])
            likeliest = [str(t) for t in row.topk(n_top).indices.tolist()] if n_top else []
            assert list(found[at]) == [t for t in likeliest if t != str(tokens[at])]


def test_prompt_logprobs_of_completions_stand_on_the_choice(api: Any) -> None:
    body = {**GREEDY, **extra(prompt_logprobs=1)}
    answer = api.completions.create(prompt=["the cat", "a dog sat"], max_tokens=2, logprobs=0, echo=True, **body)
    for choice in answer.choices:
        found = choice.prompt_logprobs
        assert choice.logprobs is not None
        echoed = (choice.logprobs.token_logprobs or [])[1 : len(found)]
        assert [max(one.items(), key=lambda i: i[1]["logprob"])[1]["rank"] for one in found[1:]] == [1] * len(echoed)
        assert all(len(top) == 1 for top in (choice.logprobs.top_logprobs or [])[1:])  # logprobs asked for none
    plain = api.completions.create(prompt="the cat", max_tokens=2, echo=True, logprobs=0, **GREEDY)
    assert not hasattr(plain.choices[0], "prompt_logprobs")


def test_a_steered_prompt_is_scored_by_the_steered_model(api: Any) -> None:
    def scores(strength: float) -> list[float]:
        scope = {"prompt": "all", "generation": "none"}
        happy = {"setpoint": 4.0, "strength": strength, "apply": scope}
        body = {**GREEDY, **extra(steering={"targets": {"happy": happy}})}
        answer = api.completions.create(prompt="the cat sat on", max_tokens=0, echo=True, logprobs=0, **body)
        assert answer.choices[0].logprobs is not None
        return [value for value in answer.choices[0].logprobs.token_logprobs or () if value is not None]

    plain = api.completions.create(prompt="the cat sat on", max_tokens=0, echo=True, logprobs=0, **GREEDY)
    assert plain.choices[0].logprobs is not None
    assert scores(0.0) == (plain.choices[0].logprobs.token_logprobs or [])[1:]
    assert scores(1.0) != scores(0.0)


def test_token_ids_of_a_chat(api: Any, plant: Plant) -> None:
    given: dict[str, Any] = {"messages": CHAT, "max_tokens": 9, **GREEDY, **extra(return_token_ids=True)}
    whole = api.chat.completions.create(**given)
    assert whole.prompt_token_ids == plant.encode(CHAT)
    ids = whole.choices[0].token_ids
    text = plant.tokenizer.decode([*plant.encode(CHAT), *ids], skip_special_tokens=True)
    assert text == plant.tokenizer.decode(plant.encode(CHAT), skip_special_tokens=True) + (
        whole.choices[0].message.content or ""
    )
    chunks = list(api.chat.completions.create(**given, stream=True))
    assert chunks[0].prompt_token_ids == plant.encode(CHAT)
    assert all(not hasattr(chunk, "prompt_token_ids") for chunk in chunks[1:])
    assert [t for chunk in chunks for c in chunk.choices for t in c.token_ids] == ids


# ── the end of a chat ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_last_message_is_continued(demo: Any, demo_plant: Plant) -> None:
    messages: Any = [
        {"role": "user", "content": "Tell me about the dog."},
        {"role": "assistant", "content": "The dog "},
    ]
    body = {"return_token_ids": True, "continue_final_message": True}
    answer = demo.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=5, extra_body=body)
    ids = answer.prompt_token_ids
    assert demo_plant.tokenizer.decode(ids).endswith("<|assistant|>The dog ")
    whole = demo.completions.create(model="tiny", prompt=[ids], temperature=0, max_tokens=5)
    assert answer.choices[0].message.content == whole.choices[0].text


def test_the_generation_prompt_can_be_left_out(api: Any) -> None:
    def prompt(messages: Any, **fields: Any) -> list[int]:
        body = {**GREEDY, **extra(return_token_ids=True, **fields)}
        answer = api.chat.completions.create(messages=messages, max_tokens=1, **body)
        found: list[int] = answer.prompt_token_ids
        return found

    assert prompt(CHAT)[-1:] == [5]  # <assistant>
    assert prompt(CHAT, add_generation_prompt=True) == prompt(CHAT)
    assert prompt(CHAT, add_generation_prompt=False) == prompt(CHAT)[:-1]
    turn: Any = [*CHAT, {"role": "assistant", "content": "the dog"}]
    closed = prompt(turn, add_generation_prompt=False)
    assert closed[-1] == 7  # <end>
    assert prompt(turn, continue_final_message=True) == closed[:-1]
    assert prompt(turn, continue_final_message=True, add_generation_prompt=False) == closed[:-1]
    both = extra(continue_final_message=True, add_generation_prompt=True)
    assert refusal(api.chat.completions.create, messages=turn, **both) == "continue_final_message"
    assert (
        refusal(api.chat.completions.create, messages=CHAT, **extra(continue_final_message=True))
        == "continue_final_message"
    )


# ── formats ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_follows_its_schema(demo: Any, temperature: float) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    answer = demo.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Tell me about the dog."}],
        temperature=temperature,
        seed=2,
        n=2,
        max_tokens=64,
        response_format=schema,
    )
    for choice in answer.choices:
        city = json.loads(choice.message.content or "")
        assert set(city) == {"name", "size"}
        assert len(city["name"]) <= 8
        assert city["size"] in ("small", "large")
        assert choice.finish_reason == "stop"


def test_a_steered_answer_follows_its_schema(demo: Any) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    given: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Tell me about the dog."}],
        "max_tokens": 64,
        "seed": 4,
        "response_format": schema,
        "extra_body": {"steering": {"targets": {"positive": 2.0}}},
    }
    whole = demo.chat.completions.create(**given)
    assert set(json.loads(whole.choices[0].message.content or "")) == {"name", "size"}
    assert whole.steering["tokens_steered"] > 0
    stream = demo.chat.completions.create(**given, stream=True)
    joined = "".join(c.delta.content or "" for chunk in stream for c in chunk.choices)
    assert joined == whole.choices[0].message.content


def test_any_json_object(demo: Any) -> None:
    """What fits in the limit is an object; what does not is the beginning of one."""
    answer = demo.completions.create(
        model="tiny",
        prompt="the dog",
        max_tokens=80,
        temperature=0,
        extra_body={"response_format": {"type": "json_object"}},
    )
    choice = answer.choices[0]
    assert choice.text.startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.text), dict)
    else:
        assert choice.finish_reason == "length"


def test_text_is_no_restriction(api: Any) -> None:
    plain = api.chat.completions.create(messages=CHAT, max_tokens=5, **GREEDY)
    text = api.chat.completions.create(messages=CHAT, max_tokens=5, response_format={"type": "text"}, **GREEDY)
    assert text.choices == plain.choices


def test_formats_that_cannot_be(demo: Any) -> None:
    def refused(form: Any, **fields: Any) -> str | None:
        with pytest.raises(openai.BadRequestError) as caught:
            demo.chat.completions.create(model="tiny", messages=CHAT, response_format=form, **fields)
        return caught.value.param

    def schema(value: Any, name: str = "a") -> dict[str, Any]:
        return {"type": "json_schema", "json_schema": {"name": name, "schema": value}}

    assert refused({"type": "yaml"}) == "response_format.type"
    assert refused({"type": "json_schema"}) == "response_format.json_schema"
    assert refused({"type": "json_schema", "json_schema": {"name": "a"}}) == "response_format.json_schema.schema"
    assert refused({"type": "json_object", "schema": {}}) == "response_format.schema"
    assert refused({**schema(CITY), "type": "json_object"}) == "response_format.json_schema"
    assert refused(schema(CITY, "a b")) == "response_format.json_schema.name"
    assert refused(schema({"type": "strange"})) == "response_format.json_schema.schema"
    assert refused(schema({"type": "string", "description": "x" * 70_000})) == "response_format.json_schema.schema"
    assert refused(schema(CITY), extra_body={"ignore_eos": True}) == "ignore_eos"


def test_a_grammar_that_fails_while_it_runs_names_its_field(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Tell me about the dog."}],
        "max_tokens": 40,
        "response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}},
    }

    def fails(matcher: Matcher) -> None:
        raise SpecError("schema", expected="fewer states")

    with monkeypatch.context() as patched:
        patched.setattr(Matcher, "mask", fails)
        with pytest.raises(openai.BadRequestError) as caught:
            demo.chat.completions.create(**given)
        assert caught.value.param == "response_format.json_schema.schema"
        with pytest.raises(openai.APIError, match="fewer states"):
            list(demo.chat.completions.create(**given, stream=True))
    assert demo.chat.completions.create(**given).choices[0].message.content.startswith("{")


# ── streams and refusals ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_chat_streams_in_order(api: Any) -> None:
    given: dict[str, Any] = {"messages": CHAT, "max_tokens": 6, **GREEDY, **extra(steering={"targets": {"happy": 1.5}})}
    chunks = list(api.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    first, *texts, finish, receipt, usage = chunks
    assert first.choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None and chunk.choices[0].delta.content for chunk in texts)
    assert finish.choices[0].finish_reason == "length"
    assert finish.choices[0].delta.content is None
    assert receipt.choices == usage.choices == []
    assert receipt.steering["tokens_steered"] == 6
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 6


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"extra_body": {"prompt_logprobs": 21}}, "prompt_logprobs"),
        ({"extra_body": {"prompt_logprobs": 0}, "stream": True}, "prompt_logprobs"),
        ({"extra_body": {"continue_final_message": True}}, "continue_final_message"),
    ],
    ids=str,
)
def test_what_completions_refuse(api: Any, fields: dict[str, Any], param: str) -> None:
    assert refusal(api.completions.create, prompt="the cat", **fields) == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"extra_body": {"echo": True}}, "echo"),
        ({"extra_body": {"prompt_logprobs": True}}, "prompt_logprobs"),
    ],
    ids=str,
)
def test_what_chats_refuse(api: Any, fields: dict[str, Any], param: str) -> None:
    assert refusal(api.chat.completions.create, messages=CHAT, **fields) == param
