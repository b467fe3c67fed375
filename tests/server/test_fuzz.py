"""What the published description allows, and what it forbids, sent to a real server: no answer is our failure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.transport import Response
from schemathesis.generation.modes import GenerationMode

from server.app import create_app
from server.settings import ServerSettings
from steering import Plant
from tests.server.conftest import serving
from tests.server.wire import error

CONTEXT = 48
"""So short that whatever is asked for ends soon."""
EXAMPLES = 24


@pytest.fixture(scope="module")
def running(plant: Plant, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of its own, with a store of its own: what is sent here may delete and save."""
    store: Path = tmp_path_factory.mktemp("fuzzed")
    with serving(plant, store, ServerSettings(body_limit=100_000), max_model_len=CONTEXT) as address:
        yield address


schema = schemathesis.openapi.from_dict(create_app(ServerSettings(), loads=False).openapi())
schema.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
schema.config.phases.coverage.enabled = False  # hundreds of bodies a route: minutes, where drawn ones take seconds


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_no_answer_is_a_failure(case: schemathesis.Case, running: str) -> None:
    response: Response = case.call(base_url=running, timeout=30)
    case.validate_response(response, checks=[not_a_server_error])
    assert response.status_code != 422
    if response.status_code >= 400 and case.method != "HEAD":
        found = response.json()["error"]
        assert set(found) == {"message", "type", "param", "code"}
        assert "Traceback" not in response.text
        assert len(response.text) < 2000


def test_the_server_still_serves(running: str) -> None:
    with httpx.Client(base_url=running, timeout=30) as client:
        assert client.get("/openapi.json").json() == schema.raw_schema  # what was sent is what it describes
        assert client.get("/health").status_code == 200
        assert client.post("/v1/completions", json={"prompt": "the cat", "max_tokens": 2}).status_code == 200
        error(client.post("/v1/completions", json={}), 400)
