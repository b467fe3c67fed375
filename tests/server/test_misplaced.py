"""Steering that can do nothing, or stands where nobody reads it, is refused: it would be served unsteered."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

BODY: dict[str, Any] = {"prompt": "the cat is in the sun", "max_tokens": 6, "temperature": 0}


def refused(client: httpx.Client, body: dict[str, Any], path: str = "/v1/completions") -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


@pytest.mark.parametrize(
    ("apply", "field"),
    [
        ({"prompt": "none", "generation": {"window": [5, 9]}}, "generation.window"),
        ({"prompt": "none", "generation": {"window": [3, 3]}}, "generation.window"),
        ({"prompt": {"window": [50, 60]}, "generation": "all"}, "prompt.window"),
        ({"prompt": {"window": [2, 2]}, "generation": "all"}, "prompt.window"),
        ({"prompt": {"positions": [99, 100]}, "generation": "all"}, "prompt.positions"),
    ],
)
def test_a_scope_that_selects_nothing_is_refused(client: httpx.Client, apply: dict[str, Any], field: str) -> None:
    steering = {"interventions": [{"type": "lqr", "concept": "happy", "setpoint": 1, "apply": apply}]}
    error = refused(client, {**BODY, "steering": steering})
    assert error["param"] == f"steering.interventions[0].apply.{field}"


def test_the_only_token_is_drawn_from_the_prompt(client: httpx.Client) -> None:
    scope = {"prompt": "none", "generation": "all"}
    steering = {"interventions": [{"type": "lqr", "concept": "happy", "setpoint": 1, "apply": scope}]}
    error = refused(client, {**BODY, "max_tokens": 1, "steering": steering})
    assert error["param"] == "steering.interventions[0].apply.generation"
    assert client.post("/v1/completions", json={**BODY, "max_tokens": 2, "steering": steering}).status_code == 200


@pytest.mark.parametrize(
    "scope", [{"prompt": "none", "generation": {"window": [4, 9]}}, {"prompt": "none", "generation": "none"}]
)
def test_a_scope_that_selects_something_or_says_nothing_is_served(client: httpx.Client, scope: dict[str, Any]) -> None:
    steering = {"interventions": [{"type": "lqr", "concept": "happy", "setpoint": 1, "apply": scope}]}
    answer = client.post("/v1/completions", json={**BODY, "ignore_eos": True, "steering": steering}).json()
    assert answer["steering"]["tokens_steered"] == (scope["generation"] != "none")


@pytest.mark.parametrize(
    "name", ["Steering", "STEERING", "steer", "steeering", "stering", "steering_", "Stearing", "targets", "guard"]
)
def test_a_misspelt_or_misplaced_steering_is_refused(client: httpx.Client, name: str) -> None:
    assert refused(client, {**BODY, name: {"targets": {"happy": 1}}})["param"] == name


@pytest.mark.parametrize("name", ["string", "testing", "string_id", "filtering", "metadata", "ring", "streaming"])
def test_other_words_are_tolerated_as_openai_does(client: httpx.Client, name: str) -> None:
    assert client.post("/v1/completions", json={**BODY, name: {"targets": {"happy": 1}}}).status_code == 200


def test_what_only_the_client_unpacks_is_refused(client: httpx.Client) -> None:
    body = {**BODY, "extra_body": {"steering": {"targets": {"happy": 1}}}}
    assert refused(client, body)["param"] == "extra_body.steering"
    body = {**BODY, "extra_body": {"targets": {"happy": 1}}}
    assert refused(client, body)["param"] == "extra_body.targets"
    assert client.post("/v1/completions", json={**BODY, "extra_body": {"other": 1}}).status_code == 200


def test_a_target_may_say_that_it_is_lqr_and_nothing_else(client: httpx.Client) -> None:
    of = {"setpoint": 1.0, "type": "lqr"}
    assert client.post("/v1/completions", json={**BODY, "steering": {"targets": {"happy": of}}}).status_code == 200
    error = refused(client, {**BODY, "steering": {"targets": {"happy": {**of, "type": "add"}}}})
    assert error["param"] == "steering.targets.happy.type"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/generate"])
def test_every_route_takes_max_completion_tokens(client: httpx.Client, path: str) -> None:
    body = {"prompt": "the cat", "max_tokens": 9, "max_completion_tokens": 3, "ignore_eos": True}
    assert client.post(path, json=body).json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt": "a",}', "line 1, column"),
        (b'{"prompt": "\\ud83d"}', "surrogate"),
    ],
)
def test_what_is_no_json_is_told_where(client: httpx.Client, content: bytes, said: str) -> None:
    answer = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_a_compressed_body_is_of_the_wrong_type(client: httpx.Client) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert client.post("/v1/completions", content=b"{}", headers=headers).status_code == 415


def test_too_many_targets_are_counted(client: httpx.Client) -> None:
    error = refused(client, {**BODY, "steering": {"targets": {f"c{i}": 1 for i in range(20)}}})
    assert error["message"].endswith("at most 16 items, got 20.")
