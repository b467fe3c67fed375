"""Reading what the server sends."""

from __future__ import annotations

import json
from typing import Any

import httpx

CHAT = [{"role": "user", "content": "the cat sat on the mat"}]


def events(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The documents of a stream, after checking its framing: `data: JSON`, blank line, …, `data: [DONE]`."""
    response = client.post(path, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = response.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames[:-1])
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response, after checking the envelope."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    assert len(response.text) < 1500
    found: dict[str, Any] = body["error"]
    return found
