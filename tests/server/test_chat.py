from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.server.wire import CHAT, events

STEERED = {"targets": {"happy": 1.5}}
PATH = "/v1/chat/completions"


def ask(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post(PATH, json={"messages": CHAT, "max_tokens": 12, "seed": 5, "ignore_eos": True, **fields})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def test_openai_client_reads_answer_and_receipt(address: str) -> None:
    api = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    answer = api.chat.completions.create(
        model="tiny",
        messages=CHAT,
        max_completion_tokens=8,
        seed=1,
        extra_body={"steering": STEERED, "ignore_eos": True},
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    receipt = answer.steering  # type: ignore[attr-defined]
    assert receipt["fingerprint"].startswith("sha256:")
    assert receipt["tokens_steered"] == 8  # the last prompt token and seven decode steps
    assert receipt["tracking"]["happy"]["setpoint"] == 1.5
    assert len(receipt["tracking"]["happy"]["by_layer"]) == len(receipt["tracking"]["happy"]["layers"]) > 0
    assert receipt["effort"]["mean"] > 0


def test_openai_client_streams(address: str, client: httpx.Client) -> None:
    api = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    stream = api.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=12, seed=5, stream=True, extra_body={"ignore_eos": True}
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == ask(client)["choices"][0]["message"]["content"]


def test_stream_order(client: httpx.Client) -> None:
    body = {
        "messages": CHAT, "max_tokens": 6, "seed": 5, "ignore_eos": True, "steering": STEERED,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    chunks = events(client, PATH, body)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in c["delta"] for chunk in chunks[1:] for c in chunk["choices"])
    *texts, finish, receipt, usage = chunks[1:]
    assert all(t["choices"][0]["delta"]["content"] and t["choices"][0]["finish_reason"] is None for t in texts)
    assert finish["choices"][0]["delta"] == {}
    assert finish["choices"][0]["finish_reason"] == "length"
    assert receipt["choices"] == []
    assert receipt["steering"]["tokens_steered"] == 6
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 6
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize("fields", [{}, {"stop": ["bird", "e"]}, {"steering": STEERED}, {"n": 3}], ids=str)
def test_joined_stream_equals_the_whole(client: httpx.Client, fields: dict[str, Any]) -> None:
    whole = ask(client, max_tokens=40, **fields)
    joined = [""] * len(whole["choices"])
    stream = {"messages": CHAT, "max_tokens": 40, "seed": 5, "ignore_eos": True, **fields}
    receipt = None
    for chunk in events(client, PATH, stream):
        receipt = chunk.get("steering", receipt)
        for choice in chunk["choices"]:
            joined[choice["index"]] += choice["delta"].get("content", "")
    assert joined == [choice["message"]["content"] for choice in whole["choices"]]
    assert receipt == whole.get("steering")


def test_strength_zero_is_the_unsteered_answer(client: httpx.Client) -> None:
    plain = ask(client)["choices"]
    idle = ask(client, steering={"targets": {"happy": {"setpoint": 9.0, "strength": 0}}})
    assert idle["choices"] == plain
    assert idle["steering"]["tokens_steered"] == 0
    assert ask(client, steering={"targets": {"happy": 9.0}})["choices"] != plain


def test_steering_changes_what_is_measured(client: httpx.Client) -> None:
    def measured(value: float) -> float:
        steering = {"interventions": [{"type": "clamp", "concept": "happy", "setpoint": value}]}
        mean: float = ask(client, steering=steering)["steering"]["tracking"]["happy"]["mean"]
        return mean

    assert measured(2.0) == pytest.approx(2.0, abs=1e-3)
    assert measured(-1.0) == pytest.approx(-1.0, abs=1e-3)


def test_targets_come_before_interventions(client: httpx.Client) -> None:
    add = {"type": "add", "concept": "happy", "strength": 0.5}
    steering = ask(client, steering={"targets": {"animal": 1.0, "happy": 0.5}, "interventions": [add]})["steering"]
    assert list(steering["tracking"]) == ["animal", "happy", "happy#2"]


def test_choices_have_their_own_seed_and_receipt(client: httpx.Client) -> None:
    three = ask(client, n=3, seed=7, steering=STEERED, temperature=1.0)
    alone = [ask(client, seed=7 + i, steering=STEERED, temperature=1.0) for i in range(3)]
    assert [c["message"] for c in three["choices"]] == [a["choices"][0]["message"] for a in alone]
    assert [c["index"] for c in three["steering"]["choices"]] == [0, 1, 2]
    for index, one in enumerate(alone):
        mine = {k: v for k, v in three["steering"]["choices"][index].items() if k != "index"}
        assert mine["tokens_steered"] == one["steering"]["tokens_steered"]
        assert mine["tracking"]["happy"]["mean"] == pytest.approx(
            one["steering"]["tracking"]["happy"]["mean"], abs=1e-4
        )
    assert three["usage"]["prompt_tokens"] == alone[0]["usage"]["prompt_tokens"]
    assert three["usage"]["completion_tokens"] == 36


def test_largest_seed_wraps(client: httpx.Client) -> None:
    both = ask(client, n=2, seed=2**63 - 1)
    assert both["choices"][1]["message"] == ask(client, seed=-(2**63))["choices"][0]["message"]


def test_logprobs(client: httpx.Client) -> None:
    choice = ask(client, logprobs=True, top_logprobs=3, temperature=0)["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 12
    for entry in content:
        assert entry["logprob"] <= 0
        assert entry["bytes"] == list(entry["token"].encode())
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["logprob"] == pytest.approx(entry["logprob"])  # greedy takes the likeliest
    assert ask(client, logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert ask(client)["choices"][0]["logprobs"] is None


def test_streamed_logprobs_are_those_of_the_whole(client: httpx.Client) -> None:
    fields = {"logprobs": True, "stop": ["mat"]}
    whole = ask(client, max_tokens=30, **fields)["choices"][0]["logprobs"]["content"]
    chunks = events(client, PATH, {"messages": CHAT, "max_tokens": 30, "seed": 5, "ignore_eos": True, **fields})
    streamed = [e for chunk in chunks for c in chunk["choices"] if c["logprobs"] for e in c["logprobs"]["content"]]
    assert [e["token"] for e in streamed] == [e["token"] for e in whole]


def test_trace_reports_every_token(client: httpx.Client) -> None:
    steering = {**STEERED, "trace": "tokens"}
    trace = ask(client, steering=steering)["steering"]["trace"]
    assert len(trace) == 12
    assert {r["label"] for r in trace[0]["readings"]} == {"happy"}
    assert {r["setpoint"] for r in trace[3]["readings"]} == {1.5}
    chunks = events(
        client, PATH, {"messages": CHAT, "max_tokens": 12, "seed": 5, "ignore_eos": True, "steering": steering}
    )
    streamed = [t for chunk in chunks if chunk["choices"] for t in chunk.get("steering", {}).get("trace", [])]
    assert [t["id"] for t in streamed] == [t["id"] for t in trace]


def test_content_parts_are_joined(client: httpx.Client) -> None:
    parts = [{"type": "text", "text": "the cat"}, {"type": "text", "text": "sat on the mat"}]
    joined = ask(client, messages=[{"role": "user", "content": parts}])
    assert joined["choices"] == ask(client)["choices"]  # the word-level tokenizer splits at any white space


def test_null_is_absent(client: httpx.Client) -> None:
    nulls = {
        "temperature": None,
        "top_p": None,
        "stop": None,
        "n": None,
        "logit_bias": None,
        "steering": None,
        "tools": None,
    }
    assert ask(client, **nulls)["choices"] == ask(client)["choices"]


def test_answer_may_fill_the_context(client: httpx.Client) -> None:
    body = {"messages": CHAT, "temperature": 0, "seed": 1, "logit_bias": {"2": 100}}
    answer = client.post(PATH, json=body).json()  # the bias ends it at once; without max_tokens it is no error
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_a_chat_that_ends_with_the_assistant_gets_another_turn(client: httpx.Client) -> None:
    messages = [*CHAT, {"role": "assistant", "content": "the dog"}]
    tokens = client.post("/tokenize", json={"messages": messages, "return_token_strs": True}).json()
    assert tokens["token_strs"][-2:] == ["<end>", "<assistant>"]
    assert ask(client, messages=messages)["usage"]["prompt_tokens"] == tokens["count"]
