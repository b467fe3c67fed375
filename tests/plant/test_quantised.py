"""Quantised linear maps: read as numbers through their own forward pass, linearised, loaded, or refused by name.

The libraries are no dependency of this project. What they would bring is stood in for by `Packed`, a linear map of int8
weights with state outside its parameters and without a derivative; the tests of the libraries themselves run where they
are installed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from steering.errors import PlantError
from steering.fit.concept import FitSettings, fit_concept
from steering.plant import quantised
from steering.plant.fingerprint import stored_fingerprint
from steering.plant.jacobian import Linearisation
from steering.plant.loading import weight_files as files_of
from steering.plant.plant import Plant
from steering.plant.quantised import SCHEMES, as_numbers, is_quantised, quantised_maps
from steering.types import Site
from tests.plants import prompts, tiny, tiny_config, tiny_tokenizer
from tests.tolerances import PLANT

PROMPTS = prompts(3)


@dataclass
class State:
    """What a library keeps beside a module's parameters."""

    scale: Tensor


class Packed(nn.Module):
    """int8 weights (in, out), so transposed, with a scale per output that is no parameter and no buffer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale_O1 = linear.weight.abs().amax(1, keepdim=True).float() / 127
        packed_OI = (linear.weight / scale_O1).round().to(torch.int8)
        self.weight = nn.Parameter(packed_OI.T.contiguous(), requires_grad=False)
        self.state = State(scale_O1)
        self.bias = linear.bias

    def numbers(self) -> Tensor:
        return self.weight.T * self.state.scale

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.numbers().T.to(x.dtype)
        return y if self.bias is None else y + self.bias


def packed(family: str) -> PreTrainedModel:
    """A tiny model with every linear map of its blocks packed."""
    model = tiny(family)
    for path, part in list(model.named_modules()):
        if isinstance(part, nn.Linear) and ".layers." in path:
            model.set_submodule(path, Packed(part))
    return model


def unpacked(model: PreTrainedModel) -> PreTrainedModel:
    """Oracle: the same numbers in plain linear maps."""
    for path, part in list(model.named_modules()):
        if isinstance(part, Packed):
            plain = nn.Linear(part.in_features, part.out_features, bias=part.bias is not None)
            plain.weight.data = part.numbers()
            if part.bias is not None:
                plain.bias.data = part.bias.data
            model.set_submodule(path, plain)
    return model.requires_grad_(False)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3", "gpt_neox"])  # qwen2 and gpt_neox have biases
def test_a_block_of_packed_maps_is_linearised_as_its_numbers_are(family: str) -> None:
    line = Linearisation(Plant(packed(family)), PROMPTS)
    oracle = Linearisation(Plant(unpacked(packed(family))), PROMPTS)
    A = line.jacobian(1)
    expected = oracle.jacobian(1)
    assert float((A - expected).norm() / expected.norm()) < PLANT["jacobian_float32"]
    assert float((A - Linearisation(Plant(tiny(family)), PROMPTS).jacobian(1)).norm() / A.norm()) > 1e-3
    torch.testing.assert_close(line.states_PLD, oracle.states_PLD, **PLANT["float32"])
    torch.testing.assert_close(line.jacobian(1, "jvp"), A, **PLANT["float32"])


def test_a_map_is_read_through_its_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = nn.Linear(70, 20)
    module = Packed(linear)
    monkeypatch.setattr(quantised, "ROWS", 32)  # 70 inputs in three pieces
    torch.testing.assert_close(
        as_numbers(module, torch.float32, torch.float64).float(), module.numbers(), atol=1e-6, rtol=0
    )
    assert is_quantised(module)
    assert not is_quantised(linear)
    assert [path for path, _ in quantised_maps(nn.Sequential(linear, module))] == ["1"]


@pytest.mark.parametrize("kind", ["parameter", "buffer", "attribute"])
def test_a_large_bias_does_not_swallow_the_weights_in_sixteen_bits(kind: str) -> None:
    linear = nn.Linear(70, 20).to(torch.bfloat16)
    bias_O = torch.full((20,), 128.0, dtype=torch.bfloat16)  # as those of keys are in Qwen2: a unit of it is 1
    module = Packed(linear)
    del module.bias
    if kind == "parameter":
        module.bias = nn.Parameter(bias_O)
    elif kind == "buffer":
        module.register_buffer("bias", bias_O)
    else:
        module.bias = bias_O
    W_OI = as_numbers(module, torch.bfloat16, torch.float32)
    assert torch.equal(W_OI, module.numbers().to(torch.bfloat16).float())
    assert module.bias is not None
    assert torch.equal(module.bias, bias_O)


def test_a_map_that_does_not_run_here_is_refused() -> None:
    class ElsewhereOnly(Packed):
        def forward(self, x: Tensor) -> Tensor:
            raise NotImplementedError("CUDA only\nand a page of advice")

    with pytest.raises(PlantError, match=r"ElsewhereOnly cannot be read as numbers on cpu \(CUDA only\): fit on"):
        as_numbers(ElsewhereOnly(nn.Linear(4, 4)), torch.float32, torch.float32)


def test_what_is_quantised_and_no_linear_map_is_refused() -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.table = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(PlantError, match=r"mlp\.table are quantised and belong to no linear map"):
        Linearisation(Plant(model), PROMPTS)


def test_sites_and_weights_of_a_packed_model() -> None:
    plant, oracle = Plant(packed("llama")), Plant(unpacked(packed("llama")))
    for tap in ("mlp_act", "attn_act", "k_out", "up_out"):
        assert plant.width_of(Site(tap, 1)) == oracle.width_of(Site(tap, 1))  # type: ignore[arg-type]
    for mine, its in zip(plant.linears_at(Site("mlp_in", 1)), oracle.linears_at(Site("mlp_in", 1)), strict=True):
        torch.testing.assert_close(mine, its, **PLANT["float32"])


def test_a_shell_shares_what_lies_outside_the_parameters() -> None:
    plant = Plant(packed("llama"))
    mine, its = (
        [part.state.scale.data_ptr() for part in model.modules() if isinstance(part, Packed)]
        for model in (plant.model, plant.shell())
    )
    assert len(mine) == 3 * 7
    assert mine == its


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bfloat16 Llama on disk whose widths every library can pack."""
    path = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    settings = {**tiny_config("llama", width=64).to_dict(), "intermediate_size": 128, "initializer_range": 0.2}
    LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def stored_as(checkpoint: Path, path: Path, method: str) -> Path:
    for file in checkpoint.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    return path


@pytest.mark.parametrize(
    ("method", "package"),
    [("awq", "gptqmodel"), ("gptq", "gptqmodel optimum"), ("bitsandbytes", "bitsandbytes"), ("hqq", "hqq")],
)
def test_a_stored_quantisation_names_the_packages_it_needs(
    method: str, package: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "find_spec", lambda _: None)
    folder = stored_as(checkpoint, tmp_path, method)
    with pytest.raises(PlantError, match=rf"\({method}\) needs packages .*: pip install accelerate {package}\.") as e:
        Plant.load(folder)
    assert e.value.param == "quantization"
    with pytest.raises(PlantError, match=rf"stored quantised already \({method}\): leave out quantization"):
        Plant.load(folder, quantization="int8")


def test_a_quantisation_that_cannot_be_had(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlantError, match=r"quantization: expected one of none, int8, .*nf4.*, got 'int3'") as e:
        Plant.load(checkpoint, quantization="int3")
    assert e.value.param == "quantization"
    monkeypatch.setattr(quantised, "find_spec", lambda name: None if name == "torchao" else object())
    with pytest.raises(PlantError, match=r"\(int8\) needs packages that are not installed: pip install torchao\."):
        Plant.load(checkpoint, quantization="int8")


def test_the_files_of_a_checkpoint(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files_of(str(checkpoint), None) == [checkpoint / "model.safetensors"]
    with pytest.raises(PlantError, match="no safetensors files"):
        files_of(str(tmp_path), None)
    index = {"weight_map": {"a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setattr("steering.plant.loading.snapshot_download", lambda *_, **__: str(tmp_path))
    assert files_of("some/model", "main") == [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]


def test_the_identity_of_a_quantised_model(checkpoint: Path, tmp_path: Path) -> None:
    file = checkpoint / "model.safetensors"
    config = Plant.load(checkpoint).model.config
    expected = stored_fingerprint([file], config, "int8")
    assert expected != stored_fingerprint([file], config, "nf4")
    assert expected != Plant.load(checkpoint).fingerprint
    tensors = load_file(file)
    names = sorted(tensors)
    parts = [tmp_path / f"{n}.safetensors" for n in range(2)]
    for n, part in enumerate(parts):  # the same tensors in two files
        save_file({name: tensors[name] for name in names[n::2]}, part)
    assert stored_fingerprint(parts, config, "int8") == expected
    tensors["model.norm.weight"][3] += 0.5
    save_file(tensors, parts[0])
    assert stored_fingerprint(parts[:1], config, "int8") != expected


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_library_quantises_and_the_plant_is_one(scheme: str, checkpoint: Path, tmp_path: Path) -> None:
    for package in ("accelerate", SCHEMES[scheme].package):
        pytest.importorskip(package, reason=f"{scheme} needs {package}, which is no dependency of this project")
    plain, plant = Plant.load(checkpoint), Plant.load(checkpoint, quantization=scheme)
    maps = dict(quantised_maps(plant.model))
    assert len(maps) == 3 * 7
    assert plant.width_of(Site("mlp_act", 0)) == 128
    for path, module in maps.items():
        weight = plain.model.get_submodule(path).weight.float()
        numbers = as_numbers(module, plant.dtype, torch.float32)
        assert 1e-4 < float((numbers - weight).norm() / weight.norm()) < (0.15 if scheme == "nf4" else 0.05)
    ids = torch.tensor([PROMPTS[0]])
    expected = plant.model(ids).logits
    for shell in (plant.shell(), plant.shell()):  # no shell takes another's state away
        assert torch.equal(shell(ids).logits, expected)
    Plant.load(checkpoint, quantization=scheme).model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    stored = Plant.load(tmp_path)  # a checkpoint that is stored quantised says so itself
    assert torch.equal(stored.model(ids).logits, expected)
    assert stored.fingerprint != plant.fingerprint
    line = Linearisation(plant, PROMPTS)
    stepped = line.step(1, 0, line.states_PLD[0, 1][None])[0]
    assert float((stepped - line.states_PLD[0, 2]).norm() / stepped.norm()) < 0.03  # bfloat16 and rounded activations
    rows: dict[str, Any] = {"positive": ["good nice happy", "very good"], "negative": ["bad rude sad", "very bad"]}
    settings = FitSettings(gains=("dense", "matrix_free"), jacobian_prompts=2, positions="all", skip=1)
    concept = fit_concept(plant, "mood", rows["positive"], rows["negative"], settings)
    assert concept.model == plant.fingerprint != plain.fingerprint
    assert all(bool(w.isfinite().all()) and bool(w.any()) for w in concept.gains.values())
