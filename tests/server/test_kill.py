"""SIGKILL: whatever the process was in the middle of, what it had kept is whole, and nothing half-written is seen."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from steering import Store
from steering.artifact import PARTIAL
from tests.server.test_serve import LONG, process

POSITIVE = ["the cat is good and happy", "we love the big dog", "they like the nice bird", "a happy day in the sun"]
NEGATIVE = ["the cat is bad and sad", "we hate the big dog", "they hate the rude bird", "a sad day in the night"]
FIT = {
    "name": "unborn",
    "positive": POSITIVE * 100,
    "negative": NEGATIVE * 100,
    "method": {"jacobian_prompts": 400, "skip": 1, "gains": ["dense", "matrix_free"]},
}
PRESET = {"targets": {"happy": 1.25}}


@contextmanager
def server(model: Path, store: Path) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    with process(str(model), SETPOINT_STORE=str(store)) as running:
        assert running.stdout is not None
        address = running.stdout.readline().split()[1]
        with httpx.Client(base_url=address, timeout=60) as client:
            yield running, client


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def listed(client: httpx.Client) -> dict[str, str]:
    return {one["name"]: one["fingerprint"] for one in client.get("/v1/steering/artifacts").json()["data"]}


def halves(store: Path) -> list[str]:
    return [path.name for path in store.rglob(f"{PARTIAL}*")]


def half_an_upload(client: httpx.Client, name: str, raw: bytes) -> socket.socket:
    """A connection over which half of an artifact has been sent."""
    assert client.base_url.port
    sending = socket.create_connection((client.base_url.host, client.base_url.port))
    head = f"PUT /v1/steering/artifacts/{name}/content HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n"
    sending.sendall(f"{head}Content-Type: application/octet-stream\r\n\r\n".encode() + raw[: len(raw) // 2])
    return sending


def test_killed_in_the_middle_of_a_fit_an_upload_and_a_stream(model_folder: Path, folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(folder, store)
    with server(model_folder, store) as (running, client):
        assert client.put("/v1/steering/presets/sunny", json=PRESET).status_code == 201
        before = listed(client)
        assert set(before) >= {"happy", "animal"}
        raw = client.get("/v1/steering/artifacts/happy/content").content
        job = client.post("/v1/steering/fit", json=FIT).json()["job"]
        with half_an_upload(client, "happy", raw), client.stream("POST", "/v1/completions", json=LONG) as stream:
            lines = stream.iter_lines()
            next(lines)
            wait_for(lambda: halves(store))
            wait_for(lambda: client.get(f"/v1/steering/jobs/{job}").json()["progress"] > 0)
            assert client.get(f"/v1/steering/jobs/{job}").json()["state"] == "running"
            running.send_signal(signal.SIGKILL)
            with pytest.raises(httpx.RemoteProtocolError):
                assert "data: [DONE]" not in list(lines)
        assert running.wait(timeout=15) == -signal.SIGKILL
    assert halves(store)
    assert "unborn" not in {entry.name for entry in Store(store).entries()}

    with server(model_folder, store) as (_, client):
        assert halves(store) == []
        assert listed(client) == before
        for name in before.keys() - {"broken"}:
            assert client.get(f"/v1/steering/artifacts/{name}").status_code == 200  # read whole, hash and all
        assert client.get("/v1/steering/jobs").json()["data"] == []
        body: dict[str, Any] = {
            "prompt": "the cat",
            "max_tokens": 3,
            "ignore_eos": True,
            "steering": {"preset": "sunny"},
        }
        answer = client.post("/v1/completions", json=body).json()
        assert answer["steering"]["tracking"]["happy"]["setpoint"] == 1.25
        quick = {**FIT, "positive": POSITIVE, "negative": NEGATIVE, "method": {"jacobian_prompts": 2, "skip": 1}}
        job = client.post("/v1/steering/fit", json=quick).json()["job"]
        wait_for(lambda: client.get(f"/v1/steering/jobs/{job}").json()["state"] == "succeeded")
        assert "unborn" in listed(client)


DIES = """
import os, signal, sys
from pathlib import Path
from dataclasses import replace
setattr(os, sys.argv[2], lambda *_: os.kill(os.getpid(), signal.SIGKILL))
from steering import Store
store = Store(Path(sys.argv[1]))
found = store.load("happy")
if sys.argv[3] == "preset":
    from steering.artifact import replacing
    with replacing(Path(sys.argv[1]) / "presets" / "sunny.json") as partial:
        partial.write_text("{}")
else:
    store.save(replace(found, tensors={key: tensor + 1 for key, tensor in found.tensors.items()}))
print("survived")
"""


@pytest.mark.parametrize(("call", "what"), [("fsync", "artifact"), ("replace", "artifact"), ("replace", "preset")])
def test_killed_at_either_side_of_the_last_write(call: str, what: str, folder: Path, tmp_path: Path) -> None:
    """Just before the bytes are safe on the disk, and just before the new file takes the old one's name."""
    store = tmp_path / "store"
    shutil.copytree(folder, store)
    (store / "presets").mkdir()
    (store / "presets" / "sunny.json").write_text(json.dumps(PRESET))
    before = Store(store).load("happy").fingerprint
    died = subprocess.run(
        [sys.executable, "-c", DIES, str(store), call, what], capture_output=True, text=True, check=False
    )
    assert (died.returncode, died.stdout) == (-signal.SIGKILL, ""), died.stderr
    assert len(halves(store)) == 1
    assert Store(store).load("happy").fingerprint == before
    assert [entry.name for entry in Store(store).entries()] == [entry.name for entry in Store(folder).entries()]
    assert json.loads((store / "presets" / "sunny.json").read_text()) == PRESET
    assert len(Store(store).sweep()) == 1
    assert halves(store) == []
