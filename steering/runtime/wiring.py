"""What the engine asks of a model before it starts: its module tree and its cache."""

from __future__ import annotations

import uuid
import weakref
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from steering.plant.plant import Plant
from steering.runtime.attention import RowAttention, ShapeProbe, register, unregister
from steering.runtime.cache import KVCache, cache_length, free_bytes
from steering.runtime.settings import EngineSettings


class Wired(NamedTuple):
    """A module tree of the plant that attends over the rows of a cache."""

    shell: PreTrainedModel
    attention: RowAttention
    cache: KVCache


def wire(plant: Plant, settings: EngineSettings) -> Wired:
    """Make the tree and its cache; what a cache must hold is measured by running one token, in every family alike.

    The attention is known to transformers under a fresh name for as long as the tree lives.
    Raises SpecError if the cache does not fit in memory or `max_len` exceeds the model's context.
    """
    name = f"setpoint_rows_{uuid.uuid4().hex}"
    probe = ShapeProbe()
    register(name, probe)
    try:
        shell = plant.shell(name)
        with torch.inference_mode():
            one = torch.zeros(1, 1, dtype=torch.int64, device=plant.device)
            shell(input_ids=one, position_ids=one, use_cache=False)
        shapes = [probe.shapes[layer] for layer in sorted(probe.shapes)]
        free, rows = free_bytes(plant.device), settings.max_batch
        length = cache_length(shapes, rows, settings.max_len, steady_context(plant), probe.dtype, free)
        cache = KVCache(shapes, rows, length, probe.dtype, plant.device)
    except BaseException:
        unregister(name)
        raise
    attention = RowAttention(cache)
    register(name, attention)
    weakref.finalize(shell, unregister, name)
    return Wired(shell, attention, cache)


def steady_context(plant: Plant) -> int:
    """Positions the engine may use: the model's context, or, where the rotary frequencies of a longer text change for
    the whole batch, the length up to which they do not."""
    config = plant.model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    if rope.get("rope_type") in ("longrope", "dynamic") and original:
        return min(plant.context, int(original))
    return plant.context
