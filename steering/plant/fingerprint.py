"""The identity of a checkpoint: equal for the same weights, whatever number format serves them.

    sha256( family, the settings that change the function but no weight, then per parameter in order of name:
            name, shape, values rounded to bfloat16 )

A concept fitted in float32 must load where the same checkpoint is served in bfloat16, so values are compared as
bfloat16. float16 cannot hold every bfloat16: there `Plant.load` takes the fingerprint in the checkpoint's own format.
Models of up to 2²⁴ parameters are hashed whole. Of larger ones, tensors of more than 2¹⁶ values give 64 evenly spaced
runs of 1024: every fine-tuned matrix shows, a single edited weight may not.

A quantised model is another function and has another identity: that of the tensors its checkpoint stores, with their
names in it, and of the quantisation's name. Not of the quantised weights in memory, which devices pack each their own
way and round each their own way.

Depends on: weights, tying, family, heads, rotary settings, norm epsilon, soft caps, windows, activation, scales.
Does not depend on: dtype, device, attention implementation, path, tokenizer, generation settings, library version.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

WHOLE_MODEL = 2**24
"""Parameters up to which a model is hashed whole."""
RUNS, RUN = 64, 1024
"""Runs taken from a large tensor of a large model, and the values in each."""

SETTINGS = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "query_pre_attn_scalar",
    "rope_parameters",
    "layer_types",
    "sliding_window",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "use_parallel_residual",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "num_experts_per_tok",
    "tie_word_embeddings",
)
"""Settings that change what the weights compute. A list of what counts, not of what does not: configurations gain
fields with every release of transformers, and an artifact must outlive it."""


def fingerprint(model: PreTrainedModel) -> str:
    """`sha256:` and 64 hexadecimal digits that identify `model`'s function. Under a second at 8 billion parameters."""
    parameters = sorted(model.named_parameters())
    whole = sum(p.numel() for _, p in parameters) <= WHOLE_MODEL
    digest = hashlib.sha256(_settings(model.config))
    for name, parameter in parameters:
        digest.update(f"\n{name} {tuple(parameter.shape)} ".encode())
        digest.update(_content(whole_tensor(parameter.detach()), whole))
    return f"sha256:{digest.hexdigest()}"


def whole_tensor(parameter: Tensor) -> Tensor:
    """A parameter of which each of several processes has a part; all of them must ask. Itself where one has it all."""
    gather = getattr(parameter, "full_tensor", None)  # a DTensor, whose module takes a second to import
    return parameter if gather is None else cast(Tensor, gather())


def stored_fingerprint(files: Iterable[Path], config: PreTrainedConfig, quantization: str) -> str:
    """The identity of a model that is quantised, on loading or as it is stored in these safetensors files."""
    digest = hashlib.sha256(_settings(config) + f"\nquantised: {quantization}".encode())
    tensors: dict[str, Callable[[], Tensor]] = {}
    sizes: dict[str, int] = {}
    with ExitStack() as stack:
        for file in files:
            opened = stack.enter_context(safe_open(file, framework="pt"))
            tensors |= {name: partial(opened.get_tensor, name) for name in opened.keys()}  # noqa: SIM118
            sizes |= {name: math.prod(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        whole = sum(sizes.values()) <= WHOLE_MODEL
        for name in sorted(tensors):
            values = tensors[name]()
            digest.update(f"\n{name} {tuple(values.shape)} ".encode())
            digest.update(_content(values, whole))
    return f"sha256:{digest.hexdigest()}"


def _settings(config: PreTrainedConfig) -> bytes:
    text = config.get_text_config()
    settings = {name: getattr(text, name, None) for name in SETTINGS}
    return json.dumps({"family": text.model_type} | settings, sort_keys=True, default=str).encode()


def _content(values: Tensor, whole: bool) -> bytes:
    """The bytes of a parameter that are hashed: of floats as bfloat16, of quantised storage as it lies."""
    flat = values.reshape(-1)
    if not whole and flat.numel() > RUNS * RUN:
        stride = flat.numel() // RUNS
        flat = flat[: RUNS * stride].view(RUNS, stride)[:, :RUN]
    if flat.is_floating_point():
        flat = flat.to(torch.bfloat16)
    return flat.contiguous().cpu().view(torch.uint8).numpy().tobytes()
