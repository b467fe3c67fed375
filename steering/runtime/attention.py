"""Attention over the blocks of the pool, put under unmodified Hugging Face modelling code.

A step's tokens are packed in one sequence (1, T). Each layer writes its keys and values to their blocks and attends

    o_t = softmax(s(q_t·k_i / scale) + mask) v_i     over i ≤ t of the same row (and i > t − window, if there is one)

with s the soft cap c·tanh(·/c) of Gemma 2, else the identity. Single tokens attend in one call that reads the blocks
where they lie; longer segments one by one, over a copy of the blocks before them if there are any. The query heads of a
group share their keys by shape (kv heads, group), so nothing is repeated in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from kernels import paged_attention
from steering.runtime.cache import KVPool, KVShape
from steering.runtime.placement import Placement


class PagedAttention:
    """The attention function of one engine. `place` must be set before each forward pass."""

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self.place: Placement | None = None

    def leave_out(self, layer: int) -> None:
        """Have the step's tokens leave zeros in a layer that does not run.

        In a batch with others it may run later, and a mask that nothing passes multiplies what it reads: what a block's
        last holder left there may be NaN.
        """
        assert self.place is not None
        self.pool.erase(layer, self.place.at_T)

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """query (1, H, T, W), key and value (1, kv heads, T, W) → (1, T, H, W), as transformers' interface asks."""
        place, layer = self.place, int(module.layer_idx)  # type: ignore[arg-type]
        assert place is not None
        self.pool.write(layer, place.at_T, key[0].transpose(0, 1), value[0].transpose(0, 1))
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        query_THW = query[0].transpose(0, 1)
        n = place.n_decode
        single_NHU = None
        if n:
            keys, values = self.pool.keys[layer], self.pool.values[layer]
            single_NHU = paged_attention(
                query_THW[:n], keys, values, place.table_NM, place.length_N, scale, softcap or 0.0, sliding_window or 0
            )
            if not place.spans:
                return single_NHU[None], None
        out_THU = query.new_empty(*query_THW.shape[:2], value.shape[-1])
        if single_NHU is not None:
            out_THU[:n] = single_NHU
        for span in place.spans:
            own = slice(span.offset, span.offset + span.length)
            k_KTW, v_KTU = key[0, :, own], value[0, :, own]
            if span.block_M is not None:
                k_KTW, v_KTU = self.pool.read(layer, span.block_M, span.start + span.length)
            q_KGTW = query[0, :, own].unflatten(0, (key.shape[1], -1))
            mask = place.span_mask(span, sliding_window, query.dtype)
            o_KGTU = _attend(q_KGTW, k_KTW[:, None], v_KTU[:, None], mask, scale, softcap)
            out_THU[own] = o_KGTU.flatten(0, 1).transpose(0, 1)
        return out_THU[None], None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Attention over the last two dimensions; leading ones of key and value broadcast over those of query."""
    if softcap is None:
        key = key.expand(*query.shape[:2], *key.shape[2:])
        value = value.expand(*query.shape[:2], *value.shape[2:])
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    scores = softcap * torch.tanh(query @ key.mT * scale / softcap) + mask
    return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value


class ShapeProbe:
    """Stands in for the attention while one token runs, and notes what a cache must hold for each layer."""

    def __init__(self) -> None:
        self.shapes: dict[int, KVShape] = {}
        self.dtype = torch.float32

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
    ) -> tuple[Tensor, None]:
        """Attention of one token over itself: its value, repeated for the group."""
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        self.shapes[layer] = KVShape((key.shape[1], key.shape[3]), (value.shape[1], value.shape[3]))
        self.dtype = key.dtype
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2), None


def register(name: str, attention: Callable[..., tuple[Tensor, None]]) -> None:
    """Make an attention function known to transformers as `name`.

    No mask function goes with it: where there is none, transformers makes no mask, which is what a packed batch needs.
    """
    AttentionInterface.register(name, attention)


def unregister(name: str) -> None:
    """Forget an attention function, or its cache would live as long as the process. transformers has no call for it."""
    AttentionInterface._global_mapping.pop(name, None)
