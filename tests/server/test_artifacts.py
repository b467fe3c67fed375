"""The store over HTTP: what is downloaded can be uploaded, and nothing becomes visible that was not verified."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from server.settings import ServerSettings
from steering import Artifact, Concept, Plant, Store
from steering.formats.gguf import Target, exported, imported, read_vectors
from tests.formats.test_gguf import vectors, write
from tests.server.conftest import serving
from tests.server.wire import error

ARTIFACTS = "/v1/steering/artifacts"
LIMIT = 200_000


@pytest.fixture
def store(folder: Path, tmp_path: Path) -> Store:
    """A store of this test's own: happy and what else `folder` has; built in: kind."""
    builtin, own = tmp_path / "builtin", tmp_path / "store"
    shutil.copytree(folder, own)
    replace(Store(folder).load("happy"), name="kind").save(builtin)
    return Store(own, builtin)


@pytest.fixture
def http(plant: Plant, store: Store) -> Iterator[httpx.Client]:
    settings = ServerSettings(upload_limit=LIMIT)
    with serving(plant, store.folder, settings, store.builtin) as address, httpx.Client(base_url=address) as client:
        yield client


def put(http: httpx.Client, name: str, content: bytes, kind: str = "application/octet-stream") -> httpx.Response:
    return http.put(f"{ARTIFACTS}/{name}/content", content=content, headers={"Content-Type": kind})


def cvector(plant: Plant, tmp_path: Path, *blocks: int, width: int | None = None, hint: str = "llama") -> bytes:
    path = write(tmp_path / "in.gguf", vectors(*blocks, width=width or plant.width), hint)
    return path.read_bytes()


def listed(http: httpx.Client) -> dict[str, dict[str, object]]:
    return {one["name"]: one for one in http.get(ARTIFACTS).json()["data"]}


def test_what_is_downloaded_can_be_uploaded(http: httpx.Client, store: Store) -> None:
    one = http.get(f"{ARTIFACTS}/happy/content")
    assert one.headers["content-type"] == "application/octet-stream"
    assert one.headers["content-disposition"] == 'attachment; filename="happy.safetensors"'
    fingerprint = store.load("happy").fingerprint
    assert one.headers["etag"] == f'"{fingerprint}"'
    assert one.content == store.path("happy").read_bytes()
    fresh = put(http, "copy", one.content)
    assert fresh.status_code == 201, fresh.text
    assert (fresh.json()["name"], fresh.json()["fingerprint"], fresh.json()["usable"]) == ("copy", fingerprint, True)
    assert put(http, "copy", one.content).status_code == 200
    assert listed(http)["copy"]["fingerprint"] == fingerprint
    body = {"prompt": "the cat", "max_tokens": 2, "steering": {"targets": {"copy": 1.0}}}
    assert http.post("/v1/completions", json=body).json()["steering"]["tracking"]["copy"]["setpoint"] == 1.0


def test_a_known_version_is_not_sent_again(http: httpx.Client) -> None:
    tag = http.get(f"{ARTIFACTS}/happy/content").headers["etag"]
    for known in (tag, f'"other", W/{tag}', "*"):
        again = http.get(f"{ARTIFACTS}/happy/content", headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert http.get(f"{ARTIFACTS}/happy/content", headers={"If-None-Match": '"other"'}).status_code == 200
    assert http.get(f"{ARTIFACTS}/happy/content?format=gguf").headers["etag"] != tag


def test_a_control_vector_becomes_a_concept_and_comes_back(
    http: httpx.Client, plant: Plant, store: Store, tmp_path: Path
) -> None:
    content = cvector(plant, tmp_path, 1, 2)
    made = put(http, "joy", content)
    assert made.status_code == 201, made.text
    assert made.json()["provenance"]["imported"]["format"] == "gguf"
    concept = Concept.from_artifact(store.load("joy"))
    assert (concept.model, concept.layers, concept.default_gains) == (plant.fingerprint, (1, 2), "identity")
    back = http.get(f"{ARTIFACTS}/joy/content", params={"format": "gguf"})
    assert back.headers["content-disposition"] == 'attachment; filename="joy.gguf"'
    (tmp_path / "back.gguf").write_bytes(back.content)
    given, found = (read_vectors(tmp_path / name).vectors for name in ("in.gguf", "back.gguf"))
    assert all(torch.equal(given[block], found[block]) for block in (1, 2))
    for one in ({"type": "lqr", "setpoint": 1.0}, {"type": "add"}):
        body = {"prompt": "the cat", "max_tokens": 2, "steering": {"interventions": [{**one, "concept": "joy"}]}}
        answer = http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["steering"]["tokens_steered"] == 2


def test_a_fitted_concept_is_exported(http: httpx.Client, plant: Plant, store: Store) -> None:
    content = http.get(f"{ARTIFACTS}/happy/content?format=gguf").content
    assert content == exported(store.load("happy"), "llama")
    assert put(http, "again", content).json()["tensors"]["vectors"]["shape"] == [plant.depth - 1, plant.width]
    assert "architecture" in error(http.get(f"{ARTIFACTS}/foreign/content?format=gguf"), 409)["message"]
    assert error(http.get(f"{ARTIFACTS}/happy/content?format=pickle"), 400)["param"] == "format"
    assert http.get(f"{ARTIFACTS}/foreign/content").status_code == 200
    assert error(http.get(f"{ARTIFACTS}/broken/content"), 409)["code"] == "artifact_corrupt"
    assert error(http.get(f"{ARTIFACTS}/nobody/content"), 404)["code"] == "artifact_not_found"


def test_listings_tell_which_are_usable(http: httpx.Client) -> None:
    found = listed(http)
    assert {name: found[name]["usable"] for name in ("happy", "kind", "foreign")} == {
        "happy": True, "kind": True, "foreign": False,
    }  # fmt: skip
    assert http.get(f"{ARTIFACTS}/foreign").json()["usable"] is False


def forged(store: Store, tmp_path: Path, change: Callable[[Concept], Concept]) -> bytes:
    concept = change(Concept.from_artifact(store.load("happy")))
    return concept.artifact().save(tmp_path).read_bytes()


def test_a_file_of_another_model_is_refused_with_both_sides(
    http: httpx.Client, plant: Plant, store: Store, tmp_path: Path
) -> None:
    before = set(listed(http))
    other = error(put(http, "x", store.path("foreign").read_bytes()), 409)
    assert other["code"] == "artifact_model_mismatch"
    assert "0000000" in other["message"]
    assert plant.fingerprint[:19] in other["message"]

    def wider(concept: Concept) -> Concept:
        wide = {name: torch.cat([gain, gain], 1) for name, gain in concept.gains.items()}
        unit = torch.cat([concept.direction, 0 * concept.direction], 1)
        return replace(concept, direction=unit, gains=wide)

    sizes = error(put(http, "x", forged(store, tmp_path, wider)), 409)["message"]
    assert f"3 layers of width {2 * plant.width}, the model has 3 of width {plant.width}" in sizes
    for content, said in (
        (cvector(plant, tmp_path, 1, width=16), f"width 16, this model has {plant.width}"),
        (cvector(plant, tmp_path, 1, 3), "block 3, this model has 2"),
        (cvector(plant, tmp_path, 1, hint="qwen2"), "'qwen2', this model has 'llama'"),
    ):
        assert said in error(put(http, "x", content), 409)["message"]
    assert set(listed(http)) == before


def test_a_damaged_file_is_refused_and_never_seen(
    http: httpx.Client, store: Store, plant: Plant, tmp_path: Path
) -> None:
    whole = store.path("happy").read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    plan = Artifact("p", "plan", plant.fingerprint, {"v": torch.zeros(2)}).save(tmp_path).read_bytes()
    bad = [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", bytes(flipped), whole[:-1], whole + b"x", plan, b"GGUF", b"{}" * 99]
    bad += [b"GGUF" + bytes(200), (2**63).to_bytes(8, "little") + b"{}"]
    before = set(listed(http))
    for content in bad:
        told = error(put(http, "x", content), 400)
        assert told["code"] == "artifact_corrupt"
        assert ".partial" not in told["message"]
    assert set(listed(http)) == before
    assert not list(store.folder.glob(".partial-*"))


def test_limits_and_types(http: httpx.Client, store: Store) -> None:
    whole = store.path("happy").read_bytes()
    assert error(put(http, "x", bytes(LIMIT + 1)), 413)["code"] == "body_too_large"

    def pieces() -> Iterator[bytes]:
        for _ in range(30):
            yield bytes(10_000)

    address = f"{ARTIFACTS}/x/content"
    assert error(http.put(address, content=pieces()), 413)["code"] == "body_too_large"
    for kind in (
        "application/json",
        "multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded",
        "text/plain",
    ):
        assert error(put(http, "x", whole, kind), 415)["code"] == "unsupported_media_type"
    assert http.put(address, content=whole).status_code == 201
    for name in ("No", "a..b", "-x", "x" * 65):
        assert error(put(http, name, whole), 400)["param"] == "name"
    assert not list(store.folder.glob(".partial-*"))


def test_an_upload_that_breaks_off_leaves_nothing(http: httpx.Client, store: Store) -> None:
    def pieces() -> Iterator[bytes]:
        yield bytes(2_000)
        raise ConnectionAbortedError

    with pytest.raises(ConnectionAbortedError):
        http.put(f"{ARTIFACTS}/x/content", content=pieces())
    deadline = time.monotonic() + 10
    while list(store.folder.glob(".partial-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not list(store.folder.glob(".partial-*"))
    assert "x" not in listed(http)


def test_a_reader_sees_an_old_file_or_a_new_one_whole(http: httpx.Client, store: Store) -> None:
    """Downloads while two versions replace each other by turns: each is one of them, under its own tag."""
    versions = {store.load(name).fingerprint: store.path(name).read_bytes() for name in ("happy", "animal")}
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for content in versions.values():
                put(http, "x", content)

    put(http, "x", versions[next(iter(versions))])
    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(25):
            one = http.get(f"{ARTIFACTS}/x/content")
            assert one.status_code == 200, one.text
            header = json.loads(one.content[8 : 8 + int.from_bytes(one.content[:8], "little")])
            own = json.loads(header["__metadata__"]["setpoint"])
            assert f'"{own["content"]}"' == one.headers["etag"]
            assert own["content"] in versions
    finally:
        stop.set()
        writer.join()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_what_is_deleted_while_it_is_read_is_not_there(
    http: httpx.Client, store: Store, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    honest = Artifact.load

    def racing(path: Path) -> Artifact:
        if moment == "before":
            path.unlink()
        found = honest(path)
        path.unlink(missing_ok=True)
        return found

    for name, address in (("happy", ""), ("animal", "/content")):
        with monkeypatch.context() as during:
            during.setattr(Artifact, "load", racing)
            answer = http.get(f"{ARTIFACTS}/{name}{address}")
        assert error(answer, 404)["code"] == "artifact_not_found"


def test_deleting(http: httpx.Client, store: Store) -> None:
    address = f"{ARTIFACTS}/animal"
    http.put("/v1/steering/presets/zoo", json={"interventions": [{"type": "ablate", "concept": "animal"}]})
    condition = {"concept": "animal", "layer": 1, "above": 0.0}
    http.put("/v1/steering/default", json={"targets": {"happy": {"setpoint": 1.0, "when": condition}}})
    assert "preset 'zoo', the server's default" in error(http.delete(address), 409)["message"]
    assert http.delete("/v1/steering/presets/zoo").status_code == 200
    assert "the server's default" in error(http.delete(address), 409)["message"]
    assert http.delete("/v1/steering/default").status_code == 200
    assert http.delete(address).json() == {"object": "steering.artifact", "name": "animal", "deleted": True}
    assert error(http.delete(address), 404)["code"] == "artifact_not_found"
    assert error(http.delete(f"{ARTIFACTS}/a..b"), 404)["code"] == "artifact_not_found"
    assert "ships with the model" in error(http.delete(f"{ARTIFACTS}/kind"), 409)["message"]
    assert error(put(http, "kind", store.path("happy").read_bytes()), 409)["param"] == "name"
    assert http.delete(f"{ARTIFACTS}/broken").status_code == 200


def test_what_a_running_request_uses_is_not_deleted(http: httpx.Client) -> None:
    body = {"prompt": "the cat", "max_tokens": 4000, "ignore_eos": True, "steering": {"targets": {"happy": 1.0}}}
    with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
        lines = stream.iter_lines()  # held, for the response is closed with it
        assert next(lines)
        assert "running request" in error(http.delete(f"{ARTIFACTS}/happy"), 409)["message"]
    deadline = time.monotonic() + 10
    while (answer := http.delete(f"{ARTIFACTS}/happy")).status_code == 409 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert answer.status_code == 200


def test_the_target_of_an_import_is_the_served_model(plant: Plant, tmp_path: Path) -> None:
    target = Target.of(plant)
    assert (target.depth, target.width, target.architecture) == (plant.depth, plant.width, "llama")
    (tmp_path / "in.gguf").write_bytes(cvector(plant, tmp_path, 1))
    assert imported(read_vectors(tmp_path / "in.gguf"), "joy", target).model == plant.fingerprint
