"""Every kind of bad input: status, field and sentence. None is ignored, none is served unsteered."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from server.schema.openai import ChatRequest, CompletionRequest, DetokenizeRequest
from tests.server.wire import CHAT, error

CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"
LQR: dict[str, Any] = {"type": "lqr", "concept": "happy", "setpoint": 1.0}
I0 = "steering.interventions[0]"


def one(**fields: Any) -> dict[str, Any]:
    return {"interventions": [{**LQR, **fields}]}


STEERING: list[tuple[Any, str, str]] = [
    ([], "steering", "an object"),
    ({"target": {}}, "steering.target", "targets, interventions"),
    ({"targets": [1]}, "steering.targets", "an object"),
    ({"targets": {"happy": "1"}}, "steering.targets.happy", "number"),
    ({"targets": {"happy": True}}, "steering.targets.happy", "number"),
    ({"targets": {"happy": {}}}, "steering.targets.happy.setpoint", "required"),
    (
        {"targets": {"happy": {"setpoint": 1, "gain": 2}}},
        "steering.targets.happy.gain",
        "unknown field; expected one of",
    ),
    ({"targets": {"happy": {"setpoint": 1, "layers": [3]}}}, "steering.targets.happy.layers", "0..2"),
    ({"targets": {"nobody": 1}}, "steering.targets.nobody", "happy"),
    ({"targets": {"../happy": 1}}, "steering.targets.../happy", "a concept of this model"),
    ({"targets": {"foreign": 1}}, "steering.targets.foreign", "was fitted on model"),
    ({"targets": {"broken": 1}}, "steering.targets.broken", "does not match its hash"),
    ({"targets": {f"c{i}": 1 for i in range(17)}}, "steering.targets", "at most 16"),
    ({"targets": {"happy": 1}, "interventions": [LQR] * 16}, "steering", "at most 16"),
    ({"targets": {"happy": 1e39}}, "steering.targets.happy", "finite"),
    ({"interventions": [4]}, I0, "an object"),
    ({"interventions": [{**LQR, "type": "lqrr"}]}, f"{I0}.type", ", lqr, "),
    ({"interventions": [{"concept": "happy"}]}, f"{I0}.type", ", lqr, "),
    (
        {"interventions": [{"type": "skip_layers", "attn_layers": [1]}], "guard": {"max_effort": 0.5}},
        "steering.guard.max_effort",
        "whole or not at all",
    ),
    ({"interventions": [{"type": "heads", "plan": "x", "heads": "all"}]}, f"{I0}.heads", ""),
    ({"interventions": [{"type": "sparsity", "plan": "x", "sparsity": 1.5}]}, f"{I0}.sparsity", "[0.001, 1]"),
    ({"interventions": [{"type": "channels", "plan": "x", "channels": "all"}]}, f"{I0}.channels", ""),
    ({"interventions": [LQR, {"type": "lqr", "setpoint": 1}]}, "steering.interventions[1].concept", "required"),
    ({"interventions": [{"type": "add", "inline": {}}]}, f"{I0}.inline", "at least one vector"),
    (one(setpoint="1"), f"{I0}.setpoint", "number"),
    (one(setpoint=None), f"{I0}.setpoint", "number"),
    (one(concept="nobody"), f"{I0}.concept", "happy"),
    (one(concept=5), f"{I0}.concept", "string"),
    (one(layers=[7]), f"{I0}.layers", "0..2"),
    (one(layers=[0]), f"{I0}.layers", "controls"),
    (one(layers=[]), f"{I0}.layers", "at least one layer"),
    (one(layers=[1.5]), f"{I0}.layers[0]", "integer"),
    (one(units="feet"), f"{I0}.units", "'centred', 'contrast' or 'absolute'"),
    (one(gains="matrix_free"), f"{I0}.gains", "dense"),
    (one(max_effort=-1), f"{I0}.max_effort", "finite number"),
    (one(when={"concept": "happy"}), f"{I0}.when.layer", "required"),
    (one(apply={"prompt": "lst"}), f"{I0}.apply.prompt", "'none', 'last' or 'all'"),
    (one(apply={"prompt": {"positions": []}}), f"{I0}.apply.prompt.positions", "1 to 4096"),
    (one(apply={"prompt": {"window": [1]}}), f"{I0}.apply.prompt.window[1]", "required"),
    (one(apply={"prompt": {"window": [1, "a"]}}), f"{I0}.apply.prompt.window[1]", "integer"),
    (one(apply={"generation": {"window": [3, 1]}}), f"{I0}.apply.generation.window", "a <= b"),
    (one(apply={"decode": "all"}), f"{I0}.apply.decode", "prompt, generation"),
    (one(apply={"prompt": {"positions": [900, -900]}}), f"{I0}.apply.prompt.positions", "of the prompt's"),
    (
        one(apply={"prompt": {"window": [900, 901]}, "generation": "none"}),
        f"{I0}.apply.prompt.window",
        "of the prompt's",
    ),
    (one(apply={"prompt": "none", "generation": {"window": [2, 2]}}), f"{I0}.apply.generation.window", "steps"),
    (
        {"targets": {"happy": {"setpoint": 1, "apply": {"prompt": {"positions": [900]}}}}},
        "steering.targets.happy.apply.prompt.positions",
        "of the prompt's",
    ),
    (one(apply={"prompt": {"positions": ["a"] * 5000}}), f"{I0}.apply.prompt.positions", "at most 4096"),
    ({"interventions": [{"type": "ablate", "concept": "happy", "strength": 2}]}, f"{I0}.strength", "[0, 1]"),
    ({"guard": {"max_effort": -1}}, "steering.guard.max_effort", "number"),
    ({"guard": {"max_effort": "1"}}, "steering.guard.max_effort", "number"),
    ({"guard": {"max": 1}}, "steering.guard.max", "max_effort, max_kl"),
    ({"guard": {"on_nonfinite": "ignore"}}, "steering.guard.on_nonfinite", "'abort'"),
    ({"trace": "all"}, "steering.trace", "'none' or 'tokens'"),
    ({"default": "none"}, "steering.default", "'compose' or 'replace'"),
    ({"preset": "support-agent"}, "steering.preset", "a preset of this server"),
]


@pytest.mark.parametrize(("steering", "param", "part"), STEERING, ids=lambda value: str(value)[:60])
def test_bad_steering_names_the_field(client: httpx.Client, steering: Any, param: str, part: str) -> None:
    status = 409 if any(name in param for name in ("foreign", "broken")) else 400
    found = error(client.post(CHAT_PATH, json={"messages": CHAT, "max_tokens": 1, "steering": steering}), status)
    assert found["param"] == param
    assert part in found["message"]
    assert "\n" not in found["message"]


@pytest.mark.parametrize(
    ("number", "param", "template"),
    [
        (number, param, template)
        for number in ("NaN", "Infinity", "-Infinity", "1e400")
        for param, template in (
            ("steering.targets.happy", '{"targets": {"happy": @}}'),
            (f"{I0}.setpoint", '{"interventions": [{"type": "lqr", "concept": "happy", "setpoint": @}]}'),
            ("steering.guard.max_effort", '{"guard": {"max_effort": @}}'),
        )
    ],
)
def test_numbers_that_json_does_not_have(client: httpx.Client, number: str, param: str, template: str) -> None:
    body = json.dumps({"messages": CHAT, "steering": "?"}).replace('"?"', template.replace("@", number))
    found = error(client.post(CHAT_PATH, content=body, headers={"Content-Type": "application/json"}), 400)
    assert found["param"] == param
    assert "finite number" in found["message"]


def test_a_number_that_json_does_not_have_is_found_in_any_field(client: httpx.Client) -> None:
    body = '{"prompt": "a", "made_up": [0, {"deep": NaN}]}'
    found = error(client.post(TEXT_PATH, content=body, headers={"Content-Type": "application/json"}), 400)
    assert found["param"] == "made_up[1].deep"


FIELDS: list[tuple[str, dict[str, Any], str]] = [
    (CHAT_PATH, {"messages": []}, "messages"),
    (CHAT_PATH, {"messages": None}, "messages"),
    (CHAT_PATH, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    (CHAT_PATH, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT_PATH, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    (CHAT_PATH, {"messages": CHAT, "top_logprobs": 21}, "top_logprobs"),
    (CHAT_PATH, {"messages": CHAT, "top_logprobs": 2}, "top_logprobs"),
    (CHAT_PATH, {"messages": CHAT, "max_completion_tokens": 0}, "max_completion_tokens"),
    (CHAT_PATH, {"messages": CHAT, "logit_bias": {"the": 1}}, "logit_bias"),
    (CHAT_PATH, {"messages": CHAT, "logit_bias": {"900": 1}}, "logit_bias"),
    (CHAT_PATH, {"messages": CHAT, "logit_bias": {"9": 101}}, "logit_bias"),
    (TEXT_PATH, {}, "prompt"),
    (TEXT_PATH, {"prompt": []}, "prompt"),
    (TEXT_PATH, {"prompt": [64]}, "prompt"),
    (TEXT_PATH, {"prompt": [[3], [-1]]}, "prompt[1]"),
    (TEXT_PATH, {"prompt": ["a", 3]}, "prompt[1]"),
    (TEXT_PATH, {"prompt": [[3], "a"]}, "prompt[1]"),
    (TEXT_PATH, {"prompt": [1.5] * 20_000}, "prompt[0]"),
    (TEXT_PATH, {"prompt": {}}, "prompt"),
    (TEXT_PATH, {"prompt": "a", "temperature": -0.1}, "temperature"),
    (TEXT_PATH, {"prompt": "a", "temperature": "hot"}, "temperature"),
    (TEXT_PATH, {"prompt": "a", "top_p": 0}, "top_p"),
    (TEXT_PATH, {"prompt": "a", "min_p": 2}, "min_p"),
    (TEXT_PATH, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    (TEXT_PATH, {"prompt": "a", "max_tokens": True}, "max_tokens"),
    (TEXT_PATH, {"prompt": "a", "min_tokens": 17}, "min_tokens"),
    (TEXT_PATH, {"prompt": "a", "n": 17}, "n"),
    (TEXT_PATH, {"prompt": ["a"] * 20, "n": 16}, "n"),
    (TEXT_PATH, {"prompt": "a", "seed": 2**63}, "seed"),
    (TEXT_PATH, {"prompt": "a", "stop": ["a"] * 5}, "stop"),
    (TEXT_PATH, {"prompt": "a", "stop": [""]}, "stop"),
    (TEXT_PATH, {"prompt": "a", "stop_token_ids": [64]}, "stop_token_ids"),
    (TEXT_PATH, {"prompt": "a", "logprobs": 21}, "logprobs"),
    (TEXT_PATH, {"prompt": "a", "presence_penalty": 3}, "presence_penalty"),
    (TEXT_PATH, {"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
    (TEXT_PATH, {"prompt": "a", "stream": "yes"}, "stream"),
    (TEXT_PATH, {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
    *((TEXT_PATH, {"prompt": "a", **extra}, next(iter(extra))) for extra in (
        {"best_of": 2}, {"best_of": 1}, {"suffix": "x"}, {"suffix": ""}, {"echo": "yes"},
        {"prompt_logprobs": 21}, {"prompt_logprobs": False}, {"use_beam_search": True},
        {"guided_regex": "a"}, {"return_token_ids": 1}, {"truncate_prompt_tokens": 5},
        {"continue_final_message": True}, {"add_generation_prompt": False},
    )),
    *((CHAT_PATH, {"messages": CHAT, **extra}, next(iter(extra))) for extra in (
        {"tools": [{"type": "function"}]}, {"tools": []}, {"add_generation_prompt": 1},
        {"tool_choice": "required"}, {"response_format": {"type": "json_object"}}, {"response_format": "json"},
        {"functions": [{}]}, {"continue_final_message": True}, {"modalities": ["audio"]}, {"echo": True},
    )),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "param"), FIELDS, ids=lambda value: str(value)[:60])
def test_bad_field_is_a_400_that_names_it(client: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    found = error(client.post(path, json=body), 400)
    assert found["param"] == param
    assert found["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "extra",
    [
        {"tools": None},
        {"add_generation_prompt": True},
        {"preset": None},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"store": True},
        {"made_up": [1]},
    ],
    ids=str,
)
def test_what_changes_nothing_is_tolerated(client: httpx.Client, extra: dict[str, Any]) -> None:
    assert client.post(CHAT_PATH, json={"messages": CHAT, "max_tokens": 1, **extra}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_too_long_names_both_lengths(client: httpx.Client, stream: bool) -> None:
    found = error(client.post(TEXT_PATH, json={"prompt": [5] * 5000, "max_tokens": 4, "stream": stream}), 400)
    assert found["param"] == "prompt"
    assert "5000" in found["message"]
    assert "4096" in found["message"]
    found = error(client.post(TEXT_PATH, json={"prompt": [5] * 100, "max_tokens": 4000, "stream": stream}), 400)
    assert found["param"] == "max_tokens"
    long = [{"role": "user", "content": "the " * 5000}]
    assert error(client.post(CHAT_PATH, json={"messages": long, "stream": stream}), 400)["param"] == "messages"


def test_unknown_model(client: httpx.Client) -> None:
    for path, body in (
        (CHAT_PATH, {"messages": CHAT}),
        (TEXT_PATH, {"prompt": "a"}),
        ("/v1/generate", {"prompt": "a"}),
    ):
        found = error(client.post(path, json={**body, "model": "tiny:support-agent"}), 404)
        assert (found["param"], found["code"]) == ("model", "model_not_found")
    assert error(client.get("/v1/models/other"), 404)["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"\xff", "application/json", 400),
        (b"[" * 50_000, "application/json", 400),
        (b'{"prompt": "\\ud800"}', "application/json", 400),
        (b'{"prompt": "a"}', "text/plain", 415),
        (b'{"prompt": "a"}', "application/x-www-form-urlencoded", 415),
        (b'{"prompt": "' + b"a" * 100_000 + b'"}', "application/json", 413),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_bodies(client: httpx.Client, content: bytes, kind: str, status: int) -> None:
    error(client.post(TEXT_PATH, content=content, headers={"Content-Type": kind}), status)


def test_chunked_body_is_bounded_too(client: httpx.Client) -> None:
    pieces = (b"a" * 10_000 for _ in range(20))
    error(client.post(TEXT_PATH, content=pieces, headers={"Content-Type": "application/json"}), 413)


def test_unknown_address_and_method(client: httpx.Client) -> None:
    assert error(client.get("/v1/nothing"), 404)["code"] == "not_found"
    response = client.put("/v1/completions", json={})
    assert error(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


def test_input_is_not_echoed_without_bound(client: httpx.Client) -> None:
    name = "x" * 20_000
    for body in (
        {"messages": CHAT, "steering": {"targets": {name: 1}}},
        {"messages": CHAT, "steering": {name: 1}},
        {"messages": CHAT, "steering": {"interventions": [{**LQR, "concept": name}]}},
        {"messages": CHAT, "steering": {"interventions": [{**LQR, "type": name}]}},
        {"messages": CHAT, "temperature": name},
        {"messages": CHAT, "max_tokens": 10**4000},
        {"messages": CHAT, "max_completion_tokens": 10**4000},
    ):
        assert len(client.post(CHAT_PATH, json=body).text) < 1000
    assert len(client.post(CHAT_PATH, json={"messages": CHAT, "model": name}).text) < 1000


def test_divergence_ends_its_request_alone(client: httpx.Client) -> None:
    """A setpoint of 1e30 is a 400 or, streaming, an error frame; a neighbour in the batch answers as it does alone."""
    import concurrent.futures

    wild = {"messages": CHAT, "max_tokens": 12, "seed": 5, "ignore_eos": True, "steering": {"targets": {"happy": 1e30}}}
    calm = {"messages": CHAT, "max_tokens": 12, "seed": 5, "ignore_eos": True}
    alone = client.post(CHAT_PATH, json=calm).json()["choices"]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        neighbour = pool.submit(client.post, CHAT_PATH, json=calm)
        first = pool.submit(client.post, CHAT_PATH, json=wild)
        second = pool.submit(client.post, CHAT_PATH, json={**wild, "stream": True})
    assert neighbour.result().json()["choices"] == alone
    found = error(first.result(), 400)
    assert (found["param"], found["code"]) == ("steering", "nonfinite")
    frames = second.result().text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    assert json.loads(frames[-3].removeprefix("data: "))["error"]["code"] == "nonfinite"
    assert client.post(CHAT_PATH, json=calm).json()["choices"] == alone


@pytest.mark.parametrize("key", ["targets", "interventions", "guard", "preset", "default", "trace"])
def test_steering_beside_its_object_is_refused(client: httpx.Client, key: str) -> None:
    value = {"targets": {"happy": 1}, "interventions": [LQR], "guard": {"max_effort": 1}}.get(key, "tokens")
    calls = [(CHAT_PATH, {"messages": CHAT}), (TEXT_PATH, {"prompt": "a"}), ("/v1/generate", {"prompt": "a"})]
    for path, body in calls[: 2 if key == "targets" else 3]:
        found = error(client.post(path, json={**body, key: value}), 400)
        assert found["param"] == key
        assert "put it into `steering`" in found["message"]


def test_positions_of_which_one_is_inside_and_none_at_all_are_legal(client: httpx.Client) -> None:
    for scope in ({"prompt": {"positions": [1, 900]}}, {"prompt": "none", "generation": "none"}):
        body = {"messages": CHAT, "max_tokens": 1, "steering": one(apply=scope)}
        assert client.post(CHAT_PATH, json=body).status_code == 200


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": "\\ud800"}',
        b'{"\\ud800": NaN}',
        '{"prompt": "a"}'.encode("utf-16"),
        b'\xef\xbb\xbf{"prompt": "a"}',
        b'{"prompt": "a"} x',
    ],
    ids=str,
)
def test_what_is_no_json_is_told(client: httpx.Client, content: bytes) -> None:
    found = error(client.post(TEXT_PATH, content=content, headers={"Content-Type": "application/json"}), 400)
    assert found["code"] == "invalid_json"
    assert found["message"].startswith("The body ")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ('{"prompt": "a", "prompt": "b"}', "prompt"),
        (
            '{"prompt": "a", "max_tokens": 1, "steering": {"targets": {"happy": 1, "happy": 2}}}',
            "steering.targets.happy",
        ),
        ('{"prompt": "a", "made_up": [0, {"x": {}, "x": 1}]}', "made_up[1].x"),
        ('{"prompt": "a", "temperature": NaN, "temperature": 1}', "temperature"),
        ('{"prompt": "a", "steering": {"a": {"b": 1, "b": 1}}, "steering": {}}', "steering"),
        ('{"prompt": "a", "seed": 1, "s\\u0065ed": 1}', "seed"),
    ],
)
def test_a_key_that_stands_twice_is_refused(client: httpx.Client, body: str, param: str) -> None:
    found = error(client.post(TEXT_PATH, content=body, headers={"Content-Type": "application/json"}), 400)
    assert (found["param"], found["code"]) == (param, "invalid_value")
    assert "twice" in found["message"]


@pytest.mark.parametrize(
    ("body", "end"),
    [
        ({"prompt": None}, "got null."),
        ({"prompt": "a", "max_tokens": True}, "got true."),
        ({"prompt": "a", "temperature": [None, False]}, "got [null, false]."),
        ({"prompt": "a", "temperature": {"é": 1}}, 'got {"é": 1}.'),
        ({"prompt": "a", "temperature": "hot"}, "got 'hot'."),
        ({"prompt": "a", "temperature": [0] * 100}, "0, …."),
    ],
    ids=str,
)
def test_messages_speak_json(client: httpx.Client, body: dict[str, Any], end: str) -> None:
    assert error(client.post(TEXT_PATH, json=body), 400)["message"].endswith(end)


@pytest.mark.parametrize(
    "body",
    [{"prompt": [64]}, {"prompt": "a", "stop_token_ids": [64]}, {"prompt": "a", "logit_bias": {"64": 1}}],
    ids=str,
)
def test_a_token_that_is_not_there_is_an_invalid_value(client: httpx.Client, body: dict[str, Any]) -> None:
    found = error(client.post(TEXT_PATH, json=body), 400)
    assert found["code"] == "invalid_value"
    assert "from 0 to 63, got 64" in found["message"]


def test_nothing_to_generate_needs_a_reason(client: httpx.Client) -> None:
    read = {"prompt": "the cat", "max_tokens": 0}
    found = error(client.post(TEXT_PATH, json=read), 400)
    assert found["message"] == "max_tokens: expected at least 1, or 0 together with echo or prompt_logprobs, got 0."
    assert client.post(TEXT_PATH, json={**read, "echo": True}).json()["choices"][0]["text"] == "the cat"
    assert client.post(TEXT_PATH, json={**read, "prompt_logprobs": 0}).json()["choices"][0]["text"] == ""
    full = {"prompt": [5] * 4096, "max_tokens": 0, "echo": True}
    assert client.post(TEXT_PATH, json=full).json()["usage"]["prompt_tokens"] == 4096
    assert error(client.post(TEXT_PATH, json={**full, "prompt": [5] * 4097}), 400)["param"] == "prompt"


def test_a_pair_of_surrogates_is_a_character(client: httpx.Client) -> None:
    body = b'{"prompt": "\\ud83d\\ude00", "max_tokens": 1}'
    response = client.post(TEXT_PATH, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (CompletionRequest, {"prompt": [1.5] * 1000}),
        (CompletionRequest, {"prompt": ["a", *[1] * 1000]}),
        (CompletionRequest, {"prompt": [["a"] * 1000] * 3}),
        (CompletionRequest, {"prompt": "a", "stop": [1] * 1000}),
        (ChatRequest, {"messages": [1] * 1000}),
        (DetokenizeRequest, {"tokens": [1.5] * 1000}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_long_list_is_refused_at_its_first_bad_item(model: type[BaseModel], body: dict[str, Any]) -> None:
    """An error for every item of a megabyte would take seconds to build. Both branches of `stop` report once."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate_json(json.dumps(body), strict=True)
    assert caught.value.error_count() <= 2


def test_too_long_names_the_field_that_was_sent(client: httpx.Client) -> None:
    long = [{"role": "user", "content": "the " * 5000}]
    cases: list[tuple[str, dict[str, Any], str]] = [
        (CHAT_PATH, {"messages": CHAT, "max_completion_tokens": 4096}, "max_completion_tokens"),
        (CHAT_PATH, {"messages": CHAT, "max_tokens": 4096}, "max_tokens"),
        (CHAT_PATH, {"messages": long}, "messages"),
        (TEXT_PATH, {"prompt": [[5], [5] * 5000]}, "prompt[1]"),
        ("/v1/generate", {"messages": long}, "messages"),
        ("/v1/steering/trace", {"messages": long, "concepts": ["happy"]}, "messages"),
        ("/v1/steering/trace", {"prompt": [5] * 5000, "concepts": ["happy"]}, "prompt"),
    ]
    for path, body, param in cases:
        found = error(client.post(path, json=body), 400)
        assert (found["param"], found["code"]) == (param, "context_length_exceeded")
        assert "4096" in found["message"]
        assert "prompt has" in found["message"]
