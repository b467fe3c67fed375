from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.app import create_app
from server.host import READERS
from server.settings import ServerSettings
from steering import Plant
from tests.server.conftest import serving
from tests.server.wire import error

LONG: dict[str, Any] = {"prompt": "the cat", "max_tokens": 4000, "ignore_eos": True, "seed": 1}


@pytest.fixture(scope="module")
def narrow(plant: Plant, folder: Path) -> Any:
    """A server with one place, one waiting place and a key."""
    with serving(plant, folder, ServerSettings(api_key="secret"), max_batch=1, queue_limit=1) as address:
        headers = {"Authorization": "Bearer secret"}
        with httpx.Client(base_url=address, headers=headers, timeout=30) as http:
            yield http


def quick(client: httpx.Client) -> httpx.Response:
    return client.post("/v1/completions", json={"prompt": "the cat", "max_tokens": 1})


def served_within(client: httpx.Client, seconds: float) -> bool:
    """Whether a place is free before `seconds` have passed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if quick(client).status_code == 200:
            return True
        time.sleep(0.02)
    return False


def test_key_is_required_except_for_health(narrow: httpx.Client) -> None:
    with httpx.Client(base_url=narrow.base_url) as stranger:
        for path in ("/health", "/health/live", "/health/ready"):
            assert stranger.get(path).status_code == 200
        found = error(stranger.get("/v1/models"), 401)
        assert (found["type"], found["code"]) == ("authentication_error", "invalid_api_key")
        for wrong in ("Bearer", "Bearer secre", "Bearer secret2", "secret", "Bearer Secret"):
            error(stranger.post("/v1/completions", json={}, headers={"Authorization": wrong}), 401)
    assert narrow.get("/v1/models").status_code == 200


def test_client_that_leaves_a_stream_frees_its_place(narrow: httpx.Client) -> None:
    with narrow.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
        next(response.iter_lines())
    assert served_within(narrow, 2)


def test_client_that_leaves_a_plain_request_frees_its_place(narrow: httpx.Client) -> None:
    with pytest.raises(httpx.ReadTimeout):
        narrow.post("/v1/completions", json=LONG, timeout=0.3)
    assert served_within(narrow, 2)


def test_full_queue_is_a_429(narrow: httpx.Client) -> None:
    with (
        narrow.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as running,
        narrow.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as waiting,
    ):
        assert (running.status_code, waiting.status_code) == (200, 200)
        refused = quick(narrow)
        assert error(refused, 429)["code"] == "queue_full"
        assert refused.headers["retry-after"] == "1"
    assert served_within(narrow, 2)


def test_what_can_never_fit_is_a_400(narrow: httpx.Client) -> None:
    body = {"prompt": ["a"] * 3, "max_tokens": 1}
    found = error(narrow.post("/v1/completions", json=body), 400)
    assert found["param"] == "n"
    assert "at most 2 choices" in found["message"]


@pytest.mark.parametrize("begun", [False, True])
def test_a_failure_is_answered_unless_the_answer_has_begun(begun: bool) -> None:
    """httpx's transport raises what the application raises: a 500 here means that the connection lives on."""
    import asyncio

    from server.middleware import Gate

    async def fails(scope: Any, receive: Any, send: Any) -> None:
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("secret detail")

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(Gate(fails)), base_url="http://x") as http:
            return await http.get("/", headers={"X-Request-Id": "abc"})

    if begun:
        with pytest.raises(RuntimeError):
            asyncio.run(ask())
        return
    response = asyncio.run(ask())
    assert error(response, 500)["code"] == "internal_error"
    assert response.headers["x-request-id"] == "abc"
    assert "secret" not in response.text


def test_request_id_comes_back(client: httpx.Client) -> None:
    assert client.get("/version", headers={"X-Request-Id": "abc-1.2"}).headers["x-request-id"] == "abc-1.2"
    assert client.get("/nothing", headers={"X-Request-Id": "abc"}).headers["x-request-id"] == "abc"
    assert client.get("/version", headers={"X-Request-Id": "no spaces"}).headers["x-request-id"].startswith("req-")


def test_health_and_version(client: httpx.Client) -> None:
    assert client.get("/health/live").json() == {"status": "live"}
    for path in ("/health", "/health/ready"):
        response = client.get(path)
        assert (response.status_code, response.json()) == (200, {"status": "ready"})
    assert client.get("/version").json()["version"].count(".") == 2


def test_models(client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()
    assert [m["id"] for m in listed["data"]] == ["tiny"]
    assert listed["data"][0]["max_model_len"] == 4096
    assert client.get("/v1/models/tiny").json() == listed["data"][0]


def test_tokenize_and_back(client: httpx.Client) -> None:
    there = client.post("/tokenize", json={"prompt": "the cat sat", "return_token_strs": True}).json()
    assert there["count"] == len(there["tokens"]) == 4
    assert there["token_strs"] == ["<s>", "the", "cat", "sat"]
    bare = client.post("/tokenize", json={"prompt": "the cat sat", "add_special_tokens": False}).json()
    assert bare["tokens"] == there["tokens"][1:]
    assert client.post("/detokenize", json={"tokens": bare["tokens"]}).json() == {"prompt": "the cat sat"}
    chat = client.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()
    assert chat["count"] == 5
    closed = client.post(
        "/tokenize", json={"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": False}
    ).json()
    assert closed["tokens"] == chat["tokens"][:-1]
    assert error(client.post("/detokenize", json={"tokens": [64]}), 400)["param"] == "tokens"
    assert error(client.post("/tokenize", json={}), 400)["param"] == "prompt"


def test_loading_server_answers_with_503() -> None:
    """Before the model is there the process is alive, not ready, and refuses to generate."""
    from starlette.testclient import TestClient

    app = create_app(ServerSettings(), loads=False)
    with TestClient(app) as early:
        assert early.get("/health/live").status_code == 200
        assert early.get("/health/ready").status_code == 503
        found = early.post("/v1/completions", json={"prompt": "a"})
        assert found.status_code == 503
        assert found.json()["error"]["code"] == "loading"


def test_draining_ends_what_runs_with_an_error_frame(plant: Plant, folder: Path) -> None:
    import asyncio

    from server.generation import Generation
    from server.host import Host, Service
    from server.pieces import pieces
    from server.schema.errors import ApiError
    from steering import Engine, EngineSettings, Request, Sampling, Store

    engine = Engine(plant, EngineSettings(max_batch=2))
    engine.start()
    service = Service(ServerSettings(drain_seconds=0.3), Host(plant, engine, Store(folder), "tiny"))
    endings: dict[str, str | None] = {}

    def told() -> bytes:
        return service.metrics.exposition("")[0]

    async def consume(name: str, generation: Generation) -> None:
        try:
            async for piece in pieces(generation):
                endings[name] = getattr(getattr(piece, "finished", None), "reason", None)
        except ApiError as error:
            endings[name] = error.code
        finally:
            generation.close()

    async def scenario() -> None:
        tasks = [
            asyncio.create_task(
                consume(name, service.generate([Request(name, (1, 8), Sampling(max_tokens=size, ignore_eos=True))]))
            )
            for name, size in (("short", 3), ("long", 4000))
        ]
        await asyncio.sleep(0.01)
        assert b"\nsetpoint_ready 1.0\n" in told()
        await service.drain()
        assert service.state == "draining"
        assert b"\nsetpoint_ready 0.0\n" in told()
        with pytest.raises(ApiError) as refused:
            service.ready_host()
        assert refused.value.status == 503
        await asyncio.gather(*tasks)
        await service.close()

    asyncio.run(scenario())
    assert endings == {"short": "length", "long": "aborted"}


def test_one_log_line_a_request(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    import logging

    from server.middleware import JsonLines

    with caplog.at_level(logging.INFO, logger="setpoint.request"):
        client.post("/v1/completions", json={"prompt": "the cat", "max_tokens": 1}, headers={"X-Request-Id": "line"})
        for _ in range(100):
            lines = [json.loads(JsonLines().format(r)) for r in caplog.records if r.name == "setpoint.request"]
            if lines:
                break
            time.sleep(0.01)
    (line,) = [found for found in lines if found["request_id"] == "line"]
    assert (line["status"], line["path"], line["prompt_tokens"], line["steered"]) == (200, "/v1/completions", 3, False)


def test_no_thread_is_left_by_a_closed_server(plant: Plant, folder: Path) -> None:
    count = sum(t.name == "setpoint-engine" for t in threading.enumerate())
    with serving(plant, folder, ServerSettings()):
        pass
    assert sum(t.name == "setpoint-engine" for t in threading.enumerate()) == count


THREADS = 40
"""How many anyio has, on which everything runs that takes long."""


class Held:
    """Stands in for a function that takes long: it is over when `over` is set."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.calls = 0
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            self.calls += 1
        self.over.wait()
        return {}


@contextmanager
def asking(address: httpx.URL, path: str, body: dict[str, Any], times: int) -> Iterator[list[int]]:
    """So many clients that ask for the same thing at once; the statuses they got, when the block has ended."""
    statuses: list[int] = []

    def ask() -> None:
        with httpx.Client(base_url=address, timeout=60) as one:
            statuses.append(one.post(path, json=body).status_code)

    clients = [threading.Thread(target=ask) for _ in range(times)]
    for client in clients:
        client.start()
    yield statuses
    for client in clients:
        client.join()


def test_health_is_told_while_every_thread_is_taken(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held()
    monkeypatch.setattr("server.routes.models._tokenized", held)
    with asking(client.base_url, "/tokenize", {"prompt": "a"}, THREADS + 1) as statuses:
        while held.calls < THREADS:
            time.sleep(0.01)
        try:
            for path in ("/health/live", "/health/ready", "/v1/steering/jobs"):
                assert client.get(path, timeout=5).status_code == 200
        finally:
            held.over.set()
    assert statuses == [200] * (THREADS + 1)


@pytest.mark.parametrize(
    ("path", "body", "slow"),
    [
        ("/v1/capture", {"prompt": "a", "sites": ["final"]}, "server.routes.capture._captured"),
        ("/v1/steering/trace", {"prompt": "a", "concepts": ["happy"]}, "server.routes.steering._trace"),
    ],
    ids=["capture", "trace"],
)
def test_those_who_read_the_model_stand_in_line(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], slow: str
) -> None:
    """However many there are, others are served meanwhile; who leaves the line costs nothing more."""
    held = Held()
    monkeypatch.setattr(slow, held)
    with asking(client.base_url, path, body, THREADS + 1) as statuses:
        while held.calls < READERS:
            time.sleep(0.01)
        try:
            with pytest.raises(httpx.ReadTimeout):
                client.post(path, json=body, timeout=0.5)
            assert quick(client).status_code == 200
            assert held.calls == READERS
        finally:
            held.over.set()
    assert statuses == [200] * (THREADS + 1)
    assert held.calls == THREADS + 1


def test_the_twin_of_a_bound_on_kl_needs_a_second_place(narrow: httpx.Client) -> None:
    steering = {"targets": {"happy": 1.0}, "guard": {"max_kl": 0.1}}
    found = error(narrow.post("/v1/completions", json={"prompt": "a", "steering": steering}), 400)
    assert found["param"] == "steering.guard.max_kl"
    assert found["message"].startswith("steering.guard.max_kl: ")
