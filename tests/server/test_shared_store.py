"""Two servers over one place: what is fitted, uploaded, saved or deleted at one is so at the other; and while the place
does not answer both go on with what they know, and change nothing."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from server.cli import app
from server.presets import Presets
from server.settings import ServerSettings, default_store, located
from steering import Plant, Store
from steering import mirror as mirroring
from steering.mirror import Mirror
from tests.server.conftest import serving
from tests.server.test_kill import NEGATIVE, POSITIVE
from tests.server.wire import error
from tests.test_mirror import Faulty, Place, fsspec

PROMPT = {"prompt": "the cat sat on the", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
HAPPY = {"targets": {"happy": 1.0}}
FIT = {"name": "glad", "positive": POSITIVE, "negative": NEGATIVE, "method": {"jacobian_prompts": 2, "skip": 1}}
ARTIFACTS, PRESETS, DEFAULT = (f"/v1/steering/{what}" for what in ("artifacts", "presets", "default"))


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("FRESH", 0.2), ("RETRY", 0.3), ("PATIENCE", 1.0), ("SENDING", 1.0)):
            patch.setattr(mirroring, name, value)
        patch.setattr("server.tasks.SAVE_AGAIN", 0.2)
        yield


@pytest.fixture(scope="module")
def place(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = f"/{uuid.uuid4().hex}"
    found = Place(fsspec.filesystem("memory"), root, tmp_path_factory.mktemp("mirrors"), renames=False)
    for name in ("happy", "animal"):
        found.files.pipe_file(f"{root}/{name}.safetensors", (folder / f"{name}.safetensors").read_bytes())
    return found


@pytest.fixture(scope="module")
def pair(plant: Plant, place: Place) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    """Two servers, as clients."""
    one, two = (place.replica(name).place for name in ("one", "two"))
    with (
        serving(plant, one, ServerSettings()) as first,
        serving(plant, two, ServerSettings()) as second,
        httpx.Client(base_url=first, timeout=30) as a,
        httpx.Client(base_url=second, timeout=30) as b,
    ):
        yield a, b


@pytest.fixture
def faulty(place: Place) -> Iterator[Faulty]:
    yield place.files
    place.files.fails.clear()
    time.sleep(1.5 * mirroring.RETRY)


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def later() -> None:
    time.sleep(1.2 * mirroring.FRESH)


def steered(http: httpx.Client, **fields: Any) -> Any:
    """The receipt of a request; None for one that was not steered."""
    answer = http.post("/v1/completions", json={**PROMPT, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json().get("steering")


def job_of(http: httpx.Client, body: dict[str, Any]) -> str:
    found: str = http.post("/v1/steering/fit", json=body).json()["job"]
    return found


def state(http: httpx.Client, job: str) -> Any:
    return http.get(f"/v1/steering/jobs/{job}").json()


def test_what_is_fitted_at_one_steers_at_the_other(pair: tuple[httpx.Client, httpx.Client]) -> None:
    a, b = pair
    job = job_of(a, FIT)
    until(lambda: state(a, job)["state"] == "succeeded")
    at_once = steered(b, steering={"targets": {"glad": 1.0}})
    assert at_once["fingerprint"] == steered(a, steering={"targets": {"glad": 1.0}})["fingerprint"]
    later()
    assert "glad" in [one["name"] for one in b.get(ARTIFACTS).json()["data"]]
    assert b.get(f"{ARTIFACTS}/glad/content").content == a.get(f"{ARTIFACTS}/glad/content").content


def test_presets_and_the_default_are_everybodys(pair: tuple[httpx.Client, httpx.Client]) -> None:
    a, b = pair
    assert steered(b) is None
    assert a.put(f"{PRESETS}/sunny", json=HAPPY).status_code == 201
    assert set(steered(b, model="tiny:sunny")["tracking"]) == {"happy"}
    assert b.get(f"{PRESETS}/sunny").json() == HAPPY
    assert b.put(f"{PRESETS}/sunny", json={"targets": {"animal": 1.0}}).status_code == 200
    later()
    assert set(steered(a, model="tiny:sunny")["tracking"]) == {"animal"}
    listed = [[(one["name"], one["created"]) for one in http.get(PRESETS).json()["data"]] for http in pair]
    assert listed[0] == listed[1]
    assert a.put(DEFAULT, json=HAPPY).status_code == 201
    later()
    assert set(steered(b)["tracking"]) == {"happy"}
    assert b.delete(DEFAULT).status_code == 200
    later()
    assert steered(a) is None
    assert error(b.delete(f"{ARTIFACTS}/animal"), 409)["code"] == "artifact_conflict"  # the preset uses it
    assert b.delete(f"{PRESETS}/sunny").status_code == 200
    later()
    assert error(a.get(f"{PRESETS}/sunny"), 404)["code"] == "not_found"


def test_an_upload_and_a_deletion_are_everybodys(pair: tuple[httpx.Client, httpx.Client], place: Place) -> None:
    a, b = pair
    raw = a.get(f"{ARTIFACTS}/happy/content").content
    headers = {"Content-Type": "application/octet-stream"}
    assert a.put(f"{ARTIFACTS}/copy/content", content=raw, headers=headers).status_code == 201
    assert b.put(f"{ARTIFACTS}/copy/content", content=raw, headers=headers).status_code == 200
    assert b.get(f"{ARTIFACTS}/copy").json()["fingerprint"] == a.get(f"{ARTIFACTS}/happy").json()["fingerprint"]
    assert a.delete(f"{ARTIFACTS}/copy").status_code == 200
    later()
    assert error(b.get(f"{ARTIFACTS}/copy"), 404)["code"] == "artifact_not_found"
    wanted = {"steering": {"targets": {"copy": 1.0}}}
    assert error(b.post("/v1/completions", json={**PROMPT, **wanted}), 400)["param"] == "steering.targets.copy"
    assert not place.files.exists(f"{place.root}/copy.safetensors")


def test_a_place_that_is_away(pair: tuple[httpx.Client, httpx.Client], faulty: Faulty) -> None:
    """Generating goes on; every call that writes is a 503 and leaves everything as it was."""
    a, _ = pair
    assert steered(a, steering=HAPPY)
    assert "setpoint_store_reachable 1.0" in a.get("/metrics").text
    raw = a.get(f"{ARTIFACTS}/happy/content").content
    faulty.fails.add("all")
    later()
    assert set(steered(a, steering=HAPPY)["tracking"]) == {"happy"}
    refused = [
        a.put(f"{PRESETS}/new", json=HAPPY),
        a.put(DEFAULT, json=HAPPY),
        a.delete(f"{ARTIFACTS}/animal"),
        a.put(f"{ARTIFACTS}/new/content", content=raw, headers={"Content-Type": "application/octet-stream"}),
    ]
    for answer in refused:
        told = error(answer, 503)
        assert told["code"] == "store_unwritable"
        assert "nothing was changed" in told["message"]
    assert a.get("/health/ready").status_code == 200
    metrics = a.get("/metrics").text
    assert "setpoint_store_reachable 0.0" in metrics
    failures = next(line for line in metrics.splitlines() if line.startswith("setpoint_store_failures_total "))
    assert float(failures.split()[1]) >= len(refused)
    faulty.fails.clear()
    until(lambda: steered(a, steering=HAPPY) and "setpoint_store_reachable 1.0" in a.get("/metrics").text)
    assert {one["name"] for one in a.get(ARTIFACTS).json()["data"]} >= {"happy", "animal"}
    assert error(a.get(f"{PRESETS}/new"), 404)
    assert error(a.get(DEFAULT), 404)


def test_a_fit_that_is_done_waits_for_the_store(pair: tuple[httpx.Client, httpx.Client], faulty: Faulty) -> None:
    a, b = pair
    faulty.fails.add("all")
    job = job_of(a, {**FIT, "name": "patient"})
    until(lambda: state(a, job)["stage"] == "waiting for the store")
    faulty.fails.clear()
    until(lambda: state(a, job)["state"] == "succeeded")
    assert steered(b, steering={"targets": {"patient": 1.0}})


def test_a_fit_that_waits_can_be_cancelled_and_waits_not_for_ever(
    pair: tuple[httpx.Client, httpx.Client], faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, _ = pair
    faulty.fails.add("all")
    job = job_of(a, {**FIT, "name": "cancelled"})
    until(lambda: state(a, job)["stage"] == "waiting for the store")
    a.delete(f"/v1/steering/jobs/{job}")
    until(lambda: state(a, job)["state"] == "cancelled")
    monkeypatch.setattr("server.tasks.SAVING", 0.0)
    job = job_of(a, {**FIT, "name": "given-up"})
    until(lambda: state(a, job)["state"] == "failed")
    assert state(a, job)["error"]["code"] == "store_unwritable"


def test_a_preset_is_found_behind_a_place_that_hangs_without_holding_the_others_up(
    pair: tuple[httpx.Client, httpx.Client], place: Place
) -> None:
    """The event loop waits for nobody: the health check answers while a request does wait."""
    import threading

    a, _ = pair
    hang = place.files.waits["find"] = threading.Event()
    try:
        later()
        asking = threading.Thread(target=lambda: a.post("/tokenize", json={"model": "tiny:absent", "prompt": "x"}))
        asking.start()
        began = time.monotonic()
        with httpx.Client(base_url=a.base_url, timeout=10) as other:
            assert other.get("/health/live").status_code == 200
        assert time.monotonic() - began < mirroring.PATIENCE / 2
        asking.join()
    finally:
        del place.files.waits["find"]
        hang.set()
        time.sleep(1.5 * mirroring.RETRY)


# ── the command line and settings ────────────────────────────────────────────────────────────────────────────────────


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def url(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A shared folder with two good concepts, by its URL; copies go to a folder of the test's own."""
    monkeypatch.setenv("SETPOINT_MIRROR", str(tmp_path / "mirrors"))
    shared = tmp_path / "shared"
    shared.mkdir()
    for name in ("happy", "animal"):
        shutil.copy(folder / f"{name}.safetensors", shared)
    return f"file://{shared}"


def test_every_command_takes_a_url(url: str, folder: Path, tmp_path: Path) -> None:
    shared = Path(url.removeprefix("file://"))
    assert '"happy"' in run("artifacts", "list", "--store", url, "--json").stdout
    assert run("artifacts", "show", "happy", "--store", url).exit_code == 0
    file = tmp_path / "out.safetensors"
    assert run("artifacts", "export", "happy", "--store", url, "--output", file).exit_code == 0
    assert run("artifacts", "import", file, "--name", "again", "--store", url).exit_code == 0
    assert (shared / "again.safetensors").is_file()
    verified = run("artifacts", "verify", "--store", url)
    assert (verified.exit_code, "again" in verified.stdout) == (0, True)
    assert run("artifacts", "rm", "again", "--store", url).exit_code == 0
    assert not (shared / "again.safetensors").exists()
    (shared / "broken.safetensors").write_bytes(b"broken")
    assert run("artifacts", "verify", "--store", url).exit_code == 1
    checked = run("doctor", "--store", url, "--json")
    assert f"{url}, copied to" in checked.stdout.replace("\n", "")


def test_a_place_that_cannot_be_read_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SETPOINT_MIRROR", str(tmp_path / "mirrors"))
    absent = f"file://{tmp_path}/absent"
    for command in (["artifacts", "list"], ["artifacts", "show", "x"], ["fit", "x", "--positive", "/dev/null"]):
        done = run(*command, "--store", absent)
        assert done.exit_code == 2
        assert "The store cannot be reached, and there is no copy of it here" in done.stderr
    wrong = run("artifacts", "list", "--store", "ftp://host/x")
    assert wrong.exit_code == 2
    assert "setpoint: store: expected a folder, or a URL of s3://" in wrong.stderr
    sick = run("doctor", "--store", absent)
    assert sick.exit_code == 1


def test_a_fit_that_the_store_does_not_take_is_kept(
    url: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, rows in (("positive", POSITIVE), ("negative", NEGATIVE)):
        (tmp_path / name).write_text("\n".join(rows))
    arguments = ("fit", "glad", "--positive", "positive", "--negative", "negative", "--model", model_folder,
                 "--store", url, "--device", "cpu", "--jacobian-prompts", 2, "--set", "skip=1")  # fmt: skip
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    assert f"{url}/glad.safetensors" in done.stdout
    monkeypatch.setattr("steering.remote.Remote.write", lambda *_: (_ for _ in ()).throw(ConnectionError("no route")))
    done = run(*arguments)
    assert done.exit_code == 2
    assert "setpoint artifacts import glad.safetensors" in done.stderr
    assert Store(tmp_path).load("glad").name == "glad"


def test_settings_take_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SETPOINT_STORE", "s3://bucket/prefix")
    assert ServerSettings.from_env().store == ServerSettings().store_place == default_store() == "s3://bucket/prefix"
    assert located("folder/of/mine") == Path("folder/of/mine")
    assert ServerSettings(store="s3://bucket/other").store_place == "s3://bucket/other"


def test_presets_over_a_mirror_see_anothers_at_once(place: Place, plant: Plant) -> None:
    one, two = (Presets(place.replica(name).place) for name in ("p-one", "p-two"))
    assert isinstance(one._place, Mirror)
    assert (one.find("late"), two.find("late"), two.default()) == (None, None, None)
    with one._place.replacing("presets/late.json") as written:
        written.write_text('{"targets": {"happy": 1.0}}')
    found = two.find("late")
    assert found is not None
    assert found.document == HAPPY
    assert one.users("happy") == ["preset 'late'"]
    assert one.remove("late")
    assert not one.remove("late")
