"""Reading a checkpoint: configuration, weights and tokenizer from a folder or the hub, each failure in one sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from steering.errors import PlantError, echo

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)

UNLOADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError)
"""What `from_pretrained` raises for absent, unreadable or damaged files."""


def device_of(device: str | torch.device) -> torch.device:
    """The device, after checking that a tensor can be put there."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise PlantError(f"The device {str(device)!r} cannot be used: {reason_of(error)}.", param="device") from error


def attend(model: PreTrainedModel, attn: str) -> None:
    """Give `model` this attention implementation. Raises PlantError if it does not have it."""
    try:
        model.set_attn_implementation(attn)
    except (ValueError, ImportError) as error:
        raise PlantError(
            f"The attention {attn!r} is not available for this model: {reason_of(error)}.", param="attn"
        ) from error


def load_weights(name: str, revision: str | None, dtype: Dtype, **quantised: Any) -> PreTrainedModel:
    """The checkpoint's model, on the CPU unless it is loaded `quantised`.

    Raises PlantError if it cannot be loaded, or not all of it.
    """
    given = {key: value for key, value in quantised.items() if value is not None}
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype=dtype, output_loading_info=True, trust_remote_code=False, **given
        )
    except UNLOADABLE as error:
        raise not_loaded(name, error) from error
    if info["missing_keys"]:  # transformers would go on with random weights
        first = min(info["missing_keys"])
        raise PlantError(
            f"The model {echo(name)} is incomplete: {len(info['missing_keys'])} weights are missing, the first is "
            f"{first}; download it again.",
            param="model",
        )
    return cast(PreTrainedModel, loaded)


def weight_files(name: str, revision: str | None) -> list[Path]:
    """The safetensors files of a checkpoint that has been loaded. Raises PlantError if it has none."""
    folder = Path(name if os.path.isdir(name) else snapshot_download(name, revision=revision, local_files_only=True))
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.exists():
        return sorted({folder / file for file in json.loads(index.read_text())["weight_map"].values()})
    if not (folder / SAFE_WEIGHTS_NAME).exists():
        raise PlantError(
            f"The model {echo(name)} has no safetensors files, which a quantised model is identified by: convert it.",
            param="model",
        )
    return [folder / SAFE_WEIGHTS_NAME]


def load_tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights. Raises PlantError if it is missing or damaged."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        files = sorted({"tokenizer.json", *tokenizer.vocab_files_names.values()})
        if os.path.isdir(name) and not any(os.path.exists(os.path.join(name, file)) for file in files):
            # Some families then get an empty vocabulary without a word.
            raise FileNotFoundError(f"none of {', '.join(files)} is there")
    except Exception as error:  # every tokenizer class fails in its own way without its files
        raise PlantError(
            f"The model {echo(name)} has no usable tokenizer ({reason_of(error)}): put its tokenizer files beside the "
            "weights.",
            param="model",
        ) from error
    return cast(PreTrainedTokenizerBase, tokenizer)


def not_loaded(name: str, error: Exception) -> PlantError:
    """The error of a model that could not be loaded."""
    return PlantError(
        f"The model {echo(name)} cannot be loaded ({reason_of(error)}): expected a folder with a Hugging Face "
        "checkpoint, or the name of one that the hub cache holds or the network can reach.",
        param="model",
    )


def reason_of(error: Exception) -> str:
    """The first line of an error, without its full stop: libraries add paragraphs of advice."""
    lines = str(error).strip().splitlines()
    reason = lines[0].strip().rstrip(".") if lines else type(error).__name__
    return reason if len(reason) <= 160 else reason[:159] + "…"
