"""`vllm serve` alone steers what asks for it in `vllm_xargs`, answers with receipts, and says which field is wrong."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from steering import Engine, EngineSettings
from steering.demo import MODEL
from tests.tolerances import RUNTIME
from tests.vllm.common import chat, plant, program, request

pytest.importorskip("vllm", reason="vLLM is not installed here: make vllm-test")

PROMPT = chat()
Post = Callable[..., tuple[int, Any]]


@pytest.fixture(scope="module")
def post(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Post]:
    """A server of vLLM's own, and how to ask it."""
    folder: Path = tmp_path_factory.mktemp("vllm")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = (
        "--enforce-eager --dtype float32 --max-model-len 256 --max-num-seqs 4 --block-size 32 --model-impl transformers"
    )
    call = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL), "--port", str(port)]
    call += ["--served-model-name", "demo", "--kv-cache-memory-bytes", str(2**26), *flags.split()]
    quiet = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    env = os.environ | quiet | {"SETPOINT_STORE": str(folder / "store"), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    log = (folder / "log").open("w")
    server = subprocess.Popen(call, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait(server, port, folder / "log")
        yield lambda body: _post(port, body)
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


def _wait(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + 240
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise AssertionError(f"vLLM's server did not start:\n{log.read_text()[-4000:]}")


def _post(port: int, more: dict[str, Any]) -> tuple[int, Any]:
    body = {"model": "demo", "prompt": list(PROMPT), "max_tokens": 8, "temperature": 0, "ignore_eos": True} | more
    url = f"http://127.0.0.1:{port}/v1/completions"
    asked = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=120) as answer:
            if not body.get("stream"):
                return answer.status, json.load(answer)
            lines = [line.decode().removeprefix("data: ").strip() for line in answer if line.startswith(b"data: {")]
            return answer.status, [json.loads(line) for line in lines]
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def steering(spec: object, **more: Any) -> dict[str, Any]:
    return {"vllm_xargs": {"steering": spec if isinstance(spec, str) else json.dumps(spec)}} | more


def test_text_and_receipt_are_those_of_the_native_engine(post: Post) -> None:
    engine = Engine(plant(), EngineSettings(max_batch=1))
    plain, steered = engine.generate(
        [
            request("p", PROMPT, max_tokens=8, ignore_eos=True),
            request("s", PROMPT, program(), max_tokens=8, ignore_eos=True),
        ]
    )
    status, answer = post({})
    assert (status, answer["choices"][0]["text"]) == (200, plain.text)
    assert answer["kv_transfer_params"] is None
    status, answer = post(steering({"targets": {"positive": 1.5}}))
    assert (status, answer["choices"][0]["text"]) == (200, steered.text)
    receipt = answer["kv_transfer_params"]["setpoint"]
    assert steered.receipt is not None
    expected = steered.receipt.to_json()
    assert receipt["fingerprint"] == expected["fingerprint"]
    assert receipt["tokens_steered"] == expected["tokens_steered"] == 8
    mean = expected["tracking"]["positive"]["mean"]  # type: ignore[index]
    assert receipt["tracking"]["positive"]["mean"] == pytest.approx(mean, **RUNTIME["receipt"])


def test_each_of_several_choices_has_its_receipt(post: Post) -> None:
    status, answer = post(steering({"targets": {"positive": 1.5}}, n=2, temperature=1.0, seed=3))
    assert status == 200
    receipts = answer["kv_transfer_params"]["setpoint"]
    assert [receipt["tokens_steered"] for receipt in receipts] == [8, 8]


@pytest.mark.parametrize(
    ("spec", "param"),
    [
        ("{", "steering"),
        ({"targets": {"nobody": 1.0}}, "steering.targets.nobody"),
        ({"targetz": {}}, "steering.targetz"),
        (
            {"interventions": [{"type": "lqr", "concept": "positive", "setpoint": "x"}]},
            "steering.interventions[0].setpoint",
        ),
        ({"targets": {"positive": 1.0}, "guard": {"max_kl": 0.1}}, "steering.guard.max_kl"),
        ({"targets": {"positive": 1.0}, "trace": "tokens"}, "steering.trace"),
        ({"preset": "nobody"}, "steering.preset"),
    ],
)
def test_what_is_wrong_is_a_400_that_names_the_field(post: Post, spec: object, param: str) -> None:
    status, answer = post(steering(spec))
    assert (status, answer["error"]["param"]) == (400, param), answer


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"vllm_xargs": {"setpoint": "x"}}, "setpoint"),
        ({"steering": {"targets": {"positive": 1.5}}}, "steering"),
        (steering({"targets": {"positive": 1.5}}, use_beam_search=True, n=2), "use_beam_search"),
        ({"vllm_xargs": {"setpoint": "x"}, "use_beam_search": True, "n": 2}, "use_beam_search"),
    ],
    ids=["a program of the client's own", "where vLLM drops it", "a beam search", "a program in a beam search"],
)
def test_what_could_not_be_steered_is_not_served(post: Post, body: dict[str, Any], param: str) -> None:
    status, answer = post(body)
    assert (status, answer["error"]["param"]) == (400, param), answer


def test_a_stream_is_steered_and_says_what_is_wrong(post: Post) -> None:
    _, whole = post(steering({"targets": {"positive": 1.5}}))
    chunks = post(steering({"targets": {"positive": 1.5}}, stream=True))[1]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    (error,) = post(steering({"targets": {"nobody": 1.0}}, stream=True))[1]
    assert (error["error"]["code"], error["error"]["param"]) == (400, "steering.targets.nobody")
