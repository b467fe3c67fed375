"""The gateway over replicas in this process: what a client sees when all is well, and when a replica ends."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from server.replicas.copies import Generation
from tests.server.replicas.conftest import Gateway, Local, until
from tests.server.wire import CHAT, error, events

STEERED = {"steering": {"targets": {"happy": 1.0}}, "max_tokens": 6, "seed": 3, "temperature": 1.0}
LONG = {"prompt": "the cat", "max_tokens": 3000, "ignore_eos": True, "stream": True}
FIT = {
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
        next(response.iter_lines())
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
        next(response.iter_lines())
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
