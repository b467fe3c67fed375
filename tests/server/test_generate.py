from __future__ import annotations

from typing import Any

import httpx

from tests.server.wire import CHAT, error, events

PATH = "/v1/generate"
BASE: dict[str, Any] = {"prompt": "the cat", "max_tokens": 10, "seed": 3, "ignore_eos": True}


def test_compare_gives_both(client: httpx.Client) -> None:
    both = client.post(PATH, json={**BASE, "targets": {"happy": 9.0}, "compare": True}).json()
    plain = client.post("/v1/completions", json=BASE).json()
    steered = client.post("/v1/completions", json={**BASE, "steering": {"targets": {"happy": 9.0}}}).json()
    assert both["unsteered"]["text"] == plain["choices"][0]["text"]
    assert both["text"] == steered["choices"][0]["text"]
    assert both["text"] != both["unsteered"]["text"]
    assert both["steering"]["tracking"]["happy"]["setpoint"] == 9.0
    assert both["usage"]["completion_tokens"] == both["unsteered"]["usage"]["completion_tokens"] == 10


def test_one_seed_is_drawn_for_both(client: httpx.Client) -> None:
    body = {"prompt": "the cat", "max_tokens": 24, "ignore_eos": True, "compare": True}
    answers = [client.post(PATH, json=body).json() for _ in range(2)]
    assert all(a["text"] == a["unsteered"]["text"] for a in answers)
    assert answers[0]["text"] != answers[1]["text"]


def test_targets_here_or_there_are_the_same(client: httpx.Client) -> None:
    short = client.post(PATH, json={**BASE, "targets": {"happy": 2.0}}).json()
    long = client.post(PATH, json={**BASE, "steering": {"targets": {"happy": 2.0}}}).json()
    assert short["steering"] == long["steering"]
    assert "unsteered" not in short
    joined = client.post(
        PATH, json={**BASE, "targets": {"happy": 2.0}, "steering": {"guard": {"max_effort": 0.0}}}
    ).json()
    assert joined["steering"]["effort"]["max"] == 0


def test_stream_names_its_streams(client: httpx.Client) -> None:
    body = {**BASE, "targets": {"happy": 9.0}, "compare": True}
    whole = client.post(PATH, json=body).json()
    chunks = events(client, PATH, body)
    text = {
        name: "".join(c.get("text", "") for c in chunks if c["stream"] == name) for name in ("steered", "unsteered")
    }
    assert text == {"steered": whole["text"], "unsteered": whole["unsteered"]["text"]}
    assert sum(c.get("finish_reason") is not None for c in chunks) == 2
    assert chunks[-1]["steering"] == whole["steering"]


def test_messages(client: httpx.Client) -> None:
    fields = {"messages": CHAT, "max_tokens": 10, "seed": 3, "ignore_eos": True}
    chat = client.post("/v1/chat/completions", json=fields).json()
    assert client.post(PATH, json=fields).json()["text"] == chat["choices"][0]["message"]["content"]


def test_what_else_can_be_asked_for(client: httpx.Client) -> None:
    body = {**BASE, "targets": {"happy": 9.0}, "compare": True, "return_token_ids": True}
    whole = client.post(PATH, json={**body, "prompt_logprobs": 1}).json()
    assert len(whole["prompt_logprobs"]) == len(whole["prompt_token_ids"]) == whole["usage"]["prompt_tokens"]
    assert whole["unsteered"]["prompt_logprobs"][:1] == [None]
    assert len(whole["token_ids"]) == len(whole["unsteered"]["token_ids"]) == 10
    chunks = events(client, PATH, body)
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert not any("prompt_token_ids" in chunk for chunk in chunks[1:])
    for name, own in (("steered", whole), ("unsteered", whole["unsteered"])):
        assert [t for c in chunks if c["stream"] == name for t in c.get("token_ids", [])] == own["token_ids"]
    read = client.post(PATH, json={**BASE, "max_tokens": 0, "prompt_logprobs": 0}).json()
    assert (read["text"], read["finish_reason"], read["usage"]["completion_tokens"]) == ("", "length", 0)


def test_the_last_message_is_continued(client: httpx.Client) -> None:
    messages = [*CHAT, {"role": "assistant", "content": "the dog"}]
    body = {"messages": messages, "continue_final_message": True}
    tokens = client.post("/tokenize", json={**body, "return_token_strs": True}).json()
    assert tokens["token_strs"][-3:] == ["<assistant>", "the", "dog"]
    fields = {"max_tokens": 4, "temperature": 0, "return_token_ids": True}
    assert client.post(PATH, json={**body, **fields}).json()["prompt_token_ids"] == tokens["tokens"]
    found = error(client.post(PATH, json={"prompt": "the cat", "continue_final_message": True}), 400)
    assert found["param"] == "continue_final_message"


def test_refusals(client: httpx.Client) -> None:
    assert error(client.post(PATH, json={}), 400)["param"] == "prompt"
    assert error(client.post(PATH, json={"prompt": "a", "messages": CHAT}), 400)["param"] == "prompt"
    assert error(client.post(PATH, json={"prompt": "a", "targets": {"nope": 1}}), 400)["param"] == "targets.nope"
    assert error(client.post(PATH, json={"prompt": "a", "targets": {"happy": "1"}}), 400)["param"] == "targets.happy"
    twice = {"prompt": "a", "targets": {"happy": 1}, "steering": {"targets": {"happy": 1}}}
    assert error(client.post(PATH, json=twice), 400)["param"] == "targets"
    assert error(client.post(PATH, json={"prompt": "a", "n": 2}), 400)["param"] == "n"


def test_stream_ends_with_the_usage_where_asked(client: httpx.Client) -> None:
    body = {**BASE, "targets": {"happy": 9.0}, "compare": True, "logprobs": 0}
    whole = client.post(PATH, json=body).json()
    chunks = events(client, PATH, {**body, "stream_options": {"include_usage": True}})
    assert chunks[-2]["steering"] == whole["steering"]
    assert chunks[-1]["usage"] == whole["usage"]
    assert chunks[-1]["unsteered"] == {"usage": whole["unsteered"]["usage"]}
    for name, own in (("steered", whole), ("unsteered", whole["unsteered"])):
        mine = [c["logprobs"]["text_offset"] for c in chunks if c["stream"] == name and "logprobs" in c]
        assert [offset for part in mine for offset in part] == own["logprobs"]["text_offset"]
