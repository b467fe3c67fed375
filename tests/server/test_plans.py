"""Plans over HTTP and from the command line: fitted, steered with, downloaded, uploaded, refused and imported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.settings import ServerSettings
from steering import Artifact, Plant, Store
from steering.plan import AdapterPlan, EigenshiftPlan, ReftPlan, SubspacePlan
from tests.formats.test_peft import saved as saved_adapter
from tests.formats.test_pyreft import saved
from tests.server.conftest import FOREIGN, serving
from tests.server.test_artifacts import put
from tests.server.test_cli import NEGATIVE, POSITIVE, refused, run
from tests.server.test_jobs import over, started
from tests.server.wire import error

METHODS: dict[str, dict[str, Any]] = {
    "eigenshift": {"skip": 1, "components": 4, "selection": "signed", "seed": 3},
    "subspace": {"skip": 1, "layers": [1, 2], "leading": 6, "trailing": 20, "quantile": 0.5},
}


@pytest.fixture(scope="module")
def store(folder: Path, plant: Plant, tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("plans")
    shutil.copy(folder / "happy.safetensors", path)
    return Store(path)


@pytest.fixture(scope="module")
def http(plant: Plant, store: Store) -> Iterator[httpx.Client]:
    with serving(plant, store.folder, ServerSettings()) as address, httpx.Client(base_url=address, timeout=30) as one:
        for kind, method in METHODS.items():
            body = {"name": f"a-{kind}", "kind": kind, "positive": POSITIVE, "negative": NEGATIVE, "method": method}
            job = over(one, started(one, "fit", body))
            assert (job["state"], job["artifact"]) == ("succeeded", f"a-{kind}"), job
        yield one


def ask(http: httpx.Client, *interventions: dict[str, Any]) -> httpx.Response:
    body = {
        "prompt": "the cat sat on",
        "max_tokens": 4,
        "temperature": 0,
        "ignore_eos": True,
        "steering": {"interventions": interventions},
    }
    return http.post("/v1/completions", json=body)


def test_a_fit_makes_the_plan_that_was_asked_for(http: httpx.Client, store: Store) -> None:
    shift = EigenshiftPlan.from_artifact(store.load("a-eigenshift"))
    assert (len(shift.basis), shift.selection, shift.provenance["settings"]["seed"]) == (4, "signed", 3)
    pca = SubspacePlan.from_artifact(store.load("a-subspace"))
    assert (pca.layers, pca.leading.shape[1], pca.trailing.shape[1]) == ((1, 2), 6, 20)
    listed = {one["name"]: one for one in http.get("/v1/steering/artifacts").json()["data"]}
    assert {listed[f"a-{kind}"]["kind"] for kind in METHODS} == set(METHODS)
    assert listed["a-eigenshift"]["quality"]["random"]["auroc"] > 0
    (job,) = (j for j in http.get("/v1/steering/jobs").json()["data"] if j["artifact"] == "a-eigenshift")
    assert "that were fitted" in job["result"]["warning"] or "random" in job["result"]["warning"]


def test_it_steers_and_the_receipt_measures(http: httpx.Client) -> None:
    for one in (
        {"type": "eigenshift", "plan": "a-eigenshift", "alpha": 0.0},
        {"type": "eigenshift", "plan": "a-eigenshift", "shift": 2.0, "control": True},
        {"type": "subspace", "plan": "a-subspace", "components": 3, "apply": {"prompt": "all"}},
    ):
        answer = ask(http, one, {"type": "lqr", "concept": "happy", "setpoint": 1.0})
        assert answer.status_code == 200, answer.text
        receipt = answer.json()["steering"]
        assert receipt["tokens_steered"] >= 4
        assert receipt["effort"]["max"] > 0
        assert list(receipt["tracking"]) == ["happy"]


@pytest.mark.parametrize(
    ("one", "param", "part"),
    [
        ({"type": "eigenshift"}, "plan", "required"),
        ({"type": "eigenshift", "plan": "absent"}, "plan", "a plan of kind 'eigenshift' of this model (a-eigenshift)"),
        ({"type": "eigenshift", "plan": "a-subspace"}, "plan", "of kind 'subspace'"),
        ({"type": "subspace", "plan": "happy"}, "plan", "of kind 'concept'"),
        ({"type": "lqr", "concept": "a-subspace", "setpoint": 1}, "concept", "expected a concept"),
        ({"type": "eigenshift", "plan": "a-eigenshift", "alpha": 3}, "alpha", "[-1, 2]"),
        ({"type": "eigenshift", "plan": "a-eigenshift", "components": 5}, "components", "1 to 4"),
        ({"type": "eigenshift", "plan": "a-eigenshift", "layers": [1]}, "layers", "final norm"),
        ({"type": "eigenshift", "plan": "a-eigenshift", "beta": 1}, "beta", "beta"),
        ({"type": "subspace", "plan": "a-subspace", "mode": "invert"}, "mode", "remove"),
        ({"type": "subspace", "plan": "a-subspace", "layers": [0]}, "layers", "[1, 2]"),
        ({"type": "reft", "plan": "a-subspace"}, "plan", "of kind 'subspace'"),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else "",
)
def test_what_cannot_be_honoured_is_refused_by_name(
    http: httpx.Client, one: dict[str, Any], param: str, part: str
) -> None:
    found = error(ask(http, one), 400)
    assert found["param"] == f"steering.interventions[0].{param}"
    assert part in found["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"kind": "nonesuch"}, "kind"),
        ({"kind": "eigenshift", "method": {"q": 1}}, "method.q"),
        ({"kind": "eigenshift", "method": {"direction": "mean_difference"}}, "method.direction"),
        ({"kind": "eigenshift", "method": {"components": 0}}, "method.components"),
        ({"kind": "eigenshift", "method": {"selection": "largest"}}, "method.selection"),
        ({"kind": "subspace", "method": {"layers": [3]}}, "method.layers"),
        ({"kind": "subspace", "method": {"quantile": 1}}, "method.quantile"),
        ({"kind": "concept", "method": {"components": 4}}, "method.components"),
        ({"kind": "subspace", "positive": ["the cat"]}, "positive"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_a_bad_fit_names_its_field(http: httpx.Client, change: dict[str, Any], param: str) -> None:
    body = {"name": "x", "positive": POSITIVE, "negative": NEGATIVE, **change}
    assert error(http.post("/v1/steering/fit", json=body), 400)["param"] == param


def test_a_prompt_of_which_a_method_leaves_all_out_is_refused(http: httpx.Client) -> None:
    one = {"type": "subspace", "plan": "a-subspace", "apply": {"prompt": "all", "generation": "none"}}
    body = {"prompt": [5], "max_tokens": 2, "steering": {"interventions": [one]}}
    found = error(http.post("/v1/completions", json=body), 400)
    assert found["param"] == "steering.interventions[0]"
    for change in ({"prompt": [5, 6]}, {"steering": {"interventions": [one | {"strength": 0}]}}):
        assert http.post("/v1/completions", json=body | change).status_code == 200
    answer = http.post(
        "/v1/completions", json=body | {"steering": {"interventions": [one | {"apply": {"prompt": "all"}}]}}
    )
    assert answer.json()["steering"]["tokens_steered"] == 1


@pytest.mark.parametrize("kind", METHODS)
def test_what_is_downloaded_can_be_uploaded(http: httpx.Client, store: Store, kind: str) -> None:
    content = http.get(f"/v1/steering/artifacts/a-{kind}/content").content
    made = put(http, f"copy-{kind}", content)
    assert made.status_code == 201, made.text
    assert (made.json()["kind"], made.json()["fingerprint"]) == (kind, store.load(f"a-{kind}").fingerprint)
    assert ask(http, {"type": kind, "plan": f"copy-{kind}"}).status_code == 200


def test_another_model_s_plan_and_a_broken_one_are_not_taken(http: httpx.Client, store: Store, tmp_path: Path) -> None:
    plan = EigenshiftPlan.from_artifact(store.load("a-eigenshift"))
    foreign = replace(plan, model=FOREIGN).artifact().save(tmp_path / "foreign").read_bytes()
    found = error(put(http, "foreign", foreign), 409)
    assert found["code"] == "artifact_model_mismatch"
    assert FOREIGN[:19] in found["message"]
    broken = replace(plan, sigma=-plan.sigma).artifact().save(tmp_path / "broken").read_bytes()
    assert error(put(http, "broken", broken), 400)["code"] == "artifact_corrupt"
    alien = Artifact("alien", "zoo", plan.model, {}, {}).save(tmp_path / "alien").read_bytes()
    assert "expected a concept, or a plan of kind" in error(put(http, "alien", alien), 400)["message"]
    names = [one["name"] for one in http.get("/v1/steering/artifacts").json()["data"]]
    assert not {"foreign", "broken", "alien"} & set(names)


def test_a_plan_that_a_preset_names_is_kept(http: httpx.Client) -> None:
    spec = {"interventions": [{"type": "eigenshift", "plan": "a-eigenshift"}]}
    assert http.put("/v1/steering/presets/calm", json=spec).status_code < 300
    assert "preset 'calm'" in error(http.delete("/v1/steering/artifacts/a-eigenshift"), 409)["message"]
    assert http.delete("/v1/steering/presets/calm").status_code == 200


def test_too_many_channels_are_refused(http: httpx.Client) -> None:
    many = [{"type": "subspace", "plan": "a-subspace", "mode": "keep", "components": 12}] * 14
    found = error(ask(http, *many), 400)
    assert found["param"] == "steering"
    assert "at most 256 channels" in found["message"]
    assert ask(http, *many[:12]).status_code == 200


# The command line


def test_fit_and_import_from_the_command_line(model_folder: Path, tmp_path: Path) -> None:
    positive, negative, store = tmp_path / "positive.txt", tmp_path / "negative.txt", tmp_path / "store"
    positive.write_text("\n".join(POSITIVE))
    negative.write_text("\n".join(NEGATIVE))
    options = ["--positive", positive, "--negative", negative, "--model", model_folder, "--store", store]
    fitted = run("fit", "shift", *options, "--kind", "eigenshift", "--set", "components=3", "--json")
    assert fitted.exit_code == 0, fitted.output
    assert "random" in json.loads(fitted.stdout)["quality"]
    assert len(EigenshiftPlan.from_artifact(Store(store).load("shift")).basis) == 3
    assert run("fit", "pca", *options, "--kind", "subspace", "--layers", "1-2").exit_code == 0
    assert SubspacePlan.from_artifact(Store(store).load("pca")).layers == (1, 2)
    refused(run("fit", "x", *options, "--kind", "eigenshift", "--q", "2"), "q: expected a setting of kind 'eigenshift'")
    refused(run("fit", "x", *options, "--kind", "nonesuch"), "kind: expected concept, eigenshift or")

    copied = run("artifacts", "import", store / "shift.safetensors", "--name", "again", "--store", store)
    assert copied.exit_code == 0, copied.output
    saved(tmp_path / "My Edit", "Loreft")
    edit = ["artifacts", "import", tmp_path / "My Edit", "--model", model_folder, "--store", store]
    assert run(*edit, "--positions", "f2+l2").exit_code == 0
    assert ReftPlan.from_artifact(Store(store).load("my-edit")).first == 2
    refused(run(*edit, "--positions", "all"), "positions: expected positions as pyreft writes them")
    refused(run("artifacts", "import", tmp_path / "absent", "--store", store), "a file or folder that exists")


def test_a_lora_is_imported_from_the_command_line(model_folder: Path, plant: Plant, tmp_path: Path) -> None:
    saved_adapter(tmp_path / "tv", plant)
    store, options = tmp_path / "store", ["--model", model_folder, "--store", tmp_path / "store"]
    done = run("artifacts", "import", tmp_path / "tv", "--name", "task", *options)
    assert done.exit_code == 0, done.output
    assert AdapterPlan.from_artifact(Store(store).load("task")).layers == (0, 2)
    saved_adapter(tmp_path / "dora", plant, use_dora=True)
    refused(run("artifacts", "import", tmp_path / "dora", *options), "use_dora: expected off")
