"""`setpoint artifacts import` knows an autoencoder's folder, and asks for what the folder does not tell."""

from __future__ import annotations

import json
from pathlib import Path

from steering import Store
from steering.plan import SaePlan
from tests.formats.test_sae import TEXTS, saelens, scope
from tests.server.test_cli import refused, run


def test_an_autoencoder_is_imported_from_the_command_line(model_folder: Path, tmp_path: Path) -> None:
    store, texts = tmp_path / "store", tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS))
    saelens(tmp_path / "My SAE")
    folder = ["artifacts", "import", tmp_path / "My SAE", "--model", model_folder, "--store", store]
    made = run(*folder, "--texts", texts, "--json")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["kind"] == "sae"
    plan = SaePlan.from_artifact(Store(store).load("my-sae"))
    assert (plan.layers, plan.measured) == ((1,), "texts")

    scope(tmp_path / "params")
    other = ["artifacts", "import", tmp_path / "params", "--name", "scope", "--model", model_folder, "--store", store]
    refused(run(*other), "site: expected a site such as resid_post.20")
    refused(
        run(*other, "--site", "layer 2"), "site: expected a site such as resid_post.20 or resid_pre.8, got 'layer 2'"
    )
    assert run(*other, "--site", "resid_post.2").exit_code == 0
    assert SaePlan.from_artifact(Store(store).load("scope")).layers == (2,)


def test_other_folders_are_still_an_edit_s(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    empty = ["artifacts", "import", tmp_path / "empty", "--model", model_folder, "--store", tmp_path / "store"]
    refused(run(*empty), "folder: expected a folder with intkey_*.safetensors files")


def test_options_that_say_nothing_of_a_folder_are_refused(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "edit").mkdir()
    saelens(tmp_path / "sae")
    rest = ["--model", model_folder, "--store", tmp_path / "store"]
    refused(run("artifacts", "import", tmp_path / "edit", "--site", "resid_post.1", *rest), "site: expected nothing")
    refused(run("artifacts", "import", tmp_path / "sae", "--positions", "f1", *rest), "positions: expected nothing")
