"""Fits and sweeps as jobs: what they leave, how they are told, ended and refused; that they outlive their client."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from server.background import NICE, PIECE_SECONDS, SHARE, Cancelled, Pace, step_back
from server.host import Host, Service
from server.jobs import KEPT, WAITING, Done, Job, Jobs, Task
from server.schema.errors import ApiError
from server.settings import ServerSettings
from steering import Engine, EngineSettings, Plant, SpecError, SteeringError, Store
from tests.server.conftest import serving
from tests.server.wire import error

GOOD = ["the cat is good and happy", "we love the big dog", "they like the nice bird", "a happy day in the sun"]
BAD = ["the cat is bad and sad", "we hate the big dog", "they hate the rude bird", "a sad day in the night"]
FIT: dict[str, Any] = {"positive": GOOD, "negative": BAD, "method": {"jacobian_prompts": 2, "skip": 1}}
LONG: dict[str, Any] = {
    "positive": [f"{GOOD[i % 4]} {'the good cat and ' * (i % 20)}" for i in range(400)],
    "negative": [f"{BAD[i % 4]} {'the bad cat and ' * (i % 20)}" for i in range(400)],
    "method": {"jacobian_prompts": 800, "skip": 1},
}
"""Seconds of work, whoever does it."""
CHAT = [{"role": "user", "content": "the cat sat"}, {"role": "assistant", "content": "the dog"}]


@pytest.fixture(scope="module")
def store(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of these tests' own, with one concept, and one that ships with it."""
    path = tmp_path_factory.mktemp("jobs")
    shutil.copy(folder / "happy.safetensors", path)
    return path


@pytest.fixture(scope="module")
def http(plant: Plant, store: Path) -> Iterator[httpx.Client]:
    with (
        serving(plant, store, ServerSettings(body_limit=400_000)) as address,
        httpx.Client(base_url=address, timeout=30) as client,
    ):
        yield client


def started(client: httpx.Client, path: str, body: dict[str, Any]) -> str:
    response = client.post(f"/v1/steering/{path}", json=body)
    assert response.status_code == 202, response.text
    assert set(response.json()) == {"job"}
    id_ = str(response.json()["job"])
    assert response.headers["location"] == f"/v1/steering/jobs/{id_}"
    return id_


def when(client: httpx.Client, id_: str, reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        job: dict[str, Any] = client.get(f"/v1/steering/jobs/{id_}").json()
        if reached(job):
            return job
        time.sleep(0.01)
    raise AssertionError(f"the job stayed {job}")


def over(client: httpx.Client, id_: str) -> dict[str, Any]:
    return when(client, id_, lambda job: job["finished"] is not None)


def told(client: httpx.Client, id_: str) -> list[dict[str, Any]]:
    """The events of a job to its end, after checking their framing."""
    response = client.get(f"/v1/steering/jobs/{id_}/events")
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = response.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


# Fits


def test_a_fit_is_told_and_can_be_used_at_once(http: httpx.Client, store: Path) -> None:
    id_ = started(http, "fit", {"name": "glad", **FIT})
    found = told(http, id_)
    assert [one["id"] for one in found] == [id_] * len(found)
    states = [one["state"] for one in found]
    assert states == sorted(states, key=["queued", "running", "succeeded"].index)
    assert states[-1] == "succeeded"
    assert [one["state"] for one in found if one["stage"] == "done"] == ["succeeded"]
    progress = [one["progress"] for one in found]
    assert progress == sorted(progress)
    last = found[-1]
    assert last == http.get(f"/v1/steering/jobs/{id_}").json()
    assert (last["kind"], last["name"], last["artifact"], last["error"]) == ("fit", "glad", "glad", None)
    assert (last["progress"], last["stage"]) == (1.0, "done")
    assert last["created"] <= last["started"] <= last["finished"]
    assert last["result"]["fingerprint"] == Store(store).load("glad").fingerprint
    body = {"prompt": "the cat", "max_tokens": 2, "steering": {"targets": {"glad": 1.0}}}
    assert http.post("/v1/completions", json=body).json()["steering"]["tracking"]["glad"]["setpoint"] == 1.0
    assert told(http, id_) == [last]
    assert last in http.get("/v1/steering/jobs").json()["data"]


def test_rows_and_methods_of_every_form(http: httpx.Client, store: Path) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, {"role": "assistant", "content": "yes"}]
    body = {
        "name": "forms",
        "kind": "concept",
        "model": "tiny",
        "positive": ["the good cat sat", {"text": "a nice dog"}, CHAT, {"messages": parts}],
        "negative": BAD,
        "method": {
            "direction": "mean_difference", "gains": ["matrix_free", "dense"], "q": 2, "r": 0.5, "q_f": 1.5,
            "jacobian_prompts": 2, "positions": "last", "skip": 1, "layers": [1, 2],
        },
    }  # fmt: skip
    assert over(http, started(http, "fit", body))["error"] is None
    made = Store(store).load("forms").body
    assert made["provenance"]["examples"] == {"positive": 4, "negative": 4}
    assert (made["layers"], made["default_gains"]) == ([1, 2], "matrix_free")
    assert made["weights"] == {"q": 2.0, "r": 0.5, "q_f": 1.5}
    assert made["provenance"]["settings"]["positions"] == "last"


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"positive": [*GOOD[:3], " "]}, 400, "positive[3]"),
        ({"positive": [*GOOD[:3], 7]}, 400, "positive[3]"),
        ({"positive": [*GOOD[:3], None]}, 400, "positive[3]"),
        ({"positive": [*GOOD[:3], []]}, 400, "positive[3]"),
        ({"negative": [*BAD[:3], {"txt": "a"}]}, 400, "negative[3].txt"),
        ({"negative": [*BAD[:3], [{"role": "cat", "content": "a"}]]}, 400, "negative[3][0].role"),
        ({"negative": [*BAD[:3], {"messages": [{"role": "user"}]}]}, 400, "negative[3].messages[0].content"),
        ({"positive": [*GOOD, CHAT], "method": {"positions": "late"}}, 400, "positive[0]"),
        ({"positive": GOOD[:1]}, 400, "positive"),
        ({"negative": "the cat"}, 400, "negative"),
        ({"positive": None}, 400, "positive"),
        ({"name": "../up"}, 400, "name"),
        ({"name": None}, 400, "name"),
        ({"kind": "plan"}, 400, "kind"),
        ({"extra": 1}, 400, "extra"),
        ({"method": {"gains": "best"}}, 400, "method.gains"),
        ({"method": {"gain": "dense"}}, 400, "method.gain"),
        ({"method": {"direction": "pca"}}, 400, "method.direction"),
        ({"method": {"r": 0}}, 400, "method.r"),
        ({"method": {"q": -1}}, 400, "method.q"),
        ({"method": {"jacobian_prompts": 0}}, 400, "method.jacobian_prompts"),
        ({"method": {"layers": [0, 2]}}, 400, "method.layers"),
        ({"method": {"layers": [7]}}, 400, "method.layers"),
        ({"method": {"positions": "first"}}, 400, "method.positions"),
        ({"model": "other"}, 404, "model"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_a_bad_fit_names_its_field(http: httpx.Client, change: dict[str, Any], status: int, param: str) -> None:
    before = len(http.get("/v1/steering/jobs").json()["data"])
    found = error(http.post("/v1/steering/fit", json={"name": "x", **FIT, **change}), status)
    assert found["param"] == param
    assert found["message"].startswith(f"{param}: ") or status == 404
    assert len(http.get("/v1/steering/jobs").json()["data"]) == before


def test_what_only_the_fit_can_find_is_told_by_the_job(http: httpx.Client, store: Path) -> None:
    last = over(http, started(http, "fit", {"name": "same", **FIT, "negative": GOOD}))
    assert (last["state"], last["artifact"]) == ("failed", None)
    assert last["error"]["param"] == "positive"
    assert "equal means" in last["error"]["message"]
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert not (store / "same.safetensors").exists()


def test_names_of_built_in_artifacts_are_refused(plant: Plant, folder: Path, tmp_path: Path) -> None:
    from server.schema.jobs import FitRequest
    from server.tasks import fit_task

    host = Host(plant, Engine(plant, EngineSettings(max_batch=1)), Store(tmp_path, builtin=folder), "tiny")
    with pytest.raises(SteeringError, match="built-in"):
        fit_task(FitRequest(name="happy", **FIT), host)


def test_a_cancelled_fit_leaves_nothing(http: httpx.Client, store: Path) -> None:
    id_ = started(http, "fit", {"name": "half", **LONG})
    assert error(http.post("/v1/steering/fit", json={"name": "half", **FIT}), 409)["param"] == "name"
    when(http, id_, lambda job: job["progress"] > 0)
    began = time.monotonic()
    response = http.delete(f"/v1/steering/jobs/{id_}")
    assert (response.status_code, response.json()["id"]) == (202, id_)
    last = over(http, id_)
    assert time.monotonic() - began < 2
    assert (last["state"], last["artifact"], last["error"]) == ("cancelled", None, None)
    assert 0 < last["progress"] < 1
    assert not [path for path in store.iterdir() if "half" in path.name or path.name.startswith(".")]
    assert error(http.delete(f"/v1/steering/jobs/{id_}"), 409)["code"] == "job_over"
    assert over(http, started(http, "fit", {"name": "half", **FIT}))["state"] == "succeeded"


def test_a_job_outlives_its_client(http: httpx.Client) -> None:
    """One client asks and leaves, another watches and leaves: the job goes on, and a late client sees how far it is."""
    with httpx.Client(base_url=http.base_url) as passing:
        id_ = started(passing, "fit", {"name": "alone", **LONG})
        with passing.stream("GET", f"/v1/steering/jobs/{id_}/events") as response:
            first = json.loads(next(response.iter_lines()).removeprefix("data: "))
            assert first["id"] == id_
    seen = when(http, id_, lambda job: job["progress"] > 0.05)
    with http.stream("GET", f"/v1/steering/jobs/{id_}/events") as response:
        lines = response.iter_lines()
        late = json.loads(next(lines).removeprefix("data: "))
        assert late["progress"] >= seen["progress"]
        http.delete(f"/v1/steering/jobs/{id_}")
        rest = list(lines)
    assert rest[-2] == "data: [DONE]"
    assert json.loads(rest[-4].removeprefix("data: "))["state"] == "cancelled"


def test_generation_goes_on_beside_a_fit(http: httpx.Client) -> None:
    body = {"prompt": "the cat", "max_tokens": 40, "seed": 1, "temperature": 1, "ignore_eos": True}
    alone = http.post("/v1/completions", json=body).json()["choices"]
    id_ = started(http, "fit", {"name": "beside", **LONG})
    when(http, id_, lambda job: job["progress"] > 0)
    assert http.post("/v1/completions", json=body).json()["choices"] == alone
    assert http.get(f"/v1/steering/jobs/{id_}").json()["state"] == "running"
    http.delete(f"/v1/steering/jobs/{id_}")
    over(http, id_)


def test_unknown_jobs(http: httpx.Client) -> None:
    for call in (http.get, http.delete):
        assert error(call("/v1/steering/jobs/nothing"), 404)["code"] == "job_not_found"
    assert error(http.get("/v1/steering/jobs/nothing/events"), 404)["code"] == "job_not_found"


# Sweeps

SWEEP: dict[str, Any] = {"concept": "happy", "grid": [0.0, 2.0], "prompts": ["the cat", "a dog sat", CHAT[:1]]}


def test_a_sweep_measures_every_dose(http: httpx.Client) -> None:
    body = {**SWEEP, "max_tokens": 5, "judge": "positive", "seed": 3, "apply": {"prompt": "all", "generation": "all"}}
    last = over(http, started(http, "sweep", body))
    assert (last["state"], last["kind"], last["name"]) == ("succeeded", "sweep", "happy")
    result = last["result"]
    assert (result["swept"], result["prompts"], result["judge"]) == ("setpoint", 3, "positive")
    assert [cell["dose"] for cell in result["grid"]] == [0.0, 2.0]
    for cell in (result["unsteered"], *result["grid"]):
        assert (cell["n"], cell["failed"], len(cell["samples"])) == (3, 0, 2)
        low, high = cell["effect"]["interval"]
        assert low <= cell["effect"]["rate"] <= high
        assert cell["perplexity"] > 1
    assert (result["unsteered"]["perplexity_ratio"], result["unsteered"]["effort"]["max"]) == (1.0, 0.0)
    low, high = result["grid"]
    assert high["effort"]["mean"] > 0
    assert high["tracking"]["mean"] > low["tracking"]["mean"]
    assert high["perplexity_ratio"] == pytest.approx(high["perplexity"] / result["unsteered"]["perplexity"], rel=1e-3)
    assert high["tracking"]["error"] == pytest.approx(abs(2.0 - high["tracking"]["mean"]), abs=0.2)


def test_a_sweep_without_a_judge_measures_projections(http: httpx.Client) -> None:
    """Strength 0 of an intervention that has no setpoint is the unsteered model."""
    last = over(http, started(http, "sweep", {**SWEEP, "type": "ablate", "grid": [0.0, 1.0], "max_tokens": 3}))
    result = last["result"]
    assert (result["swept"], result["judge"]) == ("strength", None)
    none, whole = result["grid"]
    assert none["effect"]["measure"] == "projection"
    assert none["effect"]["mean"] == none["tracking"]["mean"] == result["unsteered"]["effect"]["mean"]
    assert (none["samples"], none["perplexity_ratio"]) == (result["unsteered"]["samples"], 1.0)
    assert whole["effect"]["mean"] != none["effect"]["mean"]
    assert whole["tracking"]["error"] is None


def test_a_sweep_is_what_single_requests_give(http: httpx.Client) -> None:
    last = over(
        http, started(http, "sweep", {**SWEEP, "grid": [1.5], "max_tokens": 6, "seed": 11, "prompts": ["a dog"]})
    )
    body = {
        "prompt": "a dog", "max_tokens": 6, "seed": 11, "temperature": 0.8, "steering": {"targets": {"happy": 1.5}}
    }  # fmt: skip
    single = http.post("/v1/completions", json=body).json()
    (cell,) = last["result"]["grid"]
    assert cell["samples"] == [single["choices"][0]["text"]]
    assert cell["tracking"]["mean"] == pytest.approx(single["steering"]["tracking"]["happy"]["mean"], rel=1e-4)
    assert cell["effort"]["max"] == pytest.approx(single["steering"]["effort"]["max"], rel=1e-4)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"concept": "nobody"}, "concept"),
        ({"type": "magic"}, "type"),
        ({"grid": []}, "grid"),
        ({"grid": [1.0] * 33}, "grid"),
        ({"grid": [1.0, "2"]}, "grid[1]"),
        ({"grid": [1.0, 1e39]}, "grid[1]"),
        ({"type": "ablate", "grid": [0.5, 1.5]}, "grid[1]"),
        ({"prompts": None}, "prompts"),
        ({"prompts": []}, "prompts"),
        ({"prompts": ["a"] * 65}, "prompts"),
        ({"prompts": ["a", 1]}, "prompts[1]"),
        ({"prompts": ["a", "the cat " * 2500]}, "prompts[1]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"judge": "nobody"}, "judge"),
        ({"apply": {"prompt": "none", "generation": "none"}}, "apply"),
        ({"apply": {"prompt": "some"}}, "apply.prompt"),
        ({"lambda": 1}, "lambda"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_a_bad_sweep_names_its_field(http: httpx.Client, change: dict[str, Any], param: str) -> None:
    assert error(http.post("/v1/steering/sweep", json={**SWEEP, **change}), 400)["param"] == param


def test_what_a_sweep_needs_is_not_deleted(http: httpx.Client, plant: Plant, store: Path) -> None:
    replace(Store(store).load("happy"), name="swept").save(store)
    many = {**SWEEP, "grid": [1.0] * 32, "prompts": ["the cat"] * 64, "max_tokens": 512}
    ids = [started(http, "sweep", many), started(http, "sweep", {**many, "concept": "swept"})]
    assert http.get(f"/v1/steering/jobs/{ids[1]}").json()["state"] == "queued"
    address = "/v1/steering/artifacts/swept"
    assert "in use by a job" in error(http.delete(address), 409)["message"]
    assert http.delete(f"/v1/steering/jobs/{ids[0]}").status_code == 202
    when(http, ids[1], lambda job: job["state"] == "running")
    assert "in use by a job" in error(http.delete(address), 409)["message"]
    assert http.delete(f"/v1/steering/jobs/{ids[1]}").status_code == 202
    assert over(http, ids[1])["state"] == "cancelled"
    assert http.delete(address).status_code == 200


def test_a_cancelled_sweep_frees_its_places(http: httpx.Client, plant: Plant, store: Path) -> None:
    id_ = started(http, "sweep", {**SWEEP, "grid": [1.0] * 32, "prompts": ["the cat"] * 64, "max_tokens": 1024})
    when(http, id_, lambda job: job["state"] == "running")
    http.delete(f"/v1/steering/jobs/{id_}")
    assert over(http, id_)["state"] == "cancelled"
    assert http.post("/v1/completions", json={"prompt": "the cat", "max_tokens": 1}).status_code == 200


# The queue itself


def held(name: str = "x", writes: str | None = None) -> tuple[Task, threading.Event, threading.Event]:
    """A task that begins, then waits to be let go or to be cancelled."""
    begun, release = threading.Event(), threading.Event()

    def work(job: Job) -> Done:
        begun.set()
        while not release.wait(0.005):
            job.report("waiting", 0.5)
        return Done(name, {"ok": True})

    return Task("fit", name, work, writes), begun, release


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    made = Jobs()
    yield made
    made.close()


def ended(job: Job) -> Job:
    deadline = time.monotonic() + 10
    while not job.is_over and time.monotonic() < deadline:
        time.sleep(0.002)
    assert job.is_over
    return job


def test_one_at_a_time_in_order_and_no_more_than_fit(jobs: Jobs) -> None:
    ends: list[tuple[str, str, float]] = []
    jobs.on_finished.append(lambda kind, state, seconds: ends.append((kind, state, seconds)))
    task, begun, release = held()
    first = jobs.submit(task)
    assert begun.wait(5)
    waiting = [jobs.submit(Task("sweep", str(i), lambda job: Done())) for i in range(WAITING)]
    with pytest.raises(ApiError) as refused:
        jobs.submit(task)
    assert (refused.value.status, refused.value.code) == (429, "jobs_full")
    assert int(refused.value.headers["Retry-After"]) > 0
    assert jobs.counts() == {"queued": WAITING, "running": 1, "succeeded": 0, "failed": 0, "cancelled": 0}
    assert jobs.cancel(waiting[3].id).state == "cancelled"
    release.set()
    ended(waiting[-1])
    assert jobs.counts() == {"queued": 0, "running": 0, "succeeded": WAITING, "failed": 0, "cancelled": 1}
    assert (first.done.artifact, first.to_json()["result"]) == ("x", {"ok": True})
    starts = [job.started for job in (first, *waiting) if job.started is not None]
    assert starts == sorted(starts)
    assert len(starts) == WAITING
    assert ends[0] == ("sweep", "cancelled", 0.0)
    assert ends[1][:2] == ("fit", "succeeded")
    assert ends[1][2] > 0


def test_one_writer_an_artifact(jobs: Jobs) -> None:
    task, begun, release = held(writes="glad")
    first = jobs.submit(task)
    assert begun.wait(5)
    for _ in range(2):  # against the one that runs, and against one that waits
        with pytest.raises(ApiError) as refused:
            jobs.submit(replace(task))
        assert (refused.value.status, refused.value.param) == (409, "name")
        jobs.submit(held(writes="other")[0]) if len(jobs.all()) == 1 else None
        with pytest.raises(ApiError):
            jobs.submit(held(writes="other")[0])
    release.set()
    ended(first)
    jobs.submit(held(writes="glad")[0])


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (SpecError("positive[2]", expected="a text"), "invalid_value", "positive[2]: expected a text."),
        (RuntimeError("/secret/path"), "internal_error", "RuntimeError"),
        (torch.OutOfMemoryError("CUDA"), "out_of_memory", "memory"),
        (MemoryError(), "out_of_memory", "memory"),
    ],
    ids=["spec", "defect", "device", "host"],
)
def test_a_failure_is_told_and_ends_its_job_alone(jobs: Jobs, raised: Exception, code: str, words: str) -> None:
    def fails(job: Job) -> Done:
        job.report("half", 0.5)
        raise raised

    failed, after = jobs.submit(Task("fit", "x", fails)), jobs.submit(Task("fit", "y", lambda job: Done("y")))
    told = ended(failed).to_json()
    assert (told["state"], told["stage"], told["progress"], told["artifact"]) == ("failed", "half", 0.5, None)
    assert told["error"]["code"] == code
    assert words in told["error"]["message"]
    assert "secret" not in told["error"]["message"]
    assert ended(after).state == "succeeded"


def test_watchers_see_the_present_then_every_change(jobs: Jobs) -> None:
    step = threading.Event()

    def work(job: Job) -> Done:
        for part in range(1, 4):
            assert step.wait(5)
            step.clear()
            job.report("counting", part / 4)
            job.report("counting", part / 4 + 1e-4)  # too little to tell
        assert step.wait(5)
        return Done()

    async def watch(id_: str) -> list[tuple[str, float]]:
        found = []
        async for document in jobs.watch(id_):
            found.append((document["state"], document["progress"]))
            step.set()
        return found

    job = jobs.submit(Task("fit", "x", work))
    while job.state != "running":
        time.sleep(0.001)
    found = asyncio.run(watch(job.id))
    assert found == [("running", 0.0), ("running", 0.25), ("running", 0.5), ("running", 0.75), ("succeeded", 1.0)]
    assert not job.watchers
    assert asyncio.run(watch(job.id)) == [("succeeded", 1.0)]


def test_a_watcher_whose_loop_is_gone_harms_nobody(jobs: Jobs) -> None:
    task, begun, release = held()
    job = jobs.submit(task)
    assert begun.wait(5)

    async def glance() -> None:
        watching = jobs.watch(job.id)
        await anext(watching)
        job.watchers.append(job.watchers[0])  # as one whose generator was never closed

    asyncio.run(glance())
    assert job.watchers
    release.set()
    assert ended(job).state == "succeeded"


def test_the_memory_of_jobs_is_bounded_and_holds_no_examples(jobs: Jobs) -> None:
    last = None
    for _ in range(KEPT + 10):
        last = ended(jobs.submit(Task("fit", "x", lambda job: Done("x"))))
    assert len(jobs.all()) == KEPT
    assert jobs.all()[-1] is last
    assert jobs.counts()["succeeded"] == KEPT + 10
    with pytest.raises(AssertionError):
        jobs.all()[0].task.work(jobs.all()[0])


def test_a_closing_server_cancels_its_jobs(plant: Plant, store: Path) -> None:
    engine = Engine(plant, EngineSettings(max_batch=1))
    engine.start()
    service = Service(ServerSettings(drain_seconds=5), Host(plant, engine, Store(store), "tiny"))
    task, begun, _ = held()
    running, waiting = service.jobs.submit(task), service.jobs.submit(held()[0])
    assert begun.wait(5)

    async def scenario() -> None:
        await service.drain()
        assert ended(running).state == ended(waiting).state == "cancelled"
        with pytest.raises(ApiError) as refused:
            service.jobs.submit(task)
        assert refused.value.status == 503
        await service.close()

    began = time.monotonic()
    asyncio.run(scenario())
    assert time.monotonic() - began < 4
    assert not any(thread.name == "setpoint-jobs" and thread.is_alive() for thread in _threads_of(service))


def _threads_of(service: Service) -> list[threading.Thread]:
    worker = service.jobs._worker
    return [] if worker is None else [worker]


# Giving way


def test_a_pace_rests_in_proportion_to_its_work_and_only_while_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, rests = [0.0], []
    monkeypatch.setattr("server.background.time.thread_time", lambda: clock[0])

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            rests.append(timeout)
            return self.is_set()

    stop, busy = Stop(), [True]
    pace = Pace(lambda: busy[0], stop)
    pace()
    clock[0] += PIECE_SECONDS / 2
    pace()
    assert rests == []
    clock[0] += PIECE_SECONDS
    pace()
    assert rests == [pytest.approx(1.5 * PIECE_SECONDS * (1 / SHARE - 1))]
    busy[0] = False
    clock[0] += 1.0
    pace()
    assert len(rests) == 1
    busy[0] = True
    clock[0] += 100.0
    pace()
    assert rests[-1] is not None
    assert rests[-1] <= 2.0
    stop.set()
    with pytest.raises(Cancelled):
        pace()


def test_a_worker_steps_back_alone() -> None:
    """Its own priority and number of threads; those of other threads, present and to come, stay."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found: dict[str, int] = {}

        def worker() -> None:
            step_back()
            found["worker"] = torch.get_num_threads()
            import os

            found["nice"] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

        def later() -> None:
            found["later"] = torch.get_num_threads()

        for one in (worker, later):
            thread = threading.Thread(target=one)
            thread.start()
            thread.join()
        import os

        own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        assert (found["worker"], found["later"], torch.get_num_threads()) == (1, 3, 3)
        assert found["nice"] == min(own + NICE, 19)
    finally:
        torch.set_num_threads(before)


def test_nothing_in_a_result_is_nan(http: httpx.Client) -> None:
    listed = http.get("/v1/steering/jobs").json()["data"]

    def walk(node: Any) -> None:
        if isinstance(node, dict | list):
            for value in node.values() if isinstance(node, dict) else node:
                walk(value)
        assert not isinstance(node, float) or math.isfinite(node)

    walk(listed)


def test_examples_may_be_longer_than_a_prompt(http: httpx.Client) -> None:
    rows = [*["the cat is good " * 40] * 1000, ""]
    body = {"name": "long", "positive": rows, "negative": rows}
    assert len(json.dumps(body)) > 400_000
    assert error(http.post("/v1/steering/fit", json=body), 400)["param"] == "positive[1000]"
    assert http.post("/v1/steering/sweep", json=body).status_code == 413
