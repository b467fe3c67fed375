"""Saved steering objects: default, preset and request superpose, in that order and under the stricter bounds."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from server.presets import Presets
from server.schema.steering import Composition, Part, SteeringSpec
from server.settings import ServerSettings
from steering import ArtifactCorrupt, Guard, Plant, Shelf, SpecError, Store
from tests.server.conftest import serving
from tests.server.wire import CHAT, error, events

PRESETS, DEFAULT = "/v1/steering/presets", "/v1/steering/default"
HAPPY = {"targets": {"happy": 1.0}}
ANIMAL = {"interventions": [{"type": "clamp", "concept": "animal", "setpoint": 2.0}]}
PROMPT = {"prompt": "the cat sat on the", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def store(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("presets") / "store"
    shutil.copytree(folder, path)
    return path


@pytest.fixture(scope="module")
def address(plant: Plant, store: Path) -> Iterator[str]:
    with serving(plant, store, ServerSettings()) as running:
        yield running


@pytest.fixture
def http(address: str, store: Path) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=30) as client:
        yield client
    shutil.rmtree(store / "presets", ignore_errors=True)
    (store / "default.json").unlink(missing_ok=True)


@pytest.fixture
def shelf(plant: Plant, store: Path) -> Shelf:
    return Shelf(Store(store), model=plant.fingerprint, depth=plant.depth, width=plant.width)


def complete(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = http.post("/v1/completions", json={**PROMPT, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def steered(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = complete(http, **fields)["steering"]
    return found


def test_a_preset_is_kept_as_it_was_sent(http: httpx.Client, store: Path) -> None:
    sent = {"interventions": [{"strength": 0.5, "type": "lqr", "concept": "happy", "setpoint": 1}]}
    made = http.put(f"{PRESETS}/agent", json=sent)
    assert (made.status_code, made.json()) == (201, sent)
    assert http.get(f"{PRESETS}/agent").json() == sent
    assert http.put(f"{PRESETS}/agent", json=HAPPY).status_code == 200
    (one,) = http.get(PRESETS).json()["data"]
    assert (one["name"], one["model"], one["steering"]) == ("agent", "tiny:agent", HAPPY)
    assert json.loads((store / "presets" / "agent.json").read_text()) == HAPPY
    assert http.delete(f"{PRESETS}/agent").json()["deleted"] is True
    for call in (http.get, http.delete):
        for name in ("agent", "No..pe"):
            assert error(call(f"{PRESETS}/{name}"), 404)["code"] == "not_found"
    assert http.get(PRESETS).json() == {"object": "list", "data": []}


def test_a_preset_steers_as_the_same_object_in_the_request(http: httpx.Client) -> None:
    http.put(f"{PRESETS}/agent", json=HAPPY)
    own = complete(http, steering=HAPPY)
    for ways in (
        {"steering": {"preset": "agent"}},
        {"model": "tiny:agent"},
        {"model": "tiny:agent", "steering": {"preset": "agent"}},
        {"model": "tiny:agent", "steering": {}},
    ):
        answer = complete(http, **ways)
        assert answer["steering"] == own["steering"]
        assert answer["choices"][0]["text"] == own["choices"][0]["text"]
        assert answer["model"] == ways.get("model", "tiny")


def test_a_preset_is_a_model(http: httpx.Client, address: str) -> None:
    http.put(f"{PRESETS}/agent", json=HAPPY)
    listed = {one["id"]: one for one in http.get("/v1/models").json()["data"]}
    assert {name: (one["parent"], one["root"]) for name, one in listed.items()} == {
        "tiny": (None, "tiny"), "tiny:agent": ("tiny", "tiny"),
    }  # fmt: skip
    assert http.get("/v1/models/tiny:agent").json() == listed["tiny:agent"]
    assert http.post("/tokenize", json={"model": "tiny:agent", "prompt": "the cat"}).status_code == 200
    for name in ("tiny:nobody", "tiny:", "tiny:../agent", "other:agent"):
        assert error(http.post("/v1/completions", json={**PROMPT, "model": name}), 404)["param"] == "model"
        assert error(http.get(f"/v1/models/{name}"), 404)["code"] == "model_not_found"
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    answer = client.chat.completions.create(model="tiny:agent", messages=CHAT, max_tokens=3)  # type: ignore[arg-type]
    assert answer.model == "tiny:agent"
    assert answer.model_extra is not None
    assert set(answer.model_extra["steering"]["tracking"]) == {"happy"}


def test_default_preset_and_request_superpose(http: httpx.Client) -> None:
    assert "steering" not in complete(http)
    assert http.put(DEFAULT, json=HAPPY).status_code == 201
    assert http.get(DEFAULT).json() == HAPPY
    http.put(f"{PRESETS}/zoo", json=ANIMAL)
    alone = steered(http)
    assert set(alone["tracking"]) == {"happy"}
    assert alone["fingerprint"] == steered(http, steering={**HAPPY, "default": "replace"})["fingerprint"]
    assert set(steered(http, model="tiny:zoo")["tracking"]) == {"happy", "animal"}
    both = steered(http, steering={"preset": "zoo", "targets": {"happy": 3.0}})
    plain = {"default": "replace", "interventions": [
        {"type": "lqr", "concept": "happy", "setpoint": 1.0}, *ANIMAL["interventions"],
        {"type": "lqr", "concept": "happy", "setpoint": 3.0},
    ]}  # fmt: skip
    assert both["fingerprint"] == steered(http, steering=plain)["fingerprint"]
    assert set(steered(http, steering={"default": "replace", "preset": "zoo"})["tracking"]) == {"animal"}
    assert steered(http, steering={"default": "replace"})["tokens_steered"] == 0
    http.put(f"{PRESETS}/bare", json={**ANIMAL, "default": "replace"})
    assert set(steered(http, model="tiny:bare")["tracking"]) == {"animal"}
    assert http.delete(DEFAULT).json() == {"object": "steering.default", "deleted": True}
    assert "steering" not in complete(http)
    assert error(http.get(DEFAULT), 404)["code"] == error(http.delete(DEFAULT), 404)["code"] == "not_found"


def test_every_way_to_generate_is_steered_by_default_and_the_twin_is_not(http: httpx.Client) -> None:
    chat = {"messages": CHAT, "max_tokens": 6, "temperature": 0}
    unsteered = http.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"]
    http.put(DEFAULT, json={"targets": {"happy": 8.0}})
    chunks = events(http, "/v1/chat/completions", chat)
    assert chunks[-1]["choices"] == []
    assert set(chunks[-1]["steering"]["tracking"]) == {"happy"}
    twins = http.post("/v1/generate", json={**chat, "compare": True}).json()
    assert set(twins["steering"]["tracking"]) == {"happy"}
    assert twins["unsteered"]["text"] == unsteered
    off = {"default": "replace", "targets": {"happy": {"setpoint": 8.0, "strength": 0.0}}}
    assert http.post("/v1/generate", json={**chat, "steering": off}).json()["text"] == unsteered
    short = http.post("/v1/generate", json={**chat, "targets": {"animal": 1.0}}).json()
    assert set(short["steering"]["tracking"]) == {"happy", "animal"}


def test_the_trace_is_the_requests(http: httpx.Client) -> None:
    http.put(DEFAULT, json=HAPPY)
    assert "trace" not in steered(http)
    assert steered(http, steering={"trace": "tokens"})["trace"][0]["readings"]


def test_the_stricter_bound_of_each_wins(shelf: Shelf) -> None:
    def guard(*given: dict[str, float]) -> Guard:
        parts = [Part(SteeringSpec.model_validate({**HAPPY, "guard": one} if one else HAPPY)) for one in given]
        return Composition(tuple(parts)).program(shelf).guard

    assert guard({}, {}) == Guard()
    assert guard({"max_effort": 0.5}, {}, {"max_effort": 0.2}) == Guard(max_effort=0.2)
    assert guard({"max_effort": 0.1, "max_kl": 2.0}, {"max_effort": 0.2, "max_kl": 1.0}) == Guard(0.1, 1.0)
    assert guard({"max_kl": 0.0}, {"max_kl": 1.0}).max_kl == 0.0


def test_no_more_interventions_than_allowed_in_all(http: httpx.Client) -> None:
    many = {"interventions": [{"type": "add", "concept": "happy", "strength": 0.01}] * 6}
    http.put(DEFAULT, json=many)
    http.put(f"{PRESETS}/many", json=many)
    assert steered(http, steering={"preset": "many", "interventions": many["interventions"][:4]})
    crowded = {"preset": "many", "interventions": many["interventions"][:5]}
    told = error(http.post("/v1/completions", json={**PROMPT, "steering": crowded}), 400)
    assert told["param"] == "steering"
    assert "default and preset included, got 17" in told["message"]


@pytest.mark.parametrize(
    ("sent", "status", "param"),
    [
        ({"targets": {"nobody": 1.0}}, 400, "targets.nobody"),
        ({"targets": {"foreign": 1.0}}, 409, "targets.foreign"),
        ({"interventions": [{"type": "lqr", "concept": "nobody", "setpoint": 1}]}, 400, "interventions[0].concept"),
        ({"interventions": [{"type": "lqr", "concept": "happy"}]}, 400, "interventions[0].setpoint"),
        ({"interventions": [{"type": "lqr", "concept": "happy", "setpoint": 1, "layers": [9]}]}, 400,
         "interventions[0].layers"),
        ({"interventions": [{"type": "magic"}]}, 400, "interventions[0].type"),
        ({"interventions": [{"type": "add", "concept": "happy"}] * 17}, 400, "interventions"),
        ({"targets": {f"c{i}": 1.0 for i in range(9)}, "interventions": [{"type": "add", "concept": "happy"}] * 9},
         400, "interventions"),
        ({"steering": HAPPY}, 400, "steering"),
        ({"preset": "agent"}, 400, "preset"),
        ({"trace": "tokens"}, 400, "trace"),
        ({"guard": {"max_effort": -1}}, 400, "guard.max_effort"),
        ([], 400, None),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_saved(http: httpx.Client, sent: Any, status: int, param: str | None) -> None:
    for address in (f"{PRESETS}/agent", DEFAULT):
        told = error(http.put(address, json=sent), status)
        assert told["param"] == param
        assert param is None or told["message"].startswith(param) or status == 409
        assert error(http.get(address), 404)["code"] == "not_found"


def test_more_that_cannot_be_saved(http: httpx.Client) -> None:
    assert error(http.put(DEFAULT, json={"default": "replace"}), 400)["param"] == "default"
    assert error(http.put(f"{PRESETS}/No..pe", json=HAPPY), 400)["param"] == "name"
    assert error(http.put(f"{PRESETS}/x", content=b"{}"), 415)["code"] == "unsupported_media_type"
    headers = {"Content-Type": "application/json"}
    assert error(http.put(f"{PRESETS}/x", content=b"{", headers=headers), 400)["code"] == "invalid_json"
    assert error(http.put(f"{PRESETS}/x", content=b"{" + b" " * 2**20 + b"}", headers=headers), 413)


def test_a_request_that_asks_for_two_presets_or_an_unknown_one(http: httpx.Client) -> None:
    for name in ("one", "two"):
        http.put(f"{PRESETS}/{name}", json=HAPPY)
    told = error(http.post("/v1/completions", json={**PROMPT, "model": "tiny:one", "steering": {"preset": "two"}}), 400)
    assert told["param"] == "steering.preset"
    for name in ("nobody", "../one", ""):
        told = error(http.post("/v1/completions", json={**PROMPT, "steering": {"preset": name}}), 400)
        assert told["param"] == "steering.preset"
        assert "(one, two)" in told["message"]


def test_an_error_inside_a_saved_object_names_what_brought_it(http: httpx.Client, store: Path) -> None:
    """Its concept was deleted behind the server's back, and its positions miss a short prompt."""
    shutil.copy(store / "happy.safetensors", store / "brief.safetensors")
    saved = {"interventions": [{"type": "lqr", "concept": "brief", "setpoint": 1.0}]}
    http.put(f"{PRESETS}/agent", json=saved)
    http.put(DEFAULT, json={"targets": {"brief": 1.0}})
    (store / "brief.safetensors").unlink()
    told = error(
        http.post("/v1/completions", json={**PROMPT, "steering": {"preset": "agent", "default": "replace"}}), 400
    )
    assert told["param"] == "steering.preset"
    assert told["message"].startswith(
        "steering.preset: in preset 'agent', interventions[0].concept: expected a concept"
    )
    told = error(http.post("/v1/completions", json=PROMPT), 400)
    assert told["param"] == "steering.default"
    assert told["message"].startswith("steering.default: in the server's default, targets.brief: expected a concept")
    narrow = {"concept": "happy", "setpoint": 1.0, "apply": {"prompt": {"positions": [50]}, "generation": "none"}}
    http.put(DEFAULT, json={"interventions": [{"type": "lqr", **narrow}]})
    told = error(http.post("/v1/completions", json=PROMPT), 400)
    where = "steering.default: in the server's default, interventions[0].apply.prompt.positions: expected"
    assert told["message"].startswith(where)


def test_a_damaged_file_is_told_and_never_served_unsteered(http: httpx.Client, store: Path) -> None:
    http.put(f"{PRESETS}/agent", json=HAPPY)
    http.put(DEFAULT, json=HAPPY)
    for damaged in (b"", b"{", b"[]", b'{"targets": {"happy": "x"}}', b'{"preset": "agent"}', b"[" * 100_000):
        (store / "presets" / "agent.json").write_bytes(damaged)
        (store / "default.json").write_bytes(damaged)
        asked = {**PROMPT, "steering": {"preset": "agent", "default": "replace"}}
        told = error(http.post("/v1/completions", json=asked), 409)
        assert (told["code"], told["param"]) == ("artifact_corrupt", "steering.preset")
        assert error(http.post("/v1/completions", json=PROMPT), 409)["code"] == "artifact_corrupt"
        assert error(http.get(DEFAULT), 409)["code"] == "artifact_corrupt"
        assert http.get(PRESETS).json()["data"] == []
    assert http.put(DEFAULT, json=HAPPY).status_code == 200
    assert steered(http)["tokens_steered"]


def test_a_reader_sees_an_old_object_or_a_new_one_whole(tmp_path: Path, shelf: Shelf) -> None:
    presets = Presets(tmp_path)
    documents = [{"targets": {"happy": 1.0}}, {"interventions": [{"type": "add", "concept": "happy"}] * 16}]
    specs = [SteeringSpec.model_validate_json(json.dumps(one), strict=True) for one in documents]
    presets.put_default(documents[0], specs[0], shelf)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for document, spec in zip(documents, specs, strict=True):
                presets.put_default(document, spec, shelf)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(300):
            assert json.loads((tmp_path / "default.json").read_text()) in documents
            assert presets.default() in specs
    finally:
        stop.set()
        writer.join()
    assert [path.name for path in tmp_path.iterdir()] == ["default.json"]


def test_a_write_that_is_refused_changes_nothing(tmp_path: Path, shelf: Shelf) -> None:
    presets = Presets(tmp_path)
    presets.put("a", HAPPY, SteeringSpec.model_validate(HAPPY), shelf)
    wrong = {"targets": {"nobody": 1.0}}
    with pytest.raises(SpecError):
        presets.put("a", wrong, SteeringSpec.model_validate(wrong), shelf)
    found = presets.find("a")
    assert found is not None
    assert found.document == HAPPY
    assert presets.users("happy") == ["preset 'a'"]
    assert presets.users("nobody") == []
    (tmp_path / "presets" / "a.json").write_text("{")
    assert presets.users("happy") == []
    with pytest.raises(ArtifactCorrupt):
        presets.find("a")
