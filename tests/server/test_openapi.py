"""The published contract. After a change that is meant, refresh the snapshot:

SETPOINT_REFRESH_GOLDENS=1 python -m pytest tests/server/test_openapi.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from server.app import create_app
from server.settings import ServerSettings

GOLDEN = Path(__file__).parents[1] / "goldens" / "openapi.json"


def document() -> dict[str, Any]:
    found: dict[str, Any] = create_app(ServerSettings(), loads=False).openapi()
    found["info"]["version"] = "0"
    return found


def test_openapi_is_the_snapshot() -> None:
    text = json.dumps(document(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    if os.environ.get("SETPOINT_REFRESH_GOLDENS"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(text, encoding="utf-8")
    assert json.loads(text) == json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_every_reference_resolves() -> None:
    found = document()
    names = set(found["components"]["schemas"])

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if "$ref" in node:
                assert node["$ref"].removeprefix("#/components/schemas/") in names
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(found)
    assert set(found["paths"]) >= {
        "/v1/chat/completions", "/v1/completions", "/v1/generate", "/v1/models", "/v1/models/{model}", "/tokenize",
        "/detokenize", "/version", "/health/live", "/health/ready", "/v1/steering/types", "/v1/steering/artifacts",
        "/v1/steering/artifacts/{name}", "/v1/steering/trace",
    }  # fmt: skip


def test_generating_routes_document_their_bodies() -> None:
    paths = document()["paths"]
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/generate", "/v1/steering/trace"):
        assert paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
