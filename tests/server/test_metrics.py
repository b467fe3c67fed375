"""`/metrics`: the names of the contract, Prometheus' rules, and that the numbers are those of what happened."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from server.app import create_app
from server.jobs import Done, Job, Jobs, Task
from server.metrics import Metrics
from server.settings import ServerSettings
from steering import Delta, Engine, EngineSettings, Finished, Plant, Request, Sampling
from tests.server.conftest import serving
from tests.server.wire import events

CONTRACT = {
    "ready", "num_requests_running", "num_requests_waiting", "kv_cache_usage_ratio", "prompt_tokens_total",
    "generation_tokens_total", "request_success_total", "admission_rejections_total",
    "time_to_first_token_seconds_count", "inter_token_latency_seconds_count", "e2e_request_latency_seconds_count",
    "request_queue_time_seconds_count",
    "steering_tracking_error_ratio_count", "steering_effort_ratio_count", "steering_saturated_tokens_total",
    "steering_programs_resident", "steering_batch_distinct_programs", "steering_nonfinite_total", "fit_jobs",
    "fit_seconds_count",
}  # fmt: skip
UNITS = ("_seconds", "_ratio", "_bytes", "_total", "_info")
COUNTED = {"ready", "store_reachable", "num_requests_running", "num_requests_waiting", "steering_programs_resident",
           "steering_batch_distinct_programs", "fit_jobs", "process_open_fds", "process_max_fds"}  # fmt: skip
"""Gauges that count things: they have no unit."""


@pytest.fixture(scope="module")
def lonely(plant: Plant, folder: Path) -> Iterator[httpx.Client]:
    """A server that nobody else calls, with one place, one waiting place and a key."""
    with serving(plant, folder, ServerSettings(api_key="secret"), max_batch=1, queue_limit=1) as address:
        headers = {"Authorization": "Bearer secret"}
        with httpx.Client(base_url=address, headers=headers, timeout=30) as http:
            yield http


def figures(client: httpx.Client) -> dict[str, float]:
    """Every sample by name and labels, the prefix left out."""
    response = client.get("/metrics")
    assert response.status_code == 200
    return sampled(response.text)


def sampled(text: str) -> dict[str, float]:
    return {
        sample.name.removeprefix("setpoint_")
        + "".join(f"[{v}]" for _, v in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def change(before: dict[str, float], after: dict[str, float], name: str) -> float:
    return after[name] - before.get(name, 0.0)


def test_before_the_model_is_there_every_name_is() -> None:
    """Rates need a zero to start from: a series that appears with its first event loses that event."""
    with TestClient(create_app(ServerSettings(), loads=False)) as early:
        found = figures(early)
        assert {name.partition("[")[0] for name in found} >= CONTRACT
        assert found["ready"] == 0
        for reason in ("queue_full", "jobs_full", "loading", "draining"):
            assert found[f"admission_rejections_total[{reason}]"] == 0
        for reason in ("stop", "length", "abort", "error"):
            assert found[f"request_success_total[{reason}]"] == 0
        for state in ("queued", "running", "succeeded", "failed", "cancelled"):
            assert found[f"fit_jobs[{state}]"] == 0
        early.post("/v1/completions", json={"prompt": "a"})
        assert figures(early)["admission_rejections_total[loading]"] == 1


def test_prometheus_rules(lonely: httpx.Client) -> None:
    response = lonely.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    for family in text_string_to_metric_families(response.text):
        assert re.fullmatch(r"setpoint_[a-z0-9]+(_[a-z0-9]+)*", family.name)
        assert family.documentation
        bare = family.name.removeprefix("setpoint_")
        assert family.type in ("gauge", "counter", "histogram")
        assert not (family.type != "counter" and bare.endswith("_total"))
        if family.type != "counter" and bare not in COUNTED:
            assert bare.endswith(UNITS), bare
        for sample in family.samples:
            assert not sample.name.endswith("_created")
    if promtool := shutil.which("promtool"):
        checked = subprocess.run(
            [promtool, "check", "metrics"], input=response.text, text=True, capture_output=True, check=False
        )
        assert checked.returncode == 0, checked.stderr + checked.stdout


def test_the_format_that_prometheus_prefers(lonely: httpx.Client) -> None:
    accept = "application/openmetrics-text; version=1.0.0, text/plain;q=0.5"
    response = lonely.get("/metrics", headers={"Accept": accept})
    assert response.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert response.text.endswith("# EOF\n")


def test_a_key_is_needed_where_there_is_one(lonely: httpx.Client) -> None:
    with httpx.Client(base_url=lonely.base_url) as stranger:
        assert stranger.get("/metrics").status_code == 401


def test_counts_and_latencies_of_a_request(lonely: httpx.Client) -> None:
    before = figures(lonely)
    body = {"prompt": "the cat sat", "max_tokens": 5, "ignore_eos": True, "seed": 1}
    used = lonely.post("/v1/completions", json=body).json()["usage"]
    events(lonely, "/v1/completions", body)
    after = figures(lonely)
    assert used["completion_tokens"] == 5
    assert change(before, after, "prompt_tokens_total") == 2 * used["prompt_tokens"]
    assert change(before, after, "generation_tokens_total") == 10
    assert change(before, after, "request_success_total[length]") == 2
    assert change(before, after, "time_to_first_token_seconds_count") == 2
    assert change(before, after, "inter_token_latency_seconds_count") == 8
    assert change(before, after, "e2e_request_latency_seconds_count") == 2
    assert change(before, after, "request_queue_time_seconds_count") == 2
    assert change(before, after, "http_requests_total[/v1/completions][200]") == 2
    whole = change(before, after, "e2e_request_latency_seconds_sum")
    parts = change(before, after, "time_to_first_token_seconds_sum")
    parts += change(before, after, "inter_token_latency_seconds_sum")
    waited = change(before, after, "request_queue_time_seconds_sum")
    assert 0 <= waited < change(before, after, "time_to_first_token_seconds_sum") <= parts <= whole
    assert after["num_requests_running"] == after["num_requests_waiting"] == after["kv_cache_usage_ratio"] == 0


def test_what_the_receipt_says(lonely: httpx.Client) -> None:
    before = figures(lonely)
    steering = {"targets": {"happy": 2.0, "animal": -0.5}, "guard": {"max_effort": 0.01}}
    body = {"prompt": "the cat", "max_tokens": 4, "ignore_eos": True, "steering": steering}
    receipt = lonely.post("/v1/completions", json=body).json()["steering"]
    after = figures(lonely)
    wanted = sum(held["error"] / abs(held["setpoint"]) for held in receipt["tracking"].values())
    assert change(before, after, "steering_tracking_error_ratio_count") == 2
    assert change(before, after, "steering_tracking_error_ratio_sum") == pytest.approx(wanted, rel=1e-6)
    assert change(before, after, "steering_effort_ratio_count") == 1
    assert change(before, after, "steering_effort_ratio_sum") == pytest.approx(receipt["effort"]["mean"], rel=1e-6)
    assert receipt["effort"]["saturated_tokens"] > 0
    assert change(before, after, "steering_saturated_tokens_total") == receipt["effort"]["saturated_tokens"]
    assert after["steering_programs_resident"] >= 1

    lonely.post("/v1/completions", json={**body, "steering": {"targets": {"happy": 0.0}}})
    last = figures(lonely)
    assert change(after, last, "steering_tracking_error_ratio_count") == 0  # no ratio to a setpoint of 0
    assert change(after, last, "steering_effort_ratio_count") == 1


def test_running_waiting_refused_and_left(lonely: httpx.Client) -> None:
    long: dict[str, Any] = {"prompt": "the cat", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    before = figures(lonely)
    with lonely.stream("POST", "/v1/completions", json=long) as running:
        lines = running.iter_lines()  # kept: the connection ends with the iterator
        next(lines)
        with lonely.stream("POST", "/v1/completions", json=long):
            assert lonely.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 429
            during = figures(lonely)
            assert (during["num_requests_running"], during["num_requests_waiting"]) == (1, 1)
            assert 0 < during["kv_cache_usage_ratio"] <= 1
    while figures(lonely)["request_success_total[abort]"] < before["request_success_total[abort]"] + 2:
        pass
    after = figures(lonely)
    assert change(before, after, "admission_rejections_total[queue_full]") == 1
    assert change(before, after, "e2e_request_latency_seconds_count") == 0  # a client that left says nothing of us
    assert after["num_requests_running"] == after["num_requests_waiting"] == 0


def test_no_request_owns_a_sum(lonely: httpx.Client) -> None:
    """A setpoint of almost nothing is missed by any factor, which may be no float any more."""
    before = figures(lonely)
    for setpoint in (1e-310, 1e-30):
        body = {"prompt": "the cat", "max_tokens": 2, "steering": {"targets": {"happy": setpoint}}}
        assert lonely.post("/v1/completions", json=body).status_code == 200
    after = figures(lonely)
    assert change(before, after, "steering_tracking_error_ratio_count") == 2
    assert 0 < change(before, after, "steering_tracking_error_ratio_sum") <= 200 * (1 + 1e-9)
    assert change(before, after, "steering_tracking_error_ratio_bucket[5.0]") == 0


def test_clients_cannot_make_series(lonely: httpx.Client) -> None:
    for path in ("/a", "/b/c", "/v1/models/x", "/v1/models/y", "/v1/steering/artifacts/z"):
        lonely.get(path)
    lonely.request("BREW", "/v1/models")
    before = set(figures(lonely))
    for i in range(5):
        lonely.get(f"/strange-{i}")
        lonely.get(f"/v1/models/m{i}")
        lonely.get(f"/v1/steering/artifacts/m{i}")
        lonely.request(f"BREW{i}", "/v1/models")
        lonely.post("/v1/completions", json={"model": f"m{i}", "prompt": "a"})
        lonely.post("/v1/completions", json={"prompt": "a", "steering": {"targets": {f"m{i}": 1}}})
    new = set(figures(lonely)) - before
    assert new <= {"http_requests_total[/v1/completions][400]", "http_requests_total[/v1/completions][404]"}


def test_jobs_by_state_and_how_long_fits_took() -> None:
    jobs, metrics = Jobs(), Metrics(lambda: None)
    metrics.watch_jobs(jobs)
    going, over = threading.Event(), threading.Event()

    def work(job: Job) -> Done:
        going.set()
        over.wait()
        return Done()

    def fails(job: Job) -> Done:
        raise ValueError

    jobs.submit(Task("fit", "one", work))
    jobs.submit(Task("fit", "two", fails))
    going.wait()
    during = sampled(metrics.exposition("")[0].decode())
    assert (during["fit_jobs[running]"], during["fit_jobs[queued]"]) == (1, 1)
    over.set()
    while not all(job.is_over for job in jobs.all()):
        pass
    jobs.close()
    after = sampled(metrics.exposition("")[0].decode())
    assert (after["fit_jobs[running]"], after["fit_jobs[succeeded]"], after["fit_jobs[failed]"]) == (0, 1, 1)
    assert after["fit_seconds_count"] == 1


def test_time_in_the_queue(plant: Plant) -> None:
    """One behind another waits for at least as long; one that is aborted before its turn has waited for nothing."""
    engine = Engine(plant, EngineSettings(max_batch=1))
    ends: dict[str, Finished] = {}

    def deliver(event: Delta | Finished) -> None:
        if isinstance(event, Finished):
            ends[event.request_id] = event

    for name in ("first", "second", "left"):
        engine.submit(Request(name, (1, 8), Sampling(max_tokens=3, ignore_eos=True)), deliver)
    engine.step()
    engine.abort("left")
    while engine.step():
        pass
    first, second = ends["first"].queued_seconds, ends["second"].queued_seconds
    assert first is not None
    assert second is not None
    assert 0 <= first < second
    assert ends["left"].queued_seconds is None
