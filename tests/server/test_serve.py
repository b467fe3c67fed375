"""The command as a user runs it: a process, a ready line, signals, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

LONG = {"prompt": "the cat", "n": 8, "max_tokens": 4000, "ignore_eos": True, "stream": True}


@contextmanager
def process(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """`setpoint serve` on a free port."""
    command = [sys.executable, "-m", "server", "serve", "--port", "0", *arguments]
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


def test_a_users_model_from_ready_line_to_drained_exit(model_folder: Path, folder: Path) -> None:
    with process(str(model_folder), "--drain-seconds", "2", SETPOINT_STORE=str(folder)) as running:
        assert running.stdout is not None
        word, address = running.stdout.readline().split()
        assert word == "ready"
        with httpx.Client(base_url=address, timeout=30) as client:
            assert client.get("/health/ready").status_code == 200
            assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["tiny-on-disk"]
            steered = client.post("/v1/completions", json={"prompt": "the cat", "steering": {"targets": {"happy": 1}}})
            assert steered.json()["steering"]["tracking"]["happy"]["setpoint"] == 1
            with client.stream("POST", "/v1/completions", json=LONG) as response:
                lines = response.iter_lines()
                next(lines)
                running.send_signal(signal.SIGTERM)
                with httpx.Client(base_url=address) as other:
                    while (draining := other.get("/health/ready")).status_code == 200:
                        pass
                    refused = other.post("/v1/completions", json={"prompt": "the cat"})
                assert (draining.status_code, draining.json()["status"]) == (503, "draining")
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
                *_, last, done = [line for line in lines if line]
        assert done == "data: [DONE]"
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "aborted"
        assert running.wait(timeout=15) == 0


@pytest.mark.parametrize("option", ["--help", "version"])
def test_the_command_starts_without_the_model_libraries(option: str) -> None:
    """Importing torch would cost a second at every start."""
    code = (
        f"import sys; sys.argv = ['setpoint', '{option}']\n"
        "try:\n from server.cli import main; main()\nexcept SystemExit: pass\n"
    )
    check = "print(sorted({'torch', 'transformers', 'fastapi', 'numpy'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip().splitlines()[-1] == "[]"
