"""Names resolve to one file, built-in ones are protected, damage is left out, another model's concept is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steering.artifact import Artifact, machine, read_header
from steering.errors import ArtifactCorrupt, ArtifactError, ArtifactNotFound, SpecError, StaleFingerprint
from steering.store import Shelf, Store
from tests.toy import MODEL, toy

TONE = toy().resident().tone


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Built in: polite and tone. Own: mine."""
    builtin = tmp_path / "builtin"
    for name in ("polite", "tone"):
        replace(TONE, name=name).artifact().save(builtin)
    store = Store(tmp_path / "own", builtin)
    store.save(replace(TONE, name="mine").artifact())
    return store


def shelf(store: Store, *, model: str = MODEL, depth: int = 4, width: int = 6) -> Shelf:
    return Shelf(store, model=model, depth=depth, width=width)


def listed(store: Store) -> dict[str, bool]:
    return {entry.name: entry.builtin for entry in store.entries()}


def test_listing(store: Store) -> None:
    assert list(listed(store).items()) == [("mine", False), ("polite", True), ("tone", True)]
    (entry, *_) = store.entries()
    assert (entry.kind, entry.model, entry.quality) == ("concept", MODEL, {"auroc": [0.5]})
    assert entry.fingerprint == TONE.artifact().fingerprint
    assert entry.created == store.load("mine").created


def test_a_new_artifact_must_not_hide_a_built_in_one(store: Store) -> None:
    store.require_own("mine")
    store.require_own("new")
    with pytest.raises(ArtifactError, match="no built-in artifact") as caught:
        store.require_own("tone")
    assert (caught.value.status, caught.value.param) == (409, "name")
    assert (store.is_builtin("tone"), store.is_builtin("mine")) == (True, False)
    with pytest.raises(SpecError):
        store.require_own("../tone")


def test_a_quality_that_is_no_object_is_listed_as_none(store: Store) -> None:
    own = TONE.artifact()
    store.save(replace(own, name="odd", body={**own.body, "quality": "high"}))
    assert next(entry.quality for entry in store.entries() if entry.name == "odd") == {}


def test_a_store_without_folders_is_empty(tmp_path: Path) -> None:
    assert Store(tmp_path / "absent").entries() == []
    with pytest.raises(ArtifactNotFound):
        Store(tmp_path / "absent").load("x")


def test_an_own_artifact_hides_a_built_in_one_until_it_is_removed(store: Store) -> None:
    own = replace(TONE, name="tone", layers=(2, 3)).artifact()
    store.save(own)
    assert listed(store)["tone"] is False
    assert store.load("tone").fingerprint == own.fingerprint
    store.remove("tone")
    assert listed(store)["tone"] is True
    assert store.load("tone").body["layers"] == [1, 2, 3]


def test_a_built_in_artifact_cannot_be_removed(store: Store) -> None:
    with pytest.raises(ArtifactError, match="ships with the model") as caught:
        store.remove("polite")
    assert (caught.value.status, caught.value.param) == (409, "name")
    assert "polite" in listed(store)


def test_removing(store: Store) -> None:
    store.remove("mine")
    assert "mine" not in listed(store)
    with pytest.raises(ArtifactNotFound) as caught:
        store.remove("mine")
    assert caught.value.status == 404


@pytest.mark.parametrize("name", ["../own/mine", "/etc/passwd", ".partial-1", "", "own/mine"])
def test_a_path_is_not_a_name(store: Store, name: str) -> None:
    for call in (store.path, store.load, store.remove):
        with pytest.raises(SpecError) as caught:
            call(name)
        assert caught.value.param == "name"


def test_damaged_files_are_left_out(store: Store) -> None:
    (store.folder / "mine.safetensors").write_bytes(b"damaged")
    (store.folder / ".partial-1").write_bytes(b"half")
    (store.folder / "Strange Name.safetensors").write_bytes((store.folder / "mine.safetensors").read_bytes())
    (store.folder / "notes.txt").write_text("no artifact")
    assert set(listed(store)) == {"polite", "tone"}
    with pytest.raises(ArtifactCorrupt):
        store.load("mine")


def test_a_file_whose_name_is_impossible_is_left_out(store: Store) -> None:
    whole = (store.folder / "mine.safetensors").read_bytes()
    (store.folder / "Strange Name.safetensors").write_bytes(whole)
    assert set(listed(store)) == {"mine", "polite", "tone"}


def test_the_listing_does_not_show_what_a_damaged_file_hides(store: Store) -> None:
    (store.folder / "tone.safetensors").write_bytes(b"damaged")
    assert "tone" not in listed(store)
    with pytest.raises(ArtifactCorrupt):
        store.load("tone")


def test_a_shelf_gives_the_concepts_of_its_model(store: Store) -> None:
    bench = shelf(store)
    assert bench.concept("tone").layers == (1, 2, 3)
    assert bench.concept("tone") is bench.concept("tone")


def test_an_unknown_concept_is_a_wrong_field_and_the_known_ones_are_named(store: Store) -> None:
    store.save(replace(TONE, name="foreign", model="sha256:00").artifact())
    store.save(Artifact("plan", "plan", MODEL, {}))
    for name in ("absent", "../own/mine", ""):
        with pytest.raises(SpecError, match=r"\(mine, polite, tone\)") as caught:
            shelf(store).concept(name)
        assert caught.value.param == "concept"
        assert caught.value.status == 400
    with pytest.raises(SpecError, match="none"):
        shelf(Store(store.folder / "absent")).concept("absent")


def test_among_many_the_nearest_few_are_named_and_few_are_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(400):
        (store.folder / f"other-{index}.safetensors").write_bytes(b"")
    for name in ("cheerful", "cheerfuly", "cheerless"):
        store.save(replace(TONE, name=name).artifact())
    store.save(replace(TONE, name="cheerfull", model="sha256:" + "0" * 64).artifact())
    opened = list[Path]()

    def read(path: Path) -> dict[str, Any]:
        opened.append(path)
        return read_header(path)

    monkeypatch.setattr("steering.store.read_header", read)
    with pytest.raises(SpecError) as caught:
        shelf(store).concept("cheerfulx")
    assert "(nearest: cheerful, cheerfuly, cheerless; 407 artifacts in all)" in caught.value.message
    assert len(opened) <= 16
    for name in ("nothing-like-any-of-them", "../" * 100_000):
        with pytest.raises(SpecError, match="nearest: none; 407 artifacts in all"):
            shelf(store).concept(name)


def test_a_concept_of_another_model_is_stale(store: Store) -> None:
    with pytest.raises(StaleFingerprint, match="fitted on model sha256:abab") as caught:
        shelf(store, model="sha256:00").concept("tone")
    assert (caught.value.status, caught.value.param) == (409, "concept")


@pytest.mark.parametrize("size", [{"depth": 5}, {"width": 7}])
def test_a_concept_of_other_dimensions_is_stale(store: Store, size: dict[str, int]) -> None:
    with pytest.raises(StaleFingerprint, match="has 4 layers of width 6, the model has"):
        shelf(store, **size).concept("tone")


def test_a_plan_is_not_a_concept(store: Store) -> None:
    store.save(Artifact("plan", "plan", MODEL, {}))
    with pytest.raises(SpecError, match="expected a concept, got 'plan'; that artifact is of kind 'plan'") as caught:
        shelf(store).concept("plan")
    assert caught.value.param == "concept"


def test_a_shelf_sees_a_new_version_even_within_one_tick(store: Store) -> None:
    bench = shelf(store)
    path = store.path("mine")
    assert bench.concept("mine").quality == {"auroc": [0.5]}
    before = path.stat()
    store.save(replace(TONE, name="mine", quality={"auroc": [0.7]}).artifact())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert bench.concept("mine").quality == {"auroc": [0.7]}
    store.remove("mine")
    with pytest.raises(SpecError):
        bench.concept("mine")


def test_a_shelf_does_not_grow_without_end(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steering.store.KEPT", 2)
    bench = shelf(store)
    first = bench.concept("mine")
    for name in ("polite", "tone"):
        assert bench.concept(name) is bench.concept(name)
    again = bench.concept("mine")
    assert again is not first
    assert torch.equal(again.direction, first.direction)
    assert len(bench._loaded) == 2


def test_another_models_sizes_are_told(store: Store) -> None:
    with pytest.raises(StaleFingerprint, match=r"of 4 layers of width 6, this is sha256:00… of 5 layers of width 7"):
        shelf(store, model="sha256:00", depth=5, width=7).concept("tone")


def test_what_a_killed_writer_left_is_swept(store: Store) -> None:
    """Of processes that are no more, and of this one, which has not begun to write; not of one that lives, nor, for a
    day, of another machine."""
    program = [sys.executable, "-c", "import os; print(os.getpid())"]
    dead = subprocess.run(program, capture_output=True, text=True, check=True)
    presets = store.folder / "presets"
    presets.mkdir()
    for folder in (store.folder, presets):
        for owner in (dead.stdout.strip(), str(os.getpid()), str(os.getppid())):
            (folder / f".partial-{machine()}-{owner}-x").write_bytes(b"half")
    elsewhere = store.folder / f".partial-elsewhere-{os.getpid()}-x"
    elsewhere.write_bytes(b"half")
    (store.folder / ".partial-old").write_bytes(b"half")
    os.utime(store.folder / ".partial-old", (0, 0))
    assert len(store.sweep()) == 5
    kept = [elsewhere.name, *[f".partial-{machine()}-{os.getppid()}-x"] * 2]
    assert sorted(path.name for path in store.folder.rglob(".partial-*")) == sorted(kept)
    assert "mine" in listed(store)
    assert Store(store.folder / "absent").sweep() == []
