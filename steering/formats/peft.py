"""Adapter plans from PEFT's LoRA folders: `adapter_config.json` and `adapter_model.safetensors`, never pickle.

    W x  →  W x + s B A x,      s = alpha / r,  or alpha / √r with `use_rslora`

Of a linear map the file holds `base_model.model.MAP.lora_A.weight` (r, in) and `….lora_B.weight` (out, r). r and alpha
are those of the configuration, or of `rank_pattern` and `alpha_pattern` where a key names the map or the end of its
name; the first that does counts. `fan_in_fan_out` turns only the merged product, so it is of no account here.

Taken are maps whose input and output are sites: q, k, v, o, gate, up and down, where the family has them apart. What
would make the model another one than W + s B A is refused by name: DoRA, biases, `modules_to_save`, embeddings, initial
weights that change the base model (PiSSA, OLoRA, LoftQ), and every setting not known to be harmless that is not off.
Patterns that are regular expressions are refused too, for one can be made to run for years.
Source: PEFT's `lora/config.py`, `lora/layer.py` and `get_pattern_key`, read, not copied.   Oracle: merged weights.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steering.artifact import checked_name
from steering.errors import SpecError
from steering.formats.pyreft import read_tensors, unusable
from steering.plan import MAX_RANK, AdapterPlan
from steering.plan.adapter import SITES, TARGETS, Target
from steering.plant.plant import Plant
from steering.types import Site

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG = 2**20
"""Longest `adapter_config.json`, in bytes: one of PEFT's has a thousand."""
MAX_SETTING = 10**6
"""Beyond any rank and any alpha; JSON has whole numbers that no float holds."""
READ = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
        "init_lora_weights")  # fmt: skip
HARMLESS = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
    "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
)  # fmt: skip
"""Settings of the training, or about where the adapter goes, which the file itself tells. The initial weights' own
settings count only with the `init_lora_weights` that they belong to."""
INITIAL: tuple[object, ...] = (True, False, None, "gaussian", "eva", "orthogonal")
"""Initial weights that leave the base model as it was."""
KEY = re.compile(r"(?P<map>.+)\.lora_(?P<side>[AB])\.weight")
NAME = re.compile(r"[\w.]+")


class Pair(NamedTuple):
    """A (r, in) and Bᵀ (r, out) of one linear map, the scale in Bᵀ."""

    A_RD: Tensor
    B_RE: Tensor


def is_adapter(folder: Path) -> bool:
    """Whether a folder is one of PEFT's."""
    return (folder / CONFIG).is_file()


def import_adapter(folder: Path, name: str, plant: Plant) -> AdapterPlan:
    """A plan from a folder of PEFT's. Raises SpecError for what cannot be taken, ArtifactCorrupt for a damaged file."""
    checked_name(name)
    config = _config(folder)
    file = folder / WEIGHTS
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        advice = "adapter_model.bin is a pickle: save it with safe_serialization=True" if pickled else ""
        raise SpecError("folder", expected=f"a folder with {WEIGHTS}", got=folder.name, advice=advice)
    known = _maps(plant)
    pairs = {known[path]: _pair(file, path, two, config) for path, two in _sorted_in(file, known).items()}
    order = sorted(pairs, key=lambda found: (found[0], TARGETS.index(found[1])))
    for layer, target in order:
        read, write = SITES[target]
        wanted = plant.width_of(Site(read, layer)), plant.width_of(Site(write, layer))
        found = pairs[layer, target].A_RD.shape[1], pairs[layer, target].B_RE.shape[1]
        if found != wanted:
            raise SpecError("folder", expected=f"layers.{layer}.{target} of {wanted[0]} → {wanted[1]}", got=found)
    plan = AdapterPlan(
        name=name,
        model=plant.fingerprint,
        depth=plant.depth,
        width=plant.width,
        quality={},
        provenance={"imported": "peft", "base": str(config.get("base_model_name_or_path") or "")[:256]},
        modules=tuple(f"layers.{layer}.{target}" for layer, target in order),
        ranks=tuple(len(pairs[place].A_RD) for place in order),
        inner=tuple(pairs[place].A_RD.shape[1] for place in order),
        outer=tuple(pairs[place].B_RE.shape[1] for place in order),
        a=torch.cat([pairs[place].A_RD.flatten() for place in order]),
        b=torch.cat([pairs[place].B_RE.flatten() for place in order]),
    )
    return AdapterPlan.from_artifact(plan.artifact())


def _config(folder: Path) -> dict[str, Any]:
    """The configuration, after what cannot be honoured was refused by name. Raises SpecError."""
    path = folder / CONFIG
    try:
        if path.stat().st_size > MAX_CONFIG:
            raise SpecError("folder", expected=f"an {CONFIG} of at most {MAX_CONFIG} bytes")
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError("folder", expected=f"a folder with a readable {CONFIG}", got=folder.name) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise SpecError("peft_type", expected="LORA", got=kind)
    if config.get("init_lora_weights", True) not in INITIAL:
        raise SpecError(
            "init_lora_weights",
            expected="initial weights that leave the base model as it is",
            got=config["init_lora_weights"],
            advice="save the adapter as one of the unchanged model (path_initial_model_for_weight_conversion)",
        )
    for field, value in config.items():
        if field not in READ and field not in HARMLESS and value and value != "none":
            raise SpecError(field, expected="off, for no low-rank update alone has its effect", got=value)
    return config


def _maps(plant: Plant) -> dict[str, tuple[int, Target]]:
    """The model's linear maps that an adapter can update, by the name that PEFT gives them."""
    layout = plant.layout
    paths: dict[str, Target] = {layout.attn_act: "o"}
    if layout.mlp_act is not None:
        paths[layout.mlp_act] = "down"
    paths |= {layout.outputs[write]: target for target, (_, write) in SITES.items() if write in layout.outputs}
    return {
        f"base_model.model.{layout.blocks}.{layer}.{path}": (layer, target)
        for layer in range(plant.depth)
        for path, target in paths.items()
    }


def _sorted_in(file: Path, known: Mapping[str, object]) -> dict[str, dict[str, Tensor]]:
    """The file's tensors by linear map and side. Raises SpecError for one that is no update of a known map."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(file).items():
        match = KEY.fullmatch(key)
        if match is None or match["map"] not in known:
            ends = sorted({path.rpartition(".")[2] for path in known})
            first = min(known)
            raise SpecError(
                "folder", expected=f"lora_A and lora_B of {', '.join(ends)}, named as {first}.lora_A.weight", got=key
            )
        found.setdefault(match["map"], {})[match["side"]] = tensor
    if not found:
        raise unusable(file, "it holds no tensor")
    return found


def _pair(file: Path, path: str, two: Mapping[str, Tensor], config: Mapping[str, Any]) -> Pair:
    """The factors of one map, the scale multiplied in. Raises ArtifactCorrupt, and SpecError for a setting."""
    module = path.removeprefix("base_model.model.")
    if set(two) != {"A", "B"}:
        raise unusable(file, f"{module} has not both lora_A and lora_B")
    A_RD, B_ER = two["A"], two["B"]
    if A_RD.ndim != 2 or B_ER.ndim != 2 or len(A_RD) != B_ER.shape[1]:
        raise unusable(file, f"the shapes of {module} disagree")
    if not bool(A_RD.isfinite().all() and B_ER.isfinite().all()):
        raise unusable(file, f"{module} holds NaN or Inf")
    targets = config.get("target_modules")
    if isinstance(targets, list) and not any(_ends_with(module, str(target)) for target in targets):
        raise SpecError("target_modules", expected=f"modules with {module}, of which there are weights", got=targets)
    r = _setting(config, "rank_pattern", "r", module, default=8)
    alpha = _setting(config, "alpha_pattern", "lora_alpha", module, default=8)
    if r != len(A_RD):
        raise unusable(file, f"{module} has rank {len(A_RD)}, and {r:g} in {CONFIG}")
    if r > MAX_RANK:
        raise SpecError("r", expected=f"at most {MAX_RANK}", got=r)
    scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    return Pair(A_RD.contiguous(), (scale * B_ER.mT).contiguous())


def _setting(config: Mapping[str, Any], patterns: str, plain: str, module: str, *, default: int) -> float:
    """What holds for one map: the first pattern that fits it, else the plain setting. Raises SpecError."""
    table = config.get(patterns) or {}
    if not isinstance(table, dict):
        raise SpecError(patterns, expected="an object", got=table)
    value, field = config.get(plain, default), plain
    for key, own in table.items():
        if not NAME.fullmatch(key.removeprefix("^")):
            raise SpecError(patterns, expected="names of modules, or ends of them, as keys", got=key)
        if field == plain and (module == key.removeprefix("^") if key.startswith("^") else _ends_with(module, key)):
            value, field = own, patterns
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_SETTING:
        raise SpecError(field, expected=f"a number > 0, at most {MAX_SETTING}", got=value)
    return value


def _ends_with(module: str, name: str) -> bool:
    """Whether `name` is the module, or a whole part at the end of its name."""
    return module == name or module.endswith(f".{name}")
