from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.server.wire import events

PATH = "/v1/completions"


def ask(client: httpx.Client, prompt: Any, **fields: Any) -> dict[str, Any]:
    response = client.post(PATH, json={"prompt": prompt, "max_tokens": 8, "seed": 5, "ignore_eos": True, **fields})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def test_sixteen_tokens_by_default(client: httpx.Client) -> None:
    body = client.post(PATH, json={"prompt": "the cat", "ignore_eos": True}).json()
    assert body["object"] == "text_completion"
    assert body["usage"]["completion_tokens"] == 16


def test_every_form_of_prompt(client: httpx.Client) -> None:
    ids = client.post("/tokenize", json={"prompt": "the cat"}).json()["tokens"]
    one = ask(client, "the cat")["choices"][0]["text"]
    other = ask(client, "a dog")["choices"][0]["text"]
    assert ask(client, ids)["choices"][0]["text"] == one
    assert [c["text"] for c in ask(client, ["the cat", "a dog"])["choices"]] == [one, other]
    assert [c["text"] for c in ask(client, [ids, ids])["choices"]] == [one, one]


def test_choices_are_ordered_by_prompt(client: httpx.Client) -> None:
    body = ask(client, ["the cat", "a dog"], n=2)
    alone = [ask(client, "the cat", n=2), ask(client, "a dog", n=2)]
    assert [c["text"] for c in body["choices"]] == [c["text"] for a in alone for c in a["choices"]]
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["prompt_tokens"] == sum(a["usage"]["prompt_tokens"] for a in alone)


def test_logprobs(client: httpx.Client) -> None:
    logprobs = ask(client, "the cat", logprobs=2)["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["text_offset"]) == 8
    assert logprobs["text_offset"][1] == len(logprobs["tokens"][0])
    assert all(len(top) in (2, 3) for top in logprobs["top_logprobs"])  # the chosen one is always there
    assert all(token in top for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True))


def test_stream_equals_whole(client: httpx.Client) -> None:
    fields = {"prompt": ["the cat", "a dog"], "max_tokens": 20, "seed": 5, "ignore_eos": True, "logprobs": 0}
    whole = client.post(PATH, json=fields).json()["choices"]
    chunks = events(client, PATH, fields)
    for choice in whole:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == "length"
        assert mine[-1]["text"] == ""
        offsets = [o for c in mine if c["logprobs"] for o in c["logprobs"]["text_offset"]]
        assert offsets == choice["logprobs"]["text_offset"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"logit_bias": {"2": 100}, "ignore_eos": False}, None), ({"stop_token_ids": [9]}, 9)],
    ids=str,
)
def test_stop_reason(client: httpx.Client, fields: dict[str, Any], reason: int | None) -> None:
    bias = fields.get("logit_bias", {"9": 100})
    choice = ask(client, "the cat", **{**fields, "logit_bias": bias})["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"], choice["text"]) == ("stop", reason, "")


def test_openai_client(address: str) -> None:
    api = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    answer = api.completions.create(model="tiny", prompt="the cat", max_tokens=4, seed=1)
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert [m.id for m in api.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError) as caught:
        api.completions.create(model="gpt-4", prompt="x")
    assert caught.value.code == "model_not_found"


def test_mixed_batch_leaves_neighbours_alone(client: httpx.Client) -> None:
    """Steered and unsteered requests in one batch answer as each does alone, whatever the others do."""
    import concurrent.futures

    variants: list[dict[str, Any]] = [{}] + [{"steering": {"targets": {"happy": float(i)}}} for i in (2, 4, 6)]
    alone = [ask(client, "the cat", max_tokens=12, **v)["choices"] for v in variants]
    with concurrent.futures.ThreadPoolExecutor(len(variants)) as pool:
        together = list(pool.map(lambda v: ask(client, "the cat", max_tokens=12, **v)["choices"], variants))
    assert together == alone
