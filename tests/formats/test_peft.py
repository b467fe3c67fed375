"""PEFT's layout becomes a plan that is the merged weights; what would be another model is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from steering.errors import ArtifactCorrupt, SpecError
from steering.formats.peft import import_adapter, is_adapter
from steering.methods import AdapterMix
from steering.plan import AdapterPlan
from steering.plant.plant import Plant
from tests.hooks import OnePlan, hook_laws
from tests.plants import WIDTH, prompts, tiny, tiny_tokenizer
from tests.tolerances import PLANT

RANK = 3
PATHS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
WHOLE = tuple((layer, target) for layer in (0, 2) for target in PATHS)
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": RANK,
    "lora_alpha": 6,
    "target_modules": [path.rpartition(".")[2] for path in PATHS.values()],
    "bias": "none",
    "lora_dropout": 0.1,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "modules_to_save": None,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "loftq_config": {},
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "task_type": "CAUSAL_LM",
}
"""What PEFT writes, shortened."""


@pytest.fixture(scope="module")
def plant() -> Plant:
    return Plant(tiny("llama"), tiny_tokenizer())


def module(plant: Plant, layer: int, target: str) -> Any:
    return plant.model.get_submodule(f"{plant.layout.blocks}.{layer}.{PATHS[target]}")


def key(layer: int, target: str, side: str, blocks: str = "model.layers") -> str:
    return f"base_model.model.{blocks}.{layer}.{PATHS[target]}.lora_{side}.weight"


def saved(
    folder: Path,
    plant: Plant,
    places: tuple[tuple[int, str], ...] = WHOLE,
    *,
    change: dict[str, Tensor | None] | None = None,
    ranks: dict[tuple[int, str], int] | None = None,
    **config: Any,
) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """Write a random adapter; returns A and B of each map, without the scale."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(4)
    pairs, tensors = {}, {}
    for place in places:
        out, inner = module(plant, *place).weight.shape
        r = (ranks or {}).get(place, RANK)
        A, B = (0.3 * torch.randn(shape, generator=generator) for shape in ((r, inner), (out, r)))
        pairs[place] = A, B
        tensors |= {key(*place, "A"): A, key(*place, "B"): B}
    whole = {name: t for name, t in {**tensors, **(change or {})}.items() if t is not None}
    save_file(whole, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    return pairs


def test_a_plan_holds_the_update_of_every_map(plant: Plant, tmp_path: Path) -> None:
    pairs = saved(tmp_path, plant)
    assert is_adapter(tmp_path)
    plan = import_adapter(tmp_path, "lora", plant)
    assert (plan.model, plan.layers, len(plan.modules)) == (plant.fingerprint, (0, 2), len(WHOLE))
    for layer, target, A, B in plan.factors():
        expected = 2 * pairs[layer, target][1] @ pairs[layer, target][0]  # alpha / r = 6 / 3
        torch.testing.assert_close(B.mT @ A, expected)
        assert torch.equal(A, pairs[layer, target][0])
    assert AdapterPlan.from_artifact(plan.artifact()).modules == plan.modules


def test_an_adapter_in_float64_is_the_merged_model(tmp_path: Path) -> None:
    """Two adapters, one with a coefficient for each part: the logits of W + Σ α s B A."""
    plant = Plant(tiny("llama", dtype=torch.float64), tiny_tokenizer())
    merged = Plant(tiny("llama", dtype=torch.float64), tiny_tokenizer())
    mix = {"*": 0.5, "mlp": -0.75, "layers.2.down": 1.5, "layers.0.q": 0.0}
    (ids,) = prompts(1)
    shell = plant.shell()
    for name, weights in (("one", mix), ("two", 0.3)):
        pairs = saved(tmp_path / name, plant, WHOLE if name == "one" else ((1, "v"), (2, "o")))
        plan = import_adapter(tmp_path / name, name, plant)
        intervention = AdapterMix(plan=name, weights=weights, strength=0.8)
        alpha = intervention.coefficients(plan)
        hook_laws(plant, shell, intervention.compile(OnePlan(plan)).laws, torch.float64)
        for place, (A, B) in pairs.items():
            coefficient = 0.8 * alpha[f"layers.{place[0]}.{place[1]}"] * 2
            module(merged, *place).weight.data += coefficient * B.double() @ A.double()
    ids_BT = torch.tensor([ids])
    with torch.no_grad():
        steered, expected, plain = (m(ids_BT).logits for m in (shell, merged.model, plant.model))
    # The norms compute in float32, so the last bits of two orders of summation are theirs.
    scale = float(expected.abs().max())
    assert float((steered - expected).abs().max()) <= PLANT["jacobian_mixed"] * scale
    assert float((plain - expected).abs().max()) > 0.05 * scale


def test_ranks_and_alphas_may_differ_by_map(plant: Plant, tmp_path: Path) -> None:
    places = ((0, "q"), (0, "down"), (1, "down"))
    pairs = saved(
        tmp_path,
        plant,
        places,
        ranks={(0, "down"): 2, (1, "down"): 2},
        rank_pattern={"down_proj": 2},
        alpha_pattern={"^model.layers.1.mlp.down_proj": 10, "mlp.down_proj": 4, "proj": 99},
        use_rslora=True,
    )
    scales = {(0, "q"): 6 / math.sqrt(3), (0, "down"): 4 / math.sqrt(2), (1, "down"): 10 / math.sqrt(2)}
    plan = import_adapter(tmp_path, "lora", plant)
    assert plan.ranks == (3, 2, 2)
    for layer, target, A, B in plan.factors():
        torch.testing.assert_close(B.mT @ A, scales[layer, target] * pairs[layer, target][1] @ pairs[layer, target][0])


def test_names_follow_the_family(tmp_path: Path) -> None:
    """GPT-2 keeps its maps elsewhere and fuses q, k and v: only the last ones are sites."""
    plant = Plant(tiny("gpt2"), tiny_tokenizer())
    name = "base_model.model.transformer.h.1.mlp.c_proj.lora_"
    tensors = {f"{name}A.weight": torch.randn(RANK, 48), f"{name}B.weight": torch.randn(32, RANK)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {**CONFIG, "target_modules": ["c_proj"], "fan_in_fan_out": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert import_adapter(tmp_path, "lora", plant).modules == ("layers.1.down",)
    fused = {k.replace("mlp.c_proj", "attn.c_attn"): v for k, v in tensors.items()}
    save_file(fused, tmp_path / "adapter_model.safetensors")
    with pytest.raises(SpecError, match="lora_A and lora_B of c_proj, named as"):
        import_adapter(tmp_path, "lora", plant)


@pytest.mark.parametrize(
    ("config", "param"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"a_setting_of_tomorrow": 1}, "a_setting_of_tomorrow"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"target_modules": ["q_proj"]}, "target_modules"),
        ({"rank_pattern": {"(a+)+$": 2}}, "rank_pattern"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_alpha": True}, "lora_alpha"),
        ({"lora_alpha": 1e999}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"r": None}, "r"),
    ],
)
def test_what_is_no_low_rank_update_is_refused_by_name(
    plant: Plant, tmp_path: Path, config: dict[str, Any], param: str
) -> None:
    saved(tmp_path, plant, **config)
    with pytest.raises(SpecError) as caught:
        import_adapter(tmp_path, "lora", plant)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({key(0, "q", "A"): None}, "has not both lora_A and lora_B"),
        ({key(0, "q", "A"): torch.zeros(RANK)}, "shapes of .* disagree"),
        ({key(0, "q", "B"): torch.zeros(32, 2)}, "shapes of .* disagree"),
        ({key(0, "q", "A"): torch.full((RANK, 32), math.inf)}, "NaN or Inf"),
        ({key(0, "q", "A"): torch.zeros(2, 32), key(0, "q", "B"): torch.zeros(32, 2)}, "rank 2, and 3 in adapter_conf"),
    ],
)
def test_damaged_files_are_refused(plant: Plant, tmp_path: Path, change: dict[str, Tensor | None], wanted: str) -> None:
    saved(tmp_path, plant, change=change)
    with pytest.raises(ArtifactCorrupt, match=wanted):
        import_adapter(tmp_path, "lora", plant)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight",
        "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight",
    ],
)
def test_tensors_of_something_else_are_refused(plant: Plant, tmp_path: Path, name: str) -> None:
    saved(tmp_path, plant, change={name: torch.zeros(1, 1)})
    with pytest.raises(SpecError, match="lora_A and lora_B of down_proj, gate_proj") as caught:
        import_adapter(tmp_path, "lora", plant)
    assert caught.value.param == "folder"


def test_another_width_is_refused(plant: Plant, tmp_path: Path) -> None:
    saved(tmp_path, plant)
    with pytest.raises(SpecError, match=r"layers\.0\.q of 16 → 16, got .32, 32"):
        import_adapter(tmp_path, "lora", Plant(tiny("llama", width=16), tiny_tokenizer()))


def test_pickles_and_absent_files_are_named(plant: Plant, tmp_path: Path) -> None:
    assert not is_adapter(tmp_path)
    with pytest.raises(SpecError, match="readable adapter_config"):
        import_adapter(tmp_path, "lora", plant)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n")
    with pytest.raises(SpecError, match="is a pickle"):
        import_adapter(tmp_path, "lora", plant)
    (tmp_path / "adapter_config.json").write_text("[" * 10**5)
    with pytest.raises(SpecError, match="readable adapter_config"):
        import_adapter(tmp_path, "lora", plant)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_what_is_no_real_number_is_refused(plant: Plant, tmp_path: Path, dtype: torch.dtype) -> None:
    saved(tmp_path, plant, change={key(0, "q", "A"): torch.ones(RANK, WIDTH).to(dtype)})
    with pytest.raises(ArtifactCorrupt, match="not of real numbers"):
        import_adapter(tmp_path, "lora", plant)


def test_what_no_artifact_could_hold_in_float32_is_refused(
    plant: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of it on the disk, in 16 bits: the store would take the plan and never read it again."""
    change = {
        key(0, "q", side): torch.ones(shape).bfloat16() for side, shape in (("A", (RANK, WIDTH)), ("B", (WIDTH, RANK)))
    }
    saved(tmp_path, plant, ((0, "q"),), change=change)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert size < 8 * RANK * WIDTH
    monkeypatch.setattr("steering.formats.pyreft.MAX_BYTES", 8 * RANK * WIDTH - 1)
    with pytest.raises(ArtifactCorrupt, match="too large"):
        import_adapter(tmp_path, "lora", plant)
