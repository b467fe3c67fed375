"""`setpoint serve --engine vllm` beside `setpoint serve`: one API, the same answers, an orderly end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.tolerances import RUNTIME

pytest.importorskip("vllm", reason="vLLM is not installed here: make vllm-test")

ASKED = [{"role": "user", "content": "Tell me about dogs."}]
CHAT: dict[str, Any] = {"messages": ASKED, "max_tokens": 24, "temperature": 0}
TOWARDS: dict[str, Any] = {"targets": {"positive": 1.5}}
BLANKS = {"type": "json_schema", "json_schema": {"name": "mood", "schema": {"enum": ["good", "bad"]}}}
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", CHAT),
    "several": ("/v1/chat/completions", {**CHAT, "n": 3, "max_tokens": 8}),
    "stops": ("/v1/chat/completions", {**CHAT, "stop": ["dog"]}),
    "steered": ("/v1/chat/completions", {**CHAT, "steering": {**TOWARDS, "trace": "tokens"}, "max_tokens": 12}),
    "neurons": (
        "/v1/chat/completions",
        {**CHAT, "steering": {"interventions": [{"type": "neurons", "plan": "tone-neurons", "mode": "zero"}]}},
    ),
    "heads": (
        "/v1/chat/completions",
        {**CHAT, "steering": {"interventions": [{"type": "heads", "plan": "tone-heads", "mode": "zero", "heads": 4}]}},
    ),
    "preset": ("/v1/chat/completions", {**CHAT, "model": "setpoint-demo:glad"}),
    "logprobs": ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 3, "max_tokens": 6}),
    "echo": ("/v1/completions", {"prompt": "The film was", "echo": True, "logprobs": 2, "max_tokens": 0}),
    "prompts": ("/v1/completions", {"prompt": ["The film", "A dog"], "max_tokens": 6, "temperature": 0}),
    "grammar": ("/v1/chat/completions", {**CHAT, "response_format": BLANKS}),
    "compare": (
        "/v1/generate",
        {"prompt": "The film was", **TOWARDS, "compare": True, "temperature": 0, "max_tokens": 12},
    ),
    "bad setpoint": (
        "/v1/chat/completions",
        {**CHAT, "steering": {"interventions": [{"type": "lqr", "concept": "positive", "setpoint": "x"}]}},
    ),
    "unknown concept": ("/v1/chat/completions", {**CHAT, "steering": {"targets": {"nobody": 1}}}),
    "too long": ("/v1/completions", {"prompt": "a dog " * 600}),
    "too many logprobs": ("/v1/completions", {"prompt": "a", "logprobs": 21}),
}
MOVING = ("id", "created", "x-request-id")


@contextmanager
def served(store: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A server in a process of its own, and a client of it."""
    command = [sys.executable, "-m", "server", "serve", "--port", "0", "--max-batch", "4", "--store", str(store)]
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"}
    log = (store / f"{len(arguments)}.log").open("w+")
    running = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    try:
        assert running.stdout is not None
        line = running.stdout.readline()
        log.seek(0)
        assert line.startswith("ready "), f"{line}: standard output has the ready line first; {log.read()[-2000:]}"
        address = line.split()[1]
        with httpx.Client(base_url=address, timeout=60) as client:
            yield running, client
    finally:
        running.kill()
        running.communicate()
        log.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def vllm(store: Path) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A server with the vLLM engine, and a client of it."""
    with served(store, "--engine", "vllm", "--model-impl", "transformers", "--drain-seconds", "1") as found:
        yield found


@pytest.fixture(scope="module")
def pair(store: Path, vllm: tuple[subprocess.Popen[str], httpx.Client]) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    """A client of the vLLM engine, and one of the native engine, over one store."""
    _, one = vllm
    assert one.put("/v1/steering/presets/glad", json=TOWARDS).status_code in (200, 201)
    with served(store) as (_, other):
        yield one, other


def like(found: Any, expected: Any, at: str = "") -> None:
    """Equal, but for what no two calls have in common, and the last digits of what was measured."""
    if isinstance(expected, dict):
        assert isinstance(found, dict), at
        assert found.keys() == expected.keys(), at
        for key in expected:
            if key not in MOVING:
                like(found[key], expected[key], f"{at}.{key}")
    elif isinstance(expected, list):
        assert isinstance(found, list), at
        assert len(found) == len(expected), at
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            like(one, other, f"{at}[{i}]")
    elif isinstance(expected, float) and isinstance(found, float):
        assert found == pytest.approx(expected, **RUNTIME["receipt"]), at
    else:
        assert found == expected, at


@pytest.mark.parametrize("name", CALLS)
def test_an_answer_is_that_of_the_native_engine(pair: tuple[httpx.Client, httpx.Client], name: str) -> None:
    path, body = CALLS[name]
    found, expected = (client.post(path, json=body) for client in pair)
    assert found.status_code == expected.status_code, found.text
    like(found.json(), expected.json())


def events(client: httpx.Client, body: dict[str, Any]) -> list[Any]:
    with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_stream_is_that_of_the_native_engine(pair: tuple[httpx.Client, httpx.Client]) -> None:
    body = {**CHAT, "stop": ["dog has"], "steering": TOWARDS, "stream_options": {"include_usage": True}}
    found, expected = (events(client, body) for client in pair)
    like(found, expected)
    assert found[-2]["steering"]["tokens_steered"] > 0


def test_a_concept_fitted_beside_it_steers_it(pair: tuple[httpx.Client, httpx.Client]) -> None:
    one, other = pair
    fit = {
        "name": "sunny",
        "kind": "concept",
        "positive": ["The sun shines and I am glad.", "A warm day makes me happy.", "What a bright morning."],
        "negative": ["It rains and I am sad.", "A cold day makes me tired.", "What a dark evening."],
        "method": {"jacobian_prompts": 1},
    }
    job = one.post("/v1/steering/fit", json=fit)
    assert job.status_code == 202, job.text
    with one.stream("GET", f"/v1/steering/jobs/{job.json()['job']}/events") as told:
        last = [line for line in told.iter_lines() if line.startswith("data: {")][-1]
    assert json.loads(last.removeprefix("data: "))["state"] == "succeeded", last
    body = {**CHAT, "steering": {"targets": {"sunny": 2.0}}}
    found, expected = (client.post("/v1/chat/completions", json=body) for client in pair)
    like(found.json(), expected.json())
    assert other.get("/v1/steering/artifacts/sunny").status_code == 200


def test_the_same_metrics(pair: tuple[httpx.Client, httpx.Client]) -> None:
    def series(client: httpx.Client) -> set[str]:
        lines = client.get("/metrics").text.splitlines()
        return {line.split("{")[0].split(" ")[0] for line in lines if line.startswith("setpoint_")}

    found, expected = map(series, pair)
    assert found == expected


def test_a_signal_ends_it_in_order(vllm: tuple[subprocess.Popen[str], httpx.Client]) -> None:
    """The last test of this server."""
    running, client = vllm
    body = {"prompt": "The film", "max_tokens": 480, "ignore_eos": True, "stream": True, "n": 4}
    with client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        running.send_signal(signal.SIGTERM)
        *_, last = [line for line in lines if line]
    assert last == "data: [DONE]"
    assert running.wait(timeout=30) == 0


def test_what_it_cannot_start_with_is_told_in_a_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server", "serve", "--engine", "vllm", "--port", "0", "--store", str(tmp_path)]
    ended = subprocess.run(
        [*command, "--quantization", "int8-outliers"], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode != 0
    assert "quantization" in ended.stderr
    assert "Traceback" not in ended.stderr
