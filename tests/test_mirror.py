"""A store that several machines share: what one writes the others read, whole, soon, and also while it cannot be asked.

Two `Mirror`s with folders of their own over one place are two replicas."""

from __future__ import annotations

import functools
import json
import logging
import os
import random
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steering import mirror
from steering.artifact import PARTIAL, machine
from steering.copies import INDEX
from steering.errors import ArtifactNotFound, SpecError, StoreUnreachable, StoreUnwritable
from steering.folder import Folder
from steering.mirror import Mirror, opened
from steering.remote import Remote
from steering.store import Shelf, Store
from tests.toy import MODEL, toy

TONE = toy().resident().tone


class Faulty:
    """A file system that fails, waits, or is cut off in the middle of a file when it is told to."""

    def __init__(self, files: Any) -> None:
        self.files = files
        self.fails: set[str] = set()
        self.waits: dict[str, threading.Event] = {}
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.files, name)
        if not callable(found):
            return found

        @functools.wraps(found)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            if name in self.waits:
                self.waits[name].wait()
            if name in self.fails or "all" in self.fails:
                raise ConnectionError("no route")
            return found(*args, **kwargs)

        return call

    @property
    def asked(self) -> int:
        """How often the place was listed or asked about a file."""
        return sum(name in ("find", "info") for name in self.calls)


class Place:
    """One place with its file system, and replicas over it."""

    def __init__(self, files: Any, root: str, folder: Path, *, renames: bool) -> None:
        self.files, self.root, self.folder, self.renames = Faulty(files), root, folder, renames

    def remote(self) -> Remote:
        return Remote(self.files, self.root, renames=self.renames)

    def replica(self, name: str, builtin: Path | None = None) -> Store:
        return Store(Mirror(self.remote(), self.folder / name, "shared://store"), builtin)


@pytest.fixture(params=["memory", "file"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "memory":
        files = fsspec.filesystem("memory")
        root = f"/{uuid.uuid4().hex}/store"
        yield Place(files, root, tmp_path / "mirrors", renames=False)
        if files.exists(root):
            files.rm(root, recursive=True)
    else:
        (tmp_path / "shared").mkdir()
        files = fsspec.filesystem("file", use_listings_cache=False)
        yield Place(files, str(tmp_path / "shared"), tmp_path / "mirrors", renames=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times a tenth of what they are."""
    for name in ("FRESH", "RETRY", "PATIENCE", "SENDING", "FIRST"):
        monkeypatch.setattr(mirror, name, {"FRESH": 0.1, "RETRY": 0.2, "FIRST": 20.0}.get(name, 1.0))


def later() -> None:
    """Until what was compared is compared again."""
    time.sleep(mirror.FRESH * 1.2)


def until(condition: Callable[[], object], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def shelf(store: Store) -> Shelf:
    return Shelf(store, model=MODEL, depth=4, width=6)


def tone(name: str, auroc: float = 0.5) -> Any:
    return replace(TONE, name=name, quality={"auroc": [auroc]}).artifact()


def names(store: Store) -> list[str]:
    return [entry.name for entry in store.entries()]


def test_what_one_replica_keeps_another_reads(place: Place) -> None:
    one, two = place.replica("one"), place.replica("two")
    assert names(one) == names(two) == []
    path = one.save(tone("mine"))
    assert path.parent == one.folder
    assert two.load("mine").fingerprint == one.load("mine").fingerprint  # by name at once, though it had just looked
    assert shelf(two).concept("mine").quality == {"auroc": [0.5]}
    later()
    assert names(two) == names(one) == ["mine"]
    assert one.shown("mine") == "shared://store/mine.safetensors"


def test_a_new_version_is_read_and_a_deleted_one_is_not(place: Place) -> None:
    one, two = place.replica("one"), place.replica("two")
    held = shelf(two)
    one.save(tone("mine"))
    assert held.concept("mine").quality == {"auroc": [0.5]}
    one.save(tone("mine", 0.75))
    later()
    assert held.concept("mine").quality == {"auroc": [0.75]}
    assert held.concept("mine") is held.concept("mine")
    two.save(tone("mine", 0.25))
    later()
    assert shelf(one).concept("mine").quality == {"auroc": [0.25]}
    one.remove("mine")
    later()
    with pytest.raises(SpecError):
        held.concept("mine")
    with pytest.raises(ArtifactNotFound):
        two.remove("mine")
    assert not (two.folder / "mine.safetensors").exists()


def test_a_place_with_a_pace_is_asked_less_often(place: Place) -> None:
    remote = place.remote()
    remote.pace = 100.0
    store = Store(Mirror(remote, place.folder / "slow", "shared://store"))
    store.save(tone("mine"))
    store.load("mine")
    asked = place.files.asked
    later()
    store.load("mine")
    assert place.files.asked == asked
    other = place.replica("two")
    other.save(tone("new"))
    assert store.load("new").name == "new"  # by name at once all the same
    assert Remote.of("memory://x").pace == 1.0


def test_a_built_in_name_is_no_miss(place: Place, tmp_path: Path) -> None:
    tone("kind").save(tmp_path / "builtin")
    store = place.replica("one", tmp_path / "builtin")
    store.load("kind")
    asked, began = place.files.asked, time.monotonic()
    for _ in range(40):
        store.load("kind")
    assert place.files.asked - asked <= 1 + (time.monotonic() - began) / (mirror.FRESH * mirror.AHEAD)


def test_reading_asks_the_place_once_in_a_while(place: Place) -> None:
    store = place.replica("one")
    store.save(tone("mine"))
    store.load("mine")
    asked, began = place.files.asked, time.monotonic()
    while time.monotonic() < began + 5 * mirror.FRESH:
        store.path("mine")
    assert 2 <= place.files.asked - asked <= 1 + (time.monotonic() - began) / (mirror.FRESH * mirror.AHEAD)
    assert place.files.calls.count("cat_file") == 1  # its own, once


def test_a_file_is_copied_once(place: Place) -> None:
    one = place.replica("one")
    for name in ("a", "b", "c"):
        one.save(tone(name))
    later()
    one.entries()
    later()
    before = place.files.calls.count("cat_file")
    one.entries()
    again = place.replica("one")  # the next process on this machine
    assert names(again) == ["a", "b", "c"]
    assert place.files.calls.count("cat_file") == before
    (one.folder / "b.safetensors").write_bytes(b"damaged")  # whoever did this, it is not what the place has
    assert names(place.replica("one")) == ["a", "b", "c"]
    assert place.files.calls.count("cat_file") == before + 1
    (one.folder / INDEX).write_text("{")
    assert names(place.replica("one")) == ["a", "b", "c"]


def test_what_is_no_file_of_a_store_never_becomes_one_here(place: Place) -> None:
    store = place.replica("one")
    store.save(tone("mine"))
    raw = place.files.cat_file(f"{place.root}/mine.safetensors")
    for key in (
        "Strange Name.safetensors",
        ".hidden.safetensors",
        "deep/mine.safetensors",
        "presets/x.safetensors",
        "a..b.safetensors",
        "notes.txt",
        "other.json",
        "presets/../x.json",
        "presets/NO.json",
    ):
        place.files.makedirs(f"{place.root}/{key}".rpartition("/")[0], exist_ok=True)
        place.files.pipe_file(f"{place.root}/{key}", raw)
    place.files.pipe_file(f"{place.root}2.safetensors", raw)  # a neighbour whose name begins alike
    place.files.pipe_file(f"{place.root}/default.json", b"{}")
    later()
    assert names(store) == ["mine"]
    here = {path.relative_to(store.folder).as_posix() for path in store.folder.rglob("*") if path.is_file()}
    assert here == {"mine.safetensors", "default.json", INDEX}


def test_a_file_that_is_too_large_is_not_copied(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.replica("one").save(tone("mine"))
    monkeypatch.setattr("steering.remote.MAX_BYTES", 100)
    with pytest.raises(ArtifactNotFound):
        place.replica("two").load("mine")


def test_large_files_are_streamed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steering.remote.WHOLE", 100)
    one = place.replica("one")
    one.save(tone("mine"))
    assert place.replica("two").load("mine").fingerprint == one.load("mine").fingerprint
    assert {"put_file", "get_file"} <= set(place.files.calls)
    assert "cat_file" not in place.files.calls


# ── a place that does not answer ─────────────────────────────────────────────────────────────────────────────────────


def test_reading_goes_on_from_the_copy(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    one, two = place.replica("one"), place.replica("two")
    one.save(tone("mine"))
    two.load("mine")
    place.files.fails.add("all")
    later()
    with caplog.at_level(logging.WARNING, "setpoint.store"):
        for _ in range(5):
            assert two.load("mine").name == "mine"
            assert names(two) == ["mine"]
    assert [record.message for record in caplog.records] == ["the store cannot be reached (ConnectionError: no route)"]
    assert not two.place.health.is_reachable
    assert two.place.health.failures >= 1
    place.files.fails.clear()
    one.save(tone("mine", 0.75))
    with caplog.at_level(logging.WARNING, "setpoint.store"):
        until(lambda: two.load("mine").body["quality"] == {"auroc": [0.75]})
        until(lambda: two.place.health.is_reachable)
    assert caplog.records[-1].message == "the store is reached again"


def test_that_it_answers_again_is_noticed_though_nobody_reads(place: Place) -> None:
    store = place.replica("one")
    store.entries()
    place.files.fails.add("all")
    later()
    store.entries()
    until(lambda: not store.place.health.is_reachable)
    place.files.fails.clear()
    until(lambda: store.place.health.is_reachable)


def test_a_place_that_failed_is_left_alone_for_a_while(place: Place) -> None:
    store = place.replica("one")
    store.save(tone("mine"))
    store.entries()
    later()
    place.files.fails.add("all")
    store.load("mine")
    until(lambda: not store.place.health.is_reachable)
    asked, began = place.files.asked, time.monotonic()
    while time.monotonic() < began + mirror.RETRY / 2:
        store.load("mine")
        with pytest.raises(ArtifactNotFound):
            store.load("absent")
    assert place.files.asked - asked <= 1


@pytest.mark.parametrize("call", ["find", "cat_file"])
def test_nobody_waits_for_long_for_a_place_that_hangs(place: Place, call: str) -> None:
    one, two = place.replica("one"), place.replica("two")
    one.save(tone("mine"))
    two.load("mine")
    one.save(tone("mine", 0.75))
    hang = place.files.waits.setdefault(call, threading.Event())
    later()
    began = time.monotonic()
    assert two.load("mine").body["quality"] == {"auroc": [0.5]}
    assert 0.9 * mirror.PATIENCE < time.monotonic() - began < 5 * mirror.PATIENCE
    began = time.monotonic()
    for _ in range(10):
        two.load("mine")
    assert time.monotonic() - began < 3 * mirror.PATIENCE
    assert not two.place.health.is_reachable
    hang.set()
    until(lambda: two.load("mine").body["quality"] == {"auroc": [0.75]})
    until(lambda: two.place.health.is_reachable)


def test_without_a_copy_it_is_told_and_never_taken_for_an_empty_store(place: Place) -> None:
    one = place.replica("one")
    one.save(tone("mine"))
    one.entries()
    place.files.fails.add("all")
    store = place.replica("two")
    for call in (store.entries, store.names, lambda: store.load("mine"), lambda: store.path("mine")):
        with pytest.raises(StoreUnreachable) as caught:
            call()
        assert (caught.value.status, caught.value.code) == (503, "store_unreachable")
    assert names(place.replica("one")) == ["mine"]  # the next process on a machine that has one


def test_who_has_only_written_has_no_copy(place: Place) -> None:
    place.replica("one").save(tone("mine"))
    two = place.replica("two")
    two.save(tone("own"))
    place.files.fails.add("all")
    for store in (two, place.replica("two")):
        with pytest.raises(StoreUnreachable):
            store.entries()


@pytest.mark.parametrize("call", ["pipe_file", "all"])
def test_a_write_that_is_not_taken_changes_nothing(place: Place, call: str) -> None:
    one, two = place.replica("one"), place.replica("two")
    one.save(tone("mine"))
    assert names(one) == names(two) == ["mine"]
    place.files.fails.add(call)
    with pytest.raises(StoreUnwritable, match="nothing was changed") as caught:
        one.save(tone("mine", 0.75))
    assert caught.value.status == 503
    with pytest.raises(StoreUnwritable):
        one.save(tone("new"))
    if call == "all":
        with pytest.raises(StoreUnwritable):
            one.remove("mine")
    for _ in range(2):
        for store in (one, two):
            assert store.load("mine").body["quality"] == {"auroc": [0.5]}
            assert names(store) == ["mine"]
        place.files.fails.clear()
        time.sleep(mirror.RETRY * 1.2)
    assert not list(place.folder.rglob(f"{PARTIAL}*"))
    assert not [path for path in place.files.find(place.root) if PARTIAL in path]


def test_a_write_that_hangs_is_given_up_and_told_to_be_unsure(place: Place) -> None:
    store = place.replica("one")
    hang = place.files.waits["pipe_file"] = threading.Event()
    with pytest.raises(StoreUnwritable, match="not known"):
        store.save(tone("mine"))
    assert not (store.folder / "mine.safetensors").exists()
    hang.set()


def test_a_file_cut_off_in_the_middle_of_copying_is_never_seen(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = place.replica("one"), place.replica("two")
    one.save(tone("mine"))
    two.load("mine")
    one.save(tone("mine", 0.75))
    later()

    def cut(key: str, size: int, into: Path) -> None:
        into.write_bytes(b"half")
        raise ConnectionError("cut")

    with monkeypatch.context() as patched:
        patched.setattr(two.place._remote, "read", cut)  # type: ignore[attr-defined]
        assert two.load("mine").body["quality"] == {"auroc": [0.5]}
    until(lambda: two.load("mine").body["quality"] == {"auroc": [0.75]})


def test_a_disk_that_is_not_mounted_is_no_empty_store(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    store = Store(opened(f"file://{shared}", tmp_path / "mirrors"))
    store.save(tone("mine"))
    assert names(store) == ["mine"]
    shared.rename(tmp_path / "away")
    later()
    assert names(store) == ["mine"]
    assert not store.place.health.is_reachable


# ── many writers ─────────────────────────────────────────────────────────────────────────────────────────────────────

STEPS = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from(["save", "remove", "read", "list", "restart", "wait"]),
              st.sampled_from(["x", "y"])),
    min_size=1, max_size=14,
)  # fmt: skip


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(steps=STEPS)
def test_whatever_two_replicas_do_both_read_the_last_that_was_written(steps: list[tuple[str, str, str]]) -> None:
    """Own writes at once; the other's after a while, or at once where nothing of that name is here."""
    files, root = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"mirrors-{uuid.uuid4().hex}"
    place = Place(files, root, folder, renames=False)
    replicas = {name: place.replica(name) for name in "ab"}
    truth: dict[str, float] = {}
    seen: dict[tuple[str, str], set[float | None]] = {}
    counter = 0.0
    try:
        for who, what, name in [*steps, ("a", "wait", "x"), ("a", "read", "x"), ("b", "read", "x"), ("b", "list", "x")]:
            store = replicas[who]
            if what == "save":
                counter += 1 / 64
                store.save(tone(name, counter))
                truth[name] = counter
                seen[who, name] = {counter}
                seen.setdefault(("b" if who == "a" else "a", name), {None}).add(counter)
            elif what == "remove":
                try:
                    store.remove(name)
                except ArtifactNotFound:
                    assert None in seen.get((who, name), {None})
                else:
                    truth.pop(name, None)
                    seen[who, name] = {None}
                    seen.setdefault(("b" if who == "a" else "a", name), {None}).add(None)
            elif what == "restart":
                replicas[who] = place.replica(who)
            elif what == "wait":
                later()
                seen = {(one, key): {truth.get(key)} for one in "ab" for key in "xy"}
            elif what == "list":
                listed = {entry.name: entry.quality["auroc"][0] for entry in store.entries()}
                for key in "xy":
                    assert listed.get(key) in seen.get((who, key), {None})
            else:
                try:
                    found: float | None = store.load(name).body["quality"]["auroc"][0]
                except ArtifactNotFound:
                    found = None
                    assert truth.get(name) is None  # what is not here was asked for again
                assert found in seen.get((who, name), {None})
        assert {name: truth[name] for name in sorted(truth)} == {
            entry.name: entry.quality["auroc"][0] for entry in replicas["b"].entries()
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if files.exists(root):
            files.rm(root, recursive=True)


def test_writers_and_readers_at_one_time_see_whole_files_and_agree_in_the_end(place: Place) -> None:
    stores = [place.replica(f"r{index}") for index in range(3)]
    stores[0].save(tone("x", 0.0))
    stop, failures = threading.Event(), list[BaseException]()

    def write(store: Store, seed: int) -> None:
        dice = random.Random(seed)
        try:
            for _ in range(15):
                store.save(tone("x", dice.random()))
        except BaseException as error:
            failures.append(error)

    def read(store: Store) -> None:
        try:
            while not stop.is_set():
                store.load("x")
                store.entries()
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(store, index)) for index, store in enumerate(stores[:2])]
    readers = [threading.Thread(target=read, args=(store,)) for store in stores]
    for thread in (*writers, *readers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert not failures
    later()
    assert len({store.load("x").fingerprint for store in stores}) == 1


def test_processes_may_share_one_copy(place: Place) -> None:
    """Two of one machine: what one has copied the other does not take for something else."""
    one, two, other = place.replica("shared"), place.replica("shared"), place.replica("elsewhere")
    other.save(tone("x", 0.25))
    assert one.load("x").body["quality"] == {"auroc": [0.25]}
    other.save(tone("x", 0.5))
    later()
    for store in (two, one):
        assert store.load("x").body["quality"] == {"auroc": [0.5]}
    one.save(tone("x", 0.75))
    later()
    assert two.load("x").body["quality"] == {"auroc": [0.75]}


@pytest.mark.parametrize("listable", [64, 0])
def test_what_another_process_writes_while_the_place_is_asked_is_not_taken_for_deleted(
    place: Place, monkeypatch: pytest.MonkeyPatch, listable: int
) -> None:
    """Else a default that was just set would be gone for a second, and requests would not be steered."""
    monkeypatch.setattr(mirror, "LISTABLE", listable)
    one, other = place.replica("shared"), place.replica("shared")
    place.replica("elsewhere").save(tone("x"))
    one.load("x")
    later()
    listing, ask = Remote.listing, Remote.ask
    is_written = False

    def between(found: Any) -> Any:
        nonlocal is_written
        if not is_written:
            is_written = True
            with other.place.replacing("default.json") as written:
                written.write_text("{}")
        return found

    with monkeypatch.context() as patched:
        patched.setattr(Remote, "listing", lambda *arguments: between(listing(*arguments)))
        patched.setattr(Remote, "ask", lambda *arguments: between(ask(*arguments)))
        one.place.look("default.json")
        until(lambda: is_written)
        until(lambda: not one.place._flights)  # type: ignore[attr-defined]
        assert (one.folder / "default.json").is_file()
    place.replica("elsewhere").place.remove("default.json")
    later()
    one.place.look("default.json")
    assert not (one.folder / "default.json").exists()


def test_more_files_than_one_listing_is_worth(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is asked for by its name then, and copied when it is used; a listing still shows all."""
    monkeypatch.setattr(mirror, "LISTABLE", 4)
    monkeypatch.setattr(mirror, "WHOLE", 5)
    one, two = place.replica("one"), place.replica("two")
    for index in range(6):
        one.save(tone(f"c{index}", index / 8))
    one.entries()
    assert two.load("c3").body["quality"] == {"auroc": [0.375]}
    assert [path.name for path in two.folder.glob("c*")] == ["c3.safetensors"]
    listings = place.files.calls.count("find")
    one.save(tone("c3", 0.5))
    one.save(tone("new"))
    later()
    assert two.load("c3").body["quality"] == {"auroc": [0.5]}
    assert two.load("new").name == "new"
    one.remove("c3")
    later()
    with pytest.raises(ArtifactNotFound):
        two.load("c3")
    with pytest.raises(ArtifactNotFound):
        two.load("absent")
    assert place.files.calls.count("find") == listings
    with one.place.replacing("presets/agent.json") as written:
        written.write_text("{}")
    two.place.look("presets/")
    assert (two.folder / "presets" / "agent.json").is_file()
    assert [path.name for path in two.folder.glob("*.safetensors")] == ["new.safetensors"]
    one.place.remove("presets/agent.json")
    later()
    two.place.look("presets/")
    assert not (two.folder / "presets" / "agent.json").exists()
    with pytest.raises(SpecError, match=r"\(new\)"):
        shelf(two).concept("absent")  # and does not copy all of them to name them
    assert names(two) == ["c0", "c1", "c2", "c4", "c5", "new"]
    monkeypatch.setattr(mirror, "REMEMBERED", 8)
    for index in range(40):
        with pytest.raises(ArtifactNotFound):
            two.load(f"made-up-{index}")
    later()
    two.load("c1")
    assert len(two.place._compared) < 20  # type: ignore[attr-defined]


def test_up_to_a_number_of_files_all_are_here_before_they_are_used(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "LISTABLE", 2)
    one, two = place.replica("one"), place.replica("two")
    for index in range(4):
        one.save(tone(f"c{index}", index / 8))
    two.place.look("default.json")
    place.files.fails.add("all")
    later()
    for index in range(4):
        assert two.load(f"c{index}").body["quality"] == {"auroc": [index / 8]}


# ── sweeping, addresses ──────────────────────────────────────────────────────────────────────────────────────────────


def test_what_a_killed_writer_left_there_is_swept(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    (shared / "presets").mkdir(parents=True)
    mine, alive = f"{PARTIAL}{machine()}-{os.getpid()}-x", f"{PARTIAL}{machine()}-{os.getppid()}-x"
    for path in (shared / mine, shared / alive, shared / "presets" / mine, shared / f"{PARTIAL}elsewhere-1-x"):
        path.write_bytes(b"half")
    store = Store(opened(f"file://{shared}", tmp_path / "mirrors"))
    assert store.sweep() == [mine, mine]
    assert sorted(path.name for path in shared.rglob(".*")) == sorted([alive, f"{PARTIAL}elsewhere-1-x"])
    assert names(store) == []
    assert opened(tmp_path).sweep() == []


def test_a_place_that_cannot_be_swept_is_told_and_no_more(place: Place) -> None:
    store = place.replica("one")
    store.entries()
    place.files.fails.add("all")
    assert store.sweep() == []


@pytest.mark.parametrize(
    "url", ["ftp://host/x", "http://host/x", "s3://", "simplecache::s3://b/x", "memory:///", "x://y"]
)
def test_an_address_that_names_no_place_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"a folder, or a URL of s3://, gs://, hf://, memory://, file://") as caught:
        opened(url, tmp_path)
    assert caught.value.param == "store"


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(*_: Any, **__: Any) -> Any:
        raise ImportError("gcsfs")

    monkeypatch.setattr("fsspec.core.url_to_fs", absent)
    with pytest.raises(SpecError, match=r"pip install 'setpoint\[gcs\]'"):
        opened("gs://bucket/x", tmp_path)


def test_where_copies_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SETPOINT_MIRROR", str(tmp_path / "mirrors"))
    one, two = opened("memory://a/b"), opened("memory://a/c/")
    assert isinstance(one, Mirror)
    assert one.path.parent == two.path.parent == tmp_path / "mirrors"
    assert one.path != two.path
    assert opened("memory://a/c").path == two.path
    monkeypatch.delenv("SETPOINT_MIRROR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert opened("memory://a/b").path.parent == tmp_path / "cache" / "setpoint" / "mirror"
    plain = opened(tmp_path / "plain")
    assert (type(plain), plain.shown("x"), plain.health.is_reachable) == (Folder, str(tmp_path / "plain" / "x"), True)


def test_the_index_says_what_each_file_is_a_copy_of(place: Place) -> None:
    store = place.replica("one")
    store.save(tone("mine"))
    assert json.loads((store.folder / INDEX).read_text()) == {"listed": False, "files": {}}
    later()
    store.entries()
    files = json.loads((store.folder / INDEX).read_text())["files"]
    stat = (store.folder / "mine.safetensors").stat()
    assert files["mine.safetensors"][1] == [stat.st_ino, stat.st_mtime_ns, stat.st_size]
