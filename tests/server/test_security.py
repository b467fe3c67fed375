"""Who may call what, what a stranger can send, and what an answer or a log gives away."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

import server.access
from server.access import Access, writes
from server.app import create_app
from server.middleware import JsonLines
from server.schema.errors import ApiError
from server.settings import ServerSettings
from steering import Plant, SteeringError
from tests.server.conftest import serving
from tests.server.wire import CHAT, error

API, ADMIN = "api-key-of-the-test", "admin-key-of-the-test"
READING_POSTS = {
    "/v1/chat/completions", "/v1/completions", "/v1/generate", "/tokenize", "/detokenize", "/v1/steering/trace",
    "/v1/capture", "/v1/analyze/{name}",
}  # fmt: skip
OPEN = {"/health", "/health/live", "/health/ready"}


def operations() -> list[tuple[str, str]]:
    """Every method and address that the application describes."""
    paths: dict[str, Any] = create_app(ServerSettings(), loads=False).openapi()["paths"]
    return [(method.upper(), path) for path, item in sorted(paths.items()) for method in item]


WRITING = [(m, p) for m, p in operations() if m != "GET" and p not in READING_POSTS]


@cache
def without_model(settings: ServerSettings) -> TestClient:
    """A server that has not loaded its model: 401 and 403 come before 503, 415 and whatever else follows."""
    return TestClient(create_app(settings, loads=False))


def status(settings: ServerSettings, method: str, path: str, key: str | None) -> int:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return without_model(settings).request(method, path.replace("{", "").replace("}", ""), headers=headers).status_code


def test_there_are_calls_that_write() -> None:
    assert {path for _, path in WRITING} >= {"/v1/steering/fit", "/v1/steering/sweep", "/v1/steering/jobs/{id}"}


@pytest.mark.parametrize(("method", "path"), WRITING, ids=str)
def test_every_call_that_writes_needs_the_admin_key(method: str, path: str) -> None:
    both = ServerSettings(api_key=API, admin_key=ADMIN)
    assert status(both, method, path, None) == 401
    assert status(both, method, path, "wrong") == 401
    assert status(both, method, path, API) == 403
    assert status(both, method, path, ADMIN) not in (401, 403)
    assert status(ServerSettings(api_key=API), method, path, None) == 401
    assert status(ServerSettings(api_key=API), method, path, API) not in (401, 403)
    assert status(ServerSettings(admin_key=ADMIN), method, path, None) == 401
    assert status(ServerSettings(admin_key=ADMIN), method, path, ADMIN) not in (401, 403)
    assert status(ServerSettings(), method, path, None) not in (401, 403)


@pytest.mark.parametrize(("method", "path"), sorted({*operations()} - {*WRITING}), ids=str)
def test_every_call_that_reads_takes_either_key(method: str, path: str) -> None:
    both = ServerSettings(api_key=API, admin_key=ADMIN)
    closed = 401 if path not in OPEN else status(ServerSettings(), method, path, None)
    assert status(both, method, path, None) == closed
    assert status(both, method, path, "wrong") == closed
    for key in (API, ADMIN):
        assert status(both, method, path, key) not in (401, 403)
    assert status(ServerSettings(admin_key=ADMIN), method, path, None) not in (401, 403)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/steering/anything-new"),
        ("PUT", "/v1/chat/completions"),
        ("DELETE", "/v1/models/x"),
        ("PATCH", "/v1/generate"),
        ("POST", "/v1/chat/completions/"),
        ("POST", "/v1/analyze/a/b"),
        ("POST", "/v1/capture/../steering/fit"),
        ("POST", "/V1/CAPTURE"),
        ("BREW", "/version"),
    ],
    ids=str,
)
def test_what_is_not_known_to_read_counts_as_writing(method: str, path: str) -> None:
    assert writes(method, path)


def test_a_refusal_says_which_key_and_how() -> None:
    settings = ServerSettings(api_key=API, admin_key=ADMIN)
    with TestClient(create_app(settings, loads=False)) as client:
        missing = client.post("/v1/steering/fit")
        found = error(missing, 401)
        assert (found["type"], found["code"]) == ("authentication_error", "invalid_api_key")
        assert "admin key" in found["message"]
        assert missing.headers["www-authenticate"] == "Bearer"
        assert "API key" in error(client.get("/v1/models"), 401)["message"]
        lesser = client.post("/v1/steering/fit", headers={"Authorization": f"Bearer {API}"})
        found = error(lesser, 403)
        assert (found["type"], found["code"]) == ("permission_error", "admin_key_required")


@pytest.mark.parametrize(
    "given",
    [
        [],
        [f"Bearer {API}x"],
        [f"Bearer {API[:-1]}"],
        [f"Bearer {API.upper()}"],
        [API],
        [f"Basic {API}"],
        ["Bearer"],
        ["Bearer "],
        [f"Bearer {API}", "Bearer other"],
        [f"Bearer {API}", f"Bearer {API}"],
        [f"Bearer {API},"],
    ],
    ids=str,
)
def test_only_the_key_itself_is_the_key(given: list[str]) -> None:
    headers = [(b"authorization", value.encode()) for value in given]
    with pytest.raises(ApiError) as refused:
        Access(API).check("GET", "/v1/models", headers)
    assert refused.value.status == 401
    Access(API).check("GET", "/v1/models", [(b"authorization", f"bearer  {API}".encode())])


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is given, digests of one length go into the comparison that does not stop early."""
    seen: list[tuple[int, int]] = []
    honest = server.access.hmac.compare_digest

    def watched(a: bytes, b: bytes) -> bool:
        seen.append((len(a), len(b)))
        return honest(a, b)

    monkeypatch.setattr(server.access.hmac, "compare_digest", watched)
    for token in ("", "a", "a" * 1000, API, ADMIN):
        seen.clear()
        with suppress(ApiError):
            Access(API, ADMIN).check("GET", "/v1/models", [(b"authorization", f"Bearer {token}".encode())])
        assert seen == [(32, 32), (32, 32)]


def test_health_needs_no_key_and_takes_head_and_options() -> None:
    with TestClient(create_app(ServerSettings(api_key=API), loads=False)) as client:
        for path, expected in (("/health/live", 200), ("/health", 503), ("/health/ready", 503)):
            assert client.get(path).status_code == expected
            head = client.head(path)
            assert head.status_code == expected
            options = client.options(path)
            assert (options.status_code, options.headers["allow"]) == (204, "GET, HEAD, OPTIONS")
        assert client.get("/health/other").status_code == 401
        assert client.get("/metrics").status_code == 401


def test_another_sites_page_may_not_call(client: httpx.Client) -> None:
    """A browser asks first, and is told no; what it may send without asking is not JSON."""
    origin = {"Origin": "https://evil.example"}
    asking = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    for path in ("/v1/chat/completions", "/v1/steering/fit", "/v1/steering/default", "/nothing", "/metrics"):
        found = client.options(path, headers=asking)
        assert error(found, 405)["code"] == "method_not_allowed"
    answers = [found, client.get("/v1/models", headers=origin), client.options("/health", headers=asking)]
    for answer in answers:
        assert not [name for name in answer.headers if name.startswith("access-control")]
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        body = json.dumps({"prompt": "a"}).encode()
        sent = client.post("/v1/completions", content=body, headers={**origin, "Content-Type": kind})
        error(sent, 415)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.com."])
def test_a_name_that_someone_else_points_here_is_refused(host: str) -> None:
    """DNS rebinding: to a browser the page and the server are one origin, but the name is still the page's."""
    with TestClient(create_app(ServerSettings(), loads=False)) as local:
        assert error(local.get("/v1/models", headers={"Host": host}), 403)["code"] == "host_not_allowed"
        assert local.get("/health/live", headers={"Host": host}).status_code == 200
    for settings in (ServerSettings(api_key=API), ServerSettings(insecure=True)):
        with TestClient(create_app(settings, loads=False), headers={"Authorization": f"Bearer {API}"}) as named:
            assert named.get("/v1/models", headers={"Host": host}).status_code == 503


@pytest.mark.parametrize(
    "host", ["localhost:8000", "127.0.0.1", "[::1]:8000", "[fe80::1]", "LOCALHOST", "box", "box.local", "10.0.0.7:80"]
)
def test_names_of_this_machine_are_not(host: str) -> None:
    Access(local_only=True).check("GET", "/v1/models", [(b"host", host.encode())])


def test_keys_are_in_no_log_and_no_description(caplog: pytest.LogCaptureFixture) -> None:
    settings = ServerSettings(api_key=API, admin_key=ADMIN)
    assert API not in repr(settings)
    assert ADMIN not in repr(settings)
    assert API not in repr(Access(API, ADMIN))
    with caplog.at_level(logging.DEBUG), TestClient(create_app(settings, loads=False)) as client:
        for key in (API, ADMIN, "wrong-key"):
            client.get(f"/v1/models?api_key={key}", headers={"Authorization": f"Bearer {key}"})
    ours = [r for r in caplog.records if r.name.startswith("setpoint")]
    said = "\n".join(JsonLines().format(record) for record in ours)
    assert said
    for key in (API, ADMIN, "wrong-key"):
        assert key not in said


def test_a_log_line_is_one_line_of_ascii(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing that a client chooses can end a line, steer a terminal or grow without bound."""
    app = create_app(ServerSettings(), loads=False)
    with caplog.at_level(logging.INFO, logger="setpoint.request"), TestClient(app) as client:
        client.get("/a%0d%0a{%22level%22:%22fake%22}%1b[2J%c2%9b2J%E2%80%A8" + "x" * 5000)
        client.request("B" * 500, "/v1/models", headers={"X-Request-Id": 'a"b'})
    lines = [JsonLines().format(r) for r in caplog.records if r.name == "setpoint.request"]
    assert len(lines) == 2
    for line in lines:
        assert line.isascii()
        assert line.isprintable()
        assert len(line) < 1500
        assert json.loads(line)["status"] in (404, 405)


def test_names_never_become_paths(client: httpx.Client) -> None:
    for name in ("..%2f..%2fetc%2fpasswd", "%2e%2e", "..%5c..%5cx", "%2fetc%2fpasswd", "a%00b", "~root", "C:"):
        response = client.get(f"/v1/steering/artifacts/{name}")
        assert response.status_code == 404
        assert "/" not in error(response, 404)["message"].replace("/openapi.json", "")
    traversal = {"targets": {"../../etc/passwd": 1}}
    found = error(client.post("/v1/completions", json={"prompt": "a", "steering": traversal}), 400)
    assert "No such file" not in found["message"]


def test_a_body_that_is_too_long_is_not_read(client: httpx.Client) -> None:
    error(client.post("/v1/completions", json={"prompt": "a" * 200_000}), 413)

    def endless() -> Iterator[bytes]:
        for _ in range(1000):
            yield b"x" * 1000

    sent = client.post("/v1/completions", content=endless(), headers={"Content-Type": "application/json"})
    error(sent, 413)


@pytest.fixture(scope="module")
def impatient(plant: Plant, folder: Path) -> Iterator[tuple[str, int]]:
    """A server that waits for a body for a fifth of a second."""
    with serving(plant, folder, ServerSettings(body_seconds=0.2)) as address:
        url = httpx.URL(address)
        assert url.port
        yield url.host, url.port


def test_a_body_that_does_not_come_is_given_up(impatient: tuple[str, int]) -> None:
    """A thousand such clients cost a thousand sockets for as long as `body_seconds`, and no thread."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
    with socket.create_connection(impatient, timeout=10) as slow:
        slow.sendall(head)
        answer = b""
        while piece := slow.recv(4096):  # ends because the server closes
            answer += piece
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_timeout"


def test_a_pause_after_the_body_is_no_pause_in_it(impatient: tuple[str, int]) -> None:
    body = {"prompt": "the cat", "max_tokens": 600, "ignore_eos": True, "stream": True}
    began = time.monotonic()
    with httpx.Client(base_url=f"http://{impatient[0]}:{impatient[1]}", timeout=60) as client:
        response = client.post("/v1/completions", json=body)
    assert response.text.endswith("data: [DONE]\n\n")
    assert '"finish_reason":"length"' in response.text
    assert time.monotonic() - began > 0.2  # else this showed nothing


@pytest.mark.parametrize(
    "raw",
    [
        b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 5\r\n"
        b"Transfer-Encoding: chunked\r\n\r\ne\r\n" + b'{"prompt":"a"}' + b"\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100,
        b"GET /\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}{}{}",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    ],
    ids=["two framings", "huge header", "TLS", "no version", "two lengths", "negative length"],
)
def test_what_is_no_http_ends_its_connection_alone(impatient: tuple[str, int], raw: bytes) -> None:
    """Refused once, and what comes after it over the same connection is not taken for another request."""
    answer = b""
    with socket.create_connection(impatient, timeout=10) as odd, suppress(ConnectionError):
        odd.sendall(raw + b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n")
        while piece := odd.recv(4096):  # ends because the server closes
            answer += piece
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert answer.count(b"HTTP/1.1 ") <= 1
    assert httpx.get(f"http://{impatient[0]}:{impatient[1]}/health").status_code == 200


def test_a_checkpoints_code_is_never_run(model_folder: Path, tmp_path: Path) -> None:
    evil, ran = tmp_path / "evil", tmp_path / "ran"
    shutil.copytree(model_folder, evil)
    (evil / "code.py").write_text(f"open({str(ran)!r}, 'w')\nfrom transformers import LlamaConfig as Evil\n")
    config = json.loads((evil / "config.json").read_text())
    brought = {"AutoConfig": "code.Evil", "AutoModelForCausalLM": "code.Evil", "AutoTokenizer": ["code.Evil", None]}
    for model_type in ("evil", config["model_type"]):
        (evil / "config.json").write_text(json.dumps({**config, "model_type": model_type, "auto_map": brought}))
        with suppress(SteeringError):
            Plant.load(str(evil), device="cpu")
        assert not ran.exists()


def test_an_answer_never_tells_a_path_or_a_trace(client: httpx.Client) -> None:
    bodies: list[dict[str, Any]] = [
        {"messages": CHAT, "steering": {"targets": {"broken": 1}}},
        {"messages": CHAT, "steering": {"targets": {"foreign": 1}}},
        {"messages": CHAT, "steering": {"targets": {"x" * 50_000: 1}}},
        {"messages": CHAT, "steering": {"y" * 50_000: 1}},
        {"messages": CHAT, "model": "z" * 50_000},
        {"messages": CHAT, "temperature": "w" * 50_000},
    ]
    for body in bodies:
        response = client.post("/v1/chat/completions", json=body)
        assert 400 <= response.status_code < 500
        found = error(response, response.status_code)
        assert "/tmp" not in found["message"]
        assert len(found["message"]) < 600
