"""The command on Ray Serve: two copies of the embedded model in processes of their own, one of them killed under load.

Ray takes some twenty seconds of two cores to start, so that one run answers for all that is claimed.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.replicas.fleet import RayCopies, RayFleet
from server.settings import ServerSettings
from steering import SpecError
from tests.server.replicas.conftest import until

pytest.importorskip("ray.serve", reason="pip install 'setpoint[ray]'")
pytestmark = pytest.mark.timeout(600)

STEERED = {"targets": {"positive": 1.5}}
LONG = {"prompt": "the cat", "max_tokens": 480, "ignore_eos": True, "stream": True, "steering": STEERED}
STREAMS = 8


class Command:
    """`setpoint serve --replicas 2` with what it logs."""

    def __init__(self, store: Path) -> None:
        arguments = ["--port", "0", "--replicas", "2", "--store", str(store), "--drain-seconds", "5"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "server", "serve", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.lines: list[str] = []
        self._out: queue.Queue[str] = queue.Queue()
        for stream, take in ((self.process.stderr, self.lines.append), (self.process.stdout, self._out.put)):
            threading.Thread(target=self._read, args=(stream, take), daemon=True).start()

    @staticmethod
    def _read(stream: Any, take: Any) -> None:
        for line in stream:
            take(line)

    def ready(self) -> str:
        try:
            word, address = self._out.get(timeout=400).split()
        except queue.Empty:
            pytest.fail("not ready:\n" + "".join(self.lines[-40:]))
        assert word == "ready"
        return address

    def said(self) -> list[str]:
        """What stood on stdout after the ready line."""
        return [self._out.get_nowait() for _ in range(self._out.qsize())]

    def replicas(self) -> dict[str, int]:
        """The process of each replica, as the log tells it."""
        found = {}
        for line in tuple(self.lines):
            if '"replica ready"' in line:
                told = json.loads(line)
                found[told["replica"]] = told["pid"]
        return found

    def descendants(self) -> list[int]:
        """Processes that this one started, and those did."""
        parents = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
        found = [self.process.pid]
        for one in found:
            found += [pid for pid, parent in parents.items() if parent == one]
        return found[1:]


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    running = Command(tmp_path)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()


def _listening(pids: list[int]) -> list[bool]:
    """For each socket on which these processes wait for connections, whether it is on the loopback interface."""
    loopback = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")
    mine = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            with suppress(OSError):
                mine.add(os.readlink(descriptor))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine:
                found.append(fields[1].partition(":")[0] in loopback)
    return found


def _stream(address: str, begun: threading.Barrier, ends: list[list[dict[str, Any]]]) -> None:
    with httpx.Client(timeout=120) as client, client.stream("POST", f"{address}/v1/completions", json=LONG) as response:
        assert response.status_code == 200
        documents: list[dict[str, Any]] = []
        for line in response.iter_lines():
            if line == "data: [DONE]":
                ends.append(documents)
            elif line:
                documents.append(json.loads(line.removeprefix("data: ")))
                if len(documents) == 1:
                    begun.wait(120)


def _engines(client: httpx.Client) -> dict[str, float]:
    """Requests that run on each replica."""
    name = "setpoint_num_requests_running{"
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(name)]
    return {line.split('"')[1]: float(line.rpartition(" ")[2]) for line in lines}


def test_closing_a_call_ends_it_on_the_replica_at_once() -> None:
    class Items:
        is_cancelled = False

        def options(self, **_: Any) -> Items:
            return self

        def remote(self, *_: Any) -> Items:
            return self

        def __aiter__(self) -> Items:
            return self

        async def __anext__(self) -> list[Any]:
            return []

        def cancel(self) -> None:
            self.is_cancelled = True

    async def leave() -> bool:
        call = RayCopies(items := Items()).call({}, b"")
        await anext(call)
        await call.aclose()
        return items.is_cancelled

    assert asyncio.run(leave())


def test_a_ray_that_does_not_start_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def init(**_: Any) -> None:
        raise RuntimeError("it took too long")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # to be as it was afterwards
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    fleet = RayFleet(ServerSettings(replicas=2))
    with pytest.raises(SpecError, match="Ray to start"):
        fleet.start()
    fleet.stop()
    assert not list(tmp_path.glob("setpoint-ray-*"))


def test_two_replicas_serve_and_the_loss_of_one_is_the_loss_of_its_streams(command: Command) -> None:
    address = command.ready()
    with httpx.Client(base_url=address, timeout=120) as client:
        begun = threading.Barrier(STREAMS + 1)
        ends: list[list[dict[str, Any]]] = []
        threads = [threading.Thread(target=_stream, args=(address, begun, ends)) for _ in range(STREAMS)]
        for thread in threads:
            thread.start()
        begun.wait(120)
        running = _engines(client)
        assert running["0"] > 0
        assert running["1"] > 0
        until(lambda: set(command.replicas()) == {"0", "1"})
        first = command.replicas()
        os.kill(first["0"], signal.SIGKILL)
        asked = time.monotonic()
        answers = [client.post("/v1/completions", json={"prompt": "the cat", "max_tokens": 2}) for _ in range(6)]
        assert [answer.status_code for answer in answers] == [200] * 6
        assert time.monotonic() - asked < 20
        for thread in threads:
            thread.join(120)

        lost = [end for end in ends if "error" in end[-1]]
        whole = [end for end in ends if "steering" in end[-1]]
        assert (len(lost) + len(whole), len(ends)) == (STREAMS, STREAMS)
        assert lost
        assert whole
        assert {end[-1]["error"]["code"] for end in lost} == {"replica_lost"}
        for end in whole:
            assert end[-1]["steering"]["tokens_steered"] == LONG["max_tokens"]
            assert end[-1]["steering"]["tracking"]["positive"]["setpoint"] == 1.5

        until(lambda: command.replicas()["0"] != first["0"], 240)
        assert command.replicas()["1"] == first["1"]
        assert client.get("/health/ready").status_code == 200
        until(lambda: set(_engines(client)) == {"0", "1", "writer"})

        with client.stream("POST", "/v1/completions", json={**LONG, "n": 8}) as response:
            next(response.iter_lines())
        until(lambda: not any(_engines(client).values()), 2.0)

        below = command.descendants()
        assert _listening(below), "Ray's own processes listen for each other"
        assert all(is_loopback for is_loopback in _listening(below))
        assert first["1"] in below
        command.process.send_signal(signal.SIGTERM)
        assert command.process.wait(60) == 0
        assert command.said() == []
        until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in below), 30)


def test_told_to_end_while_it_loads_it_ends_and_starts_nothing_more(command: Command) -> None:
    until(lambda: len(command.descendants()) > 1, 120)  # Ray has begun
    below = command.descendants()
    command.process.send_signal(signal.SIGTERM)
    while command.process.poll() is None:
        below += [pid for pid in command.descendants() if pid not in below]
        time.sleep(0.1)
    assert command.process.returncode == 0, "".join(command.lines[-20:])
    assert command.said() == []
    until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in below), 30)
    assert not list(Path(tempfile.gettempdir()).glob(f"setpoint-ray-{command.process.pid}-*"))
