"""What clients see of shared prompts: how much was shared, that it changes nothing, and how to keep apart."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.server.wire import error

WORDS = " ".join(["the cat and the dog", "like the sun", "they love a happy bird"] * 8)
BASE: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "ignore_eos": True, "logprobs": 2}


def cached(answer: dict[str, Any]) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def complete(client: httpx.Client, prompt: str, **more: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json={**BASE, "prompt": prompt, **more})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


@pytest.mark.parametrize("strength", [0, 1])
def test_a_prompt_that_comes_again_is_not_read_again_and_no_number_changes(
    client: httpx.Client, strength: float
) -> None:
    prompt = f"{'sun' if strength else 'big'} {WORDS}"
    target = {"happy": {"setpoint": 2.0, "strength": strength, "apply": {"prompt": "all", "generation": "all"}}}
    first, second = (complete(client, prompt, steering={"targets": target}) for _ in range(2))
    assert cached(first) == 0
    assert 0 < cached(second) < second["usage"]["prompt_tokens"]
    assert cached(second) % 16 == 0
    assert first["choices"] == second["choices"]
    receipts = [{k: v for k, v in answer["steering"].items() if k != "id"} for answer in (first, second)]
    assert receipts[0] == receipts[1]
    plain = complete(client, prompt)
    if strength == 0:
        assert cached(plain) == cached(second)
        assert plain["choices"] == first["choices"]  # log-probabilities included: bit for bit
    else:
        assert cached(plain) == 0  # the shared one was steered
        assert plain["choices"] != first["choices"]


def test_a_twin_and_choices_share_their_prompt(client: httpx.Client) -> None:
    body = {**BASE, "prompt": f"bird {WORDS}", "compare": True, "targets": {"happy": 2.0}}
    both = client.post("/v1/generate", json=body).json()
    assert {cached(both), cached(both["unsteered"])} == {0, cached(both["unsteered"])}
    assert cached(both["unsteered"]) > 0
    assert cached(complete(client, f"tree {WORDS}", n=3)) == 0  # of a prompt that counts once: nothing was there before


def test_a_salt_keeps_prompts_apart(client: httpx.Client) -> None:
    prompt = f"night {WORDS}"
    complete(client, prompt)
    assert cached(complete(client, prompt, cache_salt="mine")) == 0
    assert cached(complete(client, prompt, cache_salt="mine")) > 0
    assert cached(complete(client, prompt, cache_salt="yours")) == 0
    answer = client.post("/v1/completions", json={**BASE, "prompt": prompt, "cache_salt": ""})
    assert error(answer, 400)["param"] == "cache_salt"


def test_the_metrics_count_what_was_shared(client: httpx.Client) -> None:
    def value(name: str) -> float:
        lines = client.get("/metrics").text.splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(f"setpoint_{name} ")))

    before = value("prefix_cache_hits_total"), value("prefix_cache_queries_total")
    taken = cached(complete(client, f"dog {WORDS}")) + cached(complete(client, f"dog {WORDS}"))
    assert taken > 0
    assert value("prefix_cache_hits_total") - before[0] == taken
    assert value("prefix_cache_queries_total") - before[1] == 2 * taken
    assert value("num_preemptions_total") == 0
