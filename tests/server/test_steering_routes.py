from __future__ import annotations

import threading
from pathlib import Path

import httpx
import pytest
import torch
from pydantic import TypeAdapter

import server.routes.steering
from server.host import describe
from steering import REGISTRY, Artifact, Store, summary
from steering.plan import PLANS
from tests.server.wire import error


def test_types_are_the_registry(client: httpx.Client) -> None:
    listed = {one["type"]: one for one in client.get("/v1/steering/types").json()["data"]}
    assert set(listed) == set(REGISTRY)
    for name, one in listed.items():
        assert one["plan_kind"] in (None, *PLANS)
        assert one["example"]["type"] == name
        assert TypeAdapter(REGISTRY[name]).validate_python(one["example"])
        assert one["summary"]
        assert "\n" not in one["summary"]
        assert one["schema"]["properties"]["type"]["const"] == name
        assert one["schema"]["additionalProperties"] is False
    assert (listed["linear_transport"]["plan_kind"], listed["lqr"]["plan_kind"]) == ("transport", None)
    assert listed["lqr"]["schema"]["required"] == ["concept", "setpoint"]
    assert listed["lqr"]["schema"]["properties"]["setpoint"]["description"]


def test_types_are_described_once_and_not_on_the_loop(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """To describe them takes long enough that every stream would wait for it."""
    threads: list[str] = []

    def watched(method: type) -> str:
        threads.append(threading.current_thread().name)
        return summary(method)

    monkeypatch.setattr(server.routes.steering, "summary", watched)
    server.routes.steering._types.cache_clear()
    for _ in range(3):
        assert client.get("/v1/steering/types").status_code == 200
    assert len(threads) == len(REGISTRY)
    assert all("AnyIO worker" in name for name in threads)


def test_artifacts(client: httpx.Client) -> None:
    listed = client.get("/v1/steering/artifacts").json()
    assert listed["object"] == "list"
    assert {"name", "kind", "fingerprint", "model", "created", "quality"} <= set(listed["data"][0])
    assert {"happy", "animal", "foreign"} <= {one["name"] for one in listed["data"]}
    one = client.get("/v1/steering/artifacts/happy").json()
    assert (one["name"], one["kind"]) == ("happy", "concept")
    assert one["tensors"]["direction"] == {"dtype": "float32", "shape": [4, 32]}
    assert error(client.get("/v1/steering/artifacts/nobody"), 404)["code"] == "artifact_not_found"
    assert error(client.get("/v1/steering/artifacts/No..pe"), 404)["code"] == "artifact_not_found"
    assert error(client.get("/v1/steering/artifacts/broken"), 409)["code"] == "artifact_corrupt"


def test_trace_is_what_the_laws_read(client: httpx.Client) -> None:
    """The first generated token is drawn at the last prompt token: its reading at a layer that nothing has moved yet is
    the projection that the trace of the prompt reports there."""
    traced = client.post("/v1/steering/trace", json={"prompt": "the cat sat", "concepts": ["happy", "animal"]}).json()
    assert [t["text"] for t in traced["tokens"]] == ["<s>", "the", "cat", "sat"]
    assert set(traced["concepts"]) == {"happy", "animal"}
    body = {
        "prompt": "the cat sat", "max_tokens": 1,
        "steering": {"interventions": [{"type": "lqr", "concept": "happy", "setpoint": 1.0}], "trace": "tokens"},
    }  # fmt: skip
    readings = client.post("/v1/completions", json=body).json()["steering"]["trace"][0]["readings"]
    first = min(readings, key=lambda one: one["layer"])
    assert first["projection"] == pytest.approx(
        traced["concepts"]["happy"]["projections"][-1][first["layer"]], abs=1e-4
    )
    raw, scaled = (traced["concepts"]["happy"][name] for name in ("raw", "projections"))
    assert raw[1][1] != scaled[1][1]
    absolute = client.post(
        "/v1/steering/trace", json={"prompt": "the cat sat", "concepts": ["happy"], "units": "absolute"}
    ).json()
    assert absolute["concepts"]["happy"]["projections"][1] == pytest.approx(raw[1])


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"concepts": ["happy"]}, 400, "prompt"),
        ({"prompt": "a", "concepts": []}, 400, "concepts"),
        ({"prompt": "a", "concepts": ["happy", "nobody"]}, 400, "concepts[1]"),
        ({"prompt": "a", "concepts": ["foreign"]}, 409, "concepts[0]"),
        ({"prompt": "a", "concepts": ["happy"], "units": "feet"}, 400, "units"),
        ({"prompt": "a", "concepts": ["happy"], "layer": 1}, 400, "layer"),
        ({"prompt": [99], "concepts": ["happy"]}, 400, "prompt"),
    ],
    ids=str,
)
def test_bad_traces(client: httpx.Client, body: dict[str, object], status: int, param: str) -> None:
    assert error(client.post("/v1/steering/trace", json=body), status)["param"] == param


def test_a_body_cannot_lie_about_its_artifact(tmp_path: Path) -> None:
    store = Store(tmp_path)
    claims = {"name": "other", "kind": "gold", "fingerprint": "sha256:0", "bytes": 0, "quality": "best", "skip": 1}
    store.save(Artifact("plain", "concept", "sha256:1", {"direction": torch.zeros(2)}, claims))
    found = describe(store, "plain")
    assert (found["name"], found["kind"], found["skip"], found["quality"]) == ("plain", "concept", 1, {})
    assert found["fingerprint"] != "sha256:0"
    assert found["bytes"] > 0
