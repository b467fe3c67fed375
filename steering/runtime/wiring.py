"""What the engine asks of a model before it starts: its module tree and its pool of keys and values."""

from __future__ import annotations

import uuid
import weakref
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from steering.plant.plant import Plant
from steering.runtime.attention import PagedAttention, ShapeProbe, register, unregister
from steering.runtime.cache import KVPool, free_bytes, pool_size, position_bytes
from steering.runtime.settings import EngineSettings


class Wired(NamedTuple):
    """A module tree of the plant that attends over the blocks of a pool, and the positions that a sequence may have."""

    shell: PreTrainedModel
    attention: PagedAttention
    max_model_len: int


def wire(plant: Plant, settings: EngineSettings) -> Wired:
    """Make the tree and its pool; what a pool must hold is measured by running one token, in every family alike.

    The attention is known to transformers under a fresh name for as long as the tree lives.
    Raises SpecError if the pool does not fit in memory or `max_model_len` exceeds the model's context.
    """
    name = f"setpoint_blocks_{uuid.uuid4().hex}"
    probe = ShapeProbe()
    register(name, probe)
    try:
        shell = plant.shell(name)
        with torch.inference_mode():
            one = torch.zeros(1, 1, dtype=torch.int64, device=plant.device)
            shell(input_ids=one, position_ids=one, use_cache=False)
        shapes = [probe.shapes[layer] for layer in sorted(probe.shapes)]
        per_position = position_bytes(shapes, probe.dtype)
        n_blocks, max_model_len = pool_size(
            settings.max_batch,
            settings.kv_tokens,
            settings.max_model_len,
            steady_context(plant),
            per_position,
            _room(plant),
        )
        pool = KVPool(shapes, n_blocks, probe.dtype, plant.device)
    except BaseException:
        unregister(name)
        raise
    attention = PagedAttention(pool)
    register(name, attention)
    weakref.finalize(shell, unregister, name)
    return Wired(shell, attention, max_model_len)


def _room(plant: Plant) -> int:
    """Memory that a pool may be made of: where several processes share the model, as much as each of them has."""
    free = free_bytes(plant.device)
    if plant.group is None:
        return free
    return plant.group.least(free if plant.device.type == "cuda" else free // plant.group.size)


def steady_context(plant: Plant) -> int:
    """Positions the engine may use: the model's context, or, where the rotary frequencies of a longer text change for
    the whole batch, the length up to which they do not."""
    config = plant.model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    if rope.get("rope_type") in ("longrope", "dynamic") and original:
        return min(plant.context, int(original))
    return plant.context
