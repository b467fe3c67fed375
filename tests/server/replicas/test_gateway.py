"""The gateway over replicas in this process: what a client sees when all is well, and when a replica ends."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.presets import Presets
from server.replicas import forward
from server.replicas.copies import Generation
from server.replicas.portal import Portal
from server.settings import ServerSettings
from steering import PlantError, SteeringError
from tests.server.replicas.conftest import Gateway, Local, LocalFleet, until
from tests.server.wire import CHAT, error, events

STEERED = {"steering": {"targets": {"happy": 1.0}}, "max_tokens": 6, "seed": 3, "temperature": 1.0}
LONG = {"prompt": "the cat", "max_tokens": 3000, "ignore_eos": True, "stream": True}
FIT: dict[str, Any] = {
    "name": "fresh",
    "kind": "concept",
    "positive": ["the cat is good and happy", "we love the big dog"] * 3,
    "negative": ["the cat is bad and sad", "we hate the big dog"] * 3,
    "method": {"jacobian_prompts": 2},
}


def test_both_replicas_answer_as_a_server_of_one_process_does(gate: Gateway, client: httpx.Client) -> None:
    body = {"messages": CHAT, **STEERED}
    told = []
    for server in (client, gate.client, gate.client):
        answer = server.post("/v1/chat/completions", json=body, headers={"X-Request-Id": "mine"})
        assert answer.headers.get_list("x-request-id") == ["mine"]
        told.append((answer.json()["choices"], answer.json()["steering"], answer.json()["usage"]["completion_tokens"]))
    assert told[0] == told[1] == told[2]
    assert sorted(gate.serving.calls) == [0, 1]
    assert gate.writing.calls == []


def test_a_stream_is_the_same_documents(gate: Gateway, client: httpx.Client) -> None:
    def seen(server: httpx.Client) -> list[Any]:
        found = events(server, "/v1/completions", {"prompt": "the cat", **STEERED})
        return [(one.get("choices"), one.get("steering")) for one in found]

    assert seen(gate.client) == seen(client)


@pytest.mark.parametrize(
    ("method", "path", "sent"),
    [
        ("GET", "/nowhere", {}),
        ("POST", "/v1/models", {}),
        ("POST", "/v1/completions", {"content": b"{}", "headers": {"content-type": "text/plain"}}),
        ("POST", "/v1/completions", {"content": b"x" * 100_001, "headers": {"content-type": "application/json"}}),
        (
            "POST",
            "/v1/completions",
            {"content": iter([b"x" * 60_000] * 2), "headers": {"content-type": "application/json"}},
        ),
        ("POST", "/v1/completions", {"json": {"prompt": "the cat", "steering": {"targets": {"nobody": 1}}}}),
        ("POST", "/v1/completions", {"json": {"prompt": "the cat", "steering": {"nonsense": 1}, "stream": True}}),
        ("POST", "/v1/chat/completions", {"json": {"messages": CHAT, "model": "another"}}),
        ("GET", "/v1/steering/jobs/job-0", {}),
        ("DELETE", "/v1/steering/jobs/job-0", {}),
        ("DELETE", "/v1/steering/presets/nobody", {}),
        ("OPTIONS", "/v1/models", {}),
    ],
)
def test_errors_are_those_of_one_process(
    gate: Gateway, client: httpx.Client, method: str, path: str, sent: dict[str, Any]
) -> None:
    if "content" in sent and not isinstance(sent["content"], bytes):
        sent = {**sent, "content": b"x" * 120_000}  # an iterator can be read once
    one, many = (server.request(method, path, **sent) for server in (client, gate.client))
    assert (many.status_code, many.headers.get("allow")) == (one.status_code, one.headers.get("allow"))
    if path != "/v1/completions" or "json" not in sent or "nobody" not in str(sent):
        assert many.json() == one.json()
    else:  # which names the concepts that there are
        assert many.json()["error"]["param"] == one.json()["error"]["param"] == "steering.targets.nobody"


def test_a_replica_that_ends_before_it_answers_is_replaced_by_another(gate: Gateway) -> None:
    gate.serving.kill_at_call = 0
    answer = gate.client.post("/v1/completions", json={"prompt": "the cat", **STEERED})
    assert answer.status_code == 200
    assert len(gate.serving.calls) == 2
    assert gate.serving.calls[0] != gate.serving.calls[1]


def test_a_call_that_writes_is_not_sent_twice(gate: Gateway) -> None:
    gate.writing.kill_at_call = 0
    told = error(gate.client.put("/v1/steering/presets/a", json={"targets": {"happy": 1}}), 503)
    assert told["code"] == "replica_lost"
    assert "not known" in told["message"]
    assert len(gate.writing.calls) == 1


def test_a_replica_that_ends_under_a_stream_ends_it_with_an_error_and_no_other(gate: Gateway) -> None:
    lines: dict[int, list[str]] = {}
    with gate.client.stream("POST", "/v1/completions", json=LONG) as one:
        first = one.iter_lines()
        next(first)
        with gate.client.stream("POST", "/v1/completions", json={**LONG, "max_tokens": 300}) as other:
            second = other.iter_lines()
            next(second)
            gate.serving.dead.add(gate.serving.calls[0])
            lines[0] = [line for line in first if line]
            lines[1] = [line for line in second if line]
    assert lines[0][-1] == lines[1][-1] == "data: [DONE]"
    assert json.loads(lines[0][-2].removeprefix("data: "))["error"]["code"] == "replica_lost"
    assert json.loads(lines[1][-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


def test_a_client_that_goes_away_frees_its_place(gate: Gateway) -> None:
    with gate.client.stream("POST", "/v1/completions", json=LONG) as response:
        lines = response.iter_lines()  # kept: the connection ends with it
        next(lines)
        assert gate.running() == 1
    until(lambda: gate.running() == 0, 2.0)
    until(lambda: gate.portal.generation.running == 0, 2.0)


def test_without_a_replica_it_is_not_ready_and_says_so(gate: Gateway) -> None:
    gate.serving.dead |= {0, 1}
    told = error(gate.client.post("/v1/completions", json={"prompt": "the cat"}), 503)
    assert told["code"] == "loading"
    until(lambda: gate.client.get("/health/ready").status_code == 503, 5.0)
    assert gate.client.get("/health/live").status_code == 200
    gate.serving.dead.clear()
    until(lambda: gate.client.get("/health/ready").status_code == 200, 5.0)


def test_what_is_fitted_is_used_by_every_replica(gate: Gateway) -> None:
    made = gate.client.post("/v1/steering/fit", json=FIT)
    assert made.status_code == 202, made.text
    job = f"/v1/steering/jobs/{made.json()['job']}"
    assert gate.client.get(job).json()["name"] == "fresh"
    lines = [line for line in gate.client.get(f"{job}/events").text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["state"] == "succeeded"
    for _ in range(2):
        answer = gate.client.post("/v1/completions", json={"prompt": "the cat", "steering": {"targets": {"fresh": 1}}})
        assert answer.json()["steering"]["tokens_steered"] > 0
    assert sorted(gate.serving.calls) == [0, 1]
    text = gate.client.get("/metrics").text
    assert 'setpoint_fit_jobs{replica="gateway",state="succeeded"} 1.0' in text
    assert 'setpoint_fit_seconds_count{replica="gateway"} 1.0' in text


def test_jobs_of_a_writer_that_ends_have_failed_and_are_still_known(gate: Gateway) -> None:
    writer = gate.writing.replicas[0]
    slow = {**FIT, "name": "slow", "positive": FIT["positive"] * 60, "negative": FIT["negative"] * 60}
    running, queued = (
        gate.client.post("/v1/steering/fit", json={**slow, "name": name}).json()["job"] for name in ("slow", "later")
    )
    until(lambda: gate.client.get(f"/v1/steering/jobs/{running}").json()["state"] == "running")
    gate.writing.dead.add(0)
    writer._service.jobs.cancel_all()  # its next word is its last
    for job in (running, queued):
        until(lambda job=job: gate.client.get(f"/v1/steering/jobs/{job}").json()["state"] == "failed")  # type: ignore[misc]
        told = gate.client.get(f"/v1/steering/jobs/{job}").json()
        assert told["error"]["code"] == "replica_lost"
    assert [job["state"] for job in gate.client.get("/v1/steering/jobs").json()["data"]] == ["failed", "failed"]
    assert error(gate.client.delete(f"/v1/steering/jobs/{queued}"), 409)["code"] == "job_over"


def test_a_job_is_cancelled_where_it_waits(gate: Gateway) -> None:
    slow = {**FIT, "name": "slow", "positive": FIT["positive"] * 60, "negative": FIT["negative"] * 60}
    running, queued = (
        gate.client.post("/v1/steering/fit", json={**slow, "name": name}).json()["job"] for name in ("slow", "later")
    )
    assert gate.client.delete(f"/v1/steering/jobs/{queued}").json()["state"] == "cancelled"
    assert gate.client.get(f"/v1/steering/jobs/{queued}").json()["state"] == "cancelled"
    assert gate.client.delete(f"/v1/steering/jobs/{running}").status_code in (200, 202)
    until(lambda: gate.client.get(f"/v1/steering/jobs/{running}").json()["state"] == "cancelled")


def test_an_artifact_that_any_replica_uses_is_not_deleted(gate: Gateway) -> None:
    with gate.client.stream(
        "POST", "/v1/completions", json={**LONG, "steering": {"targets": {"happy": 1}}}
    ) as response:
        lines = response.iter_lines()  # kept: the connection ends with it
        next(lines)
        told = error(gate.client.delete("/v1/steering/artifacts/happy"), 409)
        assert "a running request" in told["message"]
    until(lambda: gate.running() == 0, 2.0)
    assert gate.client.delete("/v1/steering/artifacts/happy").status_code == 200
    for _ in range(2):
        assert error(gate.client.get("/v1/steering/artifacts/happy"), 404)


def test_metrics_are_of_all_processes_and_answers_are_counted_once(gate: Gateway) -> None:
    for _ in range(4):
        gate.client.post("/v1/completions", json={"prompt": "the cat", "max_tokens": 2})
    text = gate.client.get("/metrics").text
    lines = text.splitlines()
    for replica in ("0", "1", "writer"):
        assert f'setpoint_num_requests_running{{replica="{replica}"}} 0.0' in lines
    assert 'setpoint_http_requests_total{replica="gateway",route="/v1/completions",status="200"} 4.0' in lines
    assert sum("setpoint_http_requests_total{" in line and "/v1/completions" in line for line in lines) == 1
    assert 'setpoint_ready{replica="gateway"} 1.0' in lines
    names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(names) == len(set(names))


def test_a_rolling_restart_loses_no_call_and_no_job(gate: Gateway) -> None:
    old: Generation = gate.fleet.generations[0]
    job = gate.client.post("/v1/steering/fit", json=FIT).json()["job"]
    loop = next(iter(gate.portal._journals.values())).get_loop()
    with gate.client.stream("POST", "/v1/completions", json={**LONG, "max_tokens": 400}) as response:
        lines = response.iter_lines()
        next(lines)
        rolling = asyncio.run_coroutine_threadsafe(gate.portal.roll(), loop)
        until(lambda: gate.portal.generation is not old, 30)
        assert isinstance(old.serving, Local)
        before = len(old.serving.calls)
        assert gate.client.post("/v1/completions", json={"prompt": "the cat"}).status_code == 200
        assert len(old.serving.calls) == before
        kept = [line for line in lines if line]
    assert json.loads(kept[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    rolling.result(60)
    assert gate.fleet.deleted == [1]
    assert gate.client.get(f"/v1/steering/jobs/{job}").json()["state"] == "succeeded"
    assert gate.client.get("/v1/steering/artifacts/fresh").status_code == 200


def test_a_drain_refuses_and_ends_what_runs_too_long_with_an_error(gate: Gateway) -> None:
    loop = next(iter(gate.portal._journals.values())).get_loop()
    with gate.client.stream("POST", "/v1/completions", json=LONG) as response:
        lines = response.iter_lines()
        next(lines)
        draining = asyncio.run_coroutine_threadsafe(gate.portal.drain(), loop)
        until(lambda: gate.portal.is_draining)
        assert gate.client.get("/health/ready").json() == {"status": "draining"}
        assert error(gate.client.post("/v1/completions", json={"prompt": "the cat"}), 503)["code"] == "draining"
        kept = [line for line in lines if line]
    assert kept[-1] == "data: [DONE]"
    assert json.loads(kept[-2].removeprefix("data: "))["error"]["code"] == "aborted"
    draining.result(10)


def test_a_gateway_that_is_told_to_end_while_it_loads_starts_no_replica(tmp_path: Path) -> None:
    """Ray would start anew after its end, with a dashboard and a proxy on ports of its own choice."""
    begun, told = threading.Event(), threading.Event()

    @dataclass
    class Slow(LocalFleet):
        def start(self) -> None:
            begun.set()
            assert told.wait(10)

        def give_up(self) -> None:
            told.set()

        def stop(self) -> None:
            self.deleted.append(0)

    fleet = Slow(ServerSettings(store=tmp_path, replicas=2))
    portal = Portal(fleet.settings, fleet)

    async def run() -> None:
        loading = asyncio.ensure_future(portal.load())
        await asyncio.to_thread(begun.wait, 10)
        await portal.drain()
        await portal.close()
        with pytest.raises(SteeringError, match="while it was loading"):
            await loading

    asyncio.run(run())
    assert fleet.generations == []
    assert fleet.deleted == [0]


def test_a_rolling_restart_without_a_model_changes_nothing(gate: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: object) -> Any:
        raise PlantError("there is no such model")

    monkeypatch.setattr("server.host.Host.load", load)
    loop = next(iter(gate.portal._journals.values())).get_loop()
    asyncio.run_coroutine_threadsafe(gate.portal.roll(), loop).result(30)
    assert gate.fleet.deleted == [2]
    assert gate.portal.generation is gate.fleet.generations[0]
    assert gate.client.post("/v1/completions", json={"prompt": "the cat"}).status_code == 200
    gate.fleet.generations.pop()  # nothing is to be ended there


def test_a_write_that_is_under_way_is_not_called_refused_when_the_replicas_are_gone(
    gate: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = Presets.put

    def slow(*arguments: Any) -> bool:
        time.sleep(2.5 + 2 * forward.PATIENCE)
        return put(*arguments)

    monkeypatch.setattr(Presets, "put", slow)
    gate.serving.dead |= {0, 1}  # noticed while the writer works
    answer = gate.client.put("/v1/steering/presets/slow", json={"targets": {"happy": 1}})
    assert answer.status_code == 201, answer.text


def test_without_a_writer_a_call_that_writes_ends_and_is_not_called_refused(
    gate: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Presets, "put", lambda *_: time.sleep(5))
    gate.writing.kill_all_after = 0.2
    began = time.monotonic()
    told = error(gate.client.put("/v1/steering/presets/slow", json={"targets": {"happy": 1}}), 503)
    assert (told["code"], time.monotonic() - began < 4.5) == ("replica_lost", True)
    assert gate.client.post("/v1/completions", json={"prompt": "the cat"}).status_code == 200


def test_a_job_is_known_before_its_maker_is_answered(gate: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the journal is late."""
    (journal,) = gate.portal._journals.values()
    journal.get_loop().call_soon_threadsafe(journal.cancel)
    until(journal.done)
    gate.portal.places.clear()
    flush, known = forward._Answer._flush, list[int]()

    async def flushed(self: forward._Answer) -> None:
        known.append(len(gate.portal.ledger.all()))
        await flush(self)

    monkeypatch.setattr(forward._Answer, "_flush", flushed)
    slow = {**FIT, "positive": FIT["positive"] * 60, "negative": FIT["negative"] * 60}
    asked = gate.client.post("/v1/steering/fit", json=slow)
    assert asked.status_code == 202
    assert known == [1]
    job = f"/v1/steering/jobs/{asked.json()['job']}"
    assert gate.client.get(job).json()["name"] == "fresh"
    assert gate.client.delete(job).status_code in (200, 202)
    (running,) = gate.writing.replicas[0]._service.jobs.all()
    assert running.stop.is_set()


def test_an_error_of_rays_ends_neither_the_pulse_nor_the_metrics(
    gate: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[str]()

    async def broken(self: Local, method: str, *arguments: object, seconds: float = 5.0) -> list[Any]:
        asked.append(method)
        raise RuntimeError("the router is shut down")

    with monkeypatch.context() as patched:
        patched.setattr(Local, "each", broken)
        until(lambda: "pulse" in asked)
        assert 'setpoint_ready{replica="gateway"} 1.0' in gate.client.get("/metrics").text
    gate.serving.dead |= {0, 1}
    until(lambda: gate.client.get("/health/ready").status_code == 503, 5.0)
