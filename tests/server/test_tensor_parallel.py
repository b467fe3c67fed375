"""`setpoint serve --tensor-parallel 2`: answers as of one process, what only one process can do refused, and an end
that says why when the other process is gone."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import httpx

from tests.runtime.parallel.conftest import needs_accelerate
from tests.server.test_serve import LONG, process

ASKED = {"prompt": "the cat", "max_tokens": 12, "temperature": 0, "logprobs": 1, "steering": {"targets": {"happy": 1}}}
JOB = {"name": "kind", "positive": ["a good cat"] * 8, "negative": ["a bad cat"] * 8}


@needs_accelerate
def test_two_processes_serve_as_one_and_end_as_one(model_folder: Path, folder: Path) -> None:
    answers = []
    for size in ("1", "2"):
        with process(str(model_folder), "--tensor-parallel", size, SETPOINT_STORE=str(folder)) as running:
            assert running.stdout is not None
            assert running.stderr is not None
            address = running.stdout.readline().split()[1]
            with httpx.Client(base_url=address, timeout=60) as client:
                answers.append(client.post("/v1/completions", json=ASKED).json())
                if size == "1":
                    running.send_signal(signal.SIGTERM)
                    assert running.wait(timeout=60) == 0
                    continue
                for path, body in (
                    ("/v1/steering/fit", JOB),
                    ("/v1/steering/sweep", {"concept": "happy", "grid": [0, 1], "prompts": ["the cat"]}),
                    ("/v1/capture", {"prompt": "the cat", "sites": ["resid_pre.1"]}),
                ):
                    refused = client.post(path, json=body)
                    assert refused.status_code == 400, (path, refused.text)
                    assert "one process has it whole" in refused.json()["error"]["message"]
                with client.stream("POST", "/v1/completions", json=LONG) as response:
                    lines = response.iter_lines()
                    next(lines)
                    (follower,) = followers(running.pid)
                    os.kill(follower, signal.SIGKILL)
                    *_, last, done = [line for line in lines if line]
                assert done == "data: [DONE]"
                error = json.loads(last.removeprefix("data: "))["error"]
                assert error["code"] == "model_lost"
            assert running.wait(timeout=60) == 1
            assert "no longer together" in running.stderr.read()
    one, two = answers
    assert two["choices"][0]["text"] == one["choices"][0]["text"]
    for name, tracked in one["steering"]["tracking"].items():
        assert abs(two["steering"]["tracking"][name]["mean"] - tracked["mean"]) < 1e-3


def followers(pid: int) -> list[int]:
    """The child processes of a server, whichever thread of it started them."""
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
