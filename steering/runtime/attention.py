"""Attention over the rows of the cache, put under unmodified Hugging Face modelling code.

A step's tokens are packed in one sequence (1, T). Each layer writes its keys and values to their rows and attends

    o_t = softmax(s(q_t·k_i / scale) + mask) v_i     over i ≤ t of the same row (and i > t − window, if there is one)

with s the soft cap c·tanh(·/c) of Gemma 2, else the identity. Single tokens attend as one padded batch, longer segments
one by one. The query heads of a group share their keys by shape (kv heads, group), so nothing is repeated in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from steering.runtime.cache import KVCache, KVShape
from steering.runtime.scheduler import Batch


@dataclass(slots=True)
class Placement:
    """Where a step's tokens lie in the cache, on the device; masks are made once per step and window."""

    at_T: Tensor
    """Flat place row · length + position of every token."""
    n_decode: int
    rows: Tensor | slice
    """Rows of the single tokens: a slice from 0 if they are dense there, else an index."""
    query_rows: Tensor | None
    """Where the single tokens lie in that slice, None if one to one."""
    n_rows: int
    position_N: Tensor
    """Position of the query in every attended row; 0 in rows of the slice that do not decode now."""
    longest: int
    spans: tuple[tuple[int, int, int, int], ...]
    """(row, start, length, offset) of every longer segment."""
    masks: dict[tuple[Any, ...], Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Batch, at_T: Tensor, device: torch.device) -> Placement:
        """The placement of a packed batch whose tokens go to the flat places `at_T`."""
        single = batch.segments[: batch.n_decode]
        used, positions = [s.row for s in single], [s.start for s in single]
        top = used[-1] + 1 if used else 0
        rows: Tensor | slice = slice(0, top)
        query_rows = None
        if top > 2 * len(used):  # sparse: copying the few rows is cheaper than attending the empty ones
            rows = torch.tensor(used, device=device)
            top = len(used)
        elif top > len(used):
            query_rows = torch.tensor(used, device=device)
            spread = [0] * top
            for row, position in zip(used, positions, strict=True):
                spread[row] = position
            positions = spread
        return cls(
            at_T=at_T,
            n_decode=len(single),
            rows=rows,
            query_rows=query_rows,
            n_rows=top,
            position_N=torch.tensor(positions, dtype=torch.int64, device=device),
            longest=max(positions, default=0) + 1,
            spans=tuple((s.row, s.start, s.length, s.offset) for s in batch.segments[batch.n_decode :]),
        )

    def decode_mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Additive (N, 1, 1, longest); None where nothing is masked."""
        key = ("decode", window, dtype)
        if key not in self.masks:
            at = torch.arange(self.longest, device=self.position_N.device)
            seen = at <= self.position_N[:, None]
            if window is not None:
                seen &= at > self.position_N[:, None] - window
            self.masks[key] = None if self.n_rows == 1 and window is None else additive(seen, dtype)[:, None, None]
        return self.masks[key]

    def span_mask(self, start: int, length: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive (length, start + length): causal behind a prefix of `start` positions."""
        key = (start, length, window, dtype)
        if key not in self.masks:
            at = torch.arange(start + length, device=self.at_T.device)
            query = at[start:, None]
            seen = at <= query
            if window is not None:
                seen &= at > query - window
            self.masks[key] = additive(seen, dtype)
        mask = self.masks[key]
        assert mask is not None
        return mask


class RowAttention:
    """The attention function of one engine. `place` must be set before each forward pass."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self.place: Placement | None = None

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
        self._cache.write(layer, place.at_T, key[0].transpose(0, 1), value[0].transpose(0, 1))
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        n_kv, n_tokens = key.shape[1], query.shape[2]
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        grouped = query[0].unflatten(0, (n_kv, -1))  # (kv heads, group, T, W)
        out = query.new_empty(n_tokens, n_kv, grouped.shape[1], value.shape[-1])  # (T, kv heads, group, W)

        if place.n_decode:
            q_NKGW = grouped[:, :, : place.n_decode].permute(2, 0, 1, 3)
            if place.query_rows is not None:
                q_NKGW = q_NKGW.new_zeros(place.n_rows, *q_NKGW.shape[1:]).index_copy_(0, place.query_rows, q_NKGW)
            k_NKTW = keys[place.rows, : place.longest].transpose(1, 2)
            v_NKTW = values[place.rows, : place.longest].transpose(1, 2)
            mask = place.decode_mask(sliding_window, query.dtype)
            o_NKGW = _attend(q_NKGW, k_NKTW, v_NKTW, mask, scale, softcap)
            out[: place.n_decode] = o_NKGW if place.query_rows is None else o_NKGW[place.query_rows]

        for row, start, length, offset in place.spans:
            end = start + length
            q_KGTW = grouped[:, :, offset : offset + length]
            k_KTW, v_KTW = keys[row, :end].transpose(0, 1), values[row, :end].transpose(0, 1)
            mask = place.span_mask(start, length, sliding_window, query.dtype)
            o_KGTW = _attend(q_KGTW, k_KTW[:, None], v_KTW[:, None], mask, scale, softcap)
            out[offset : offset + length] = o_KGTW.permute(2, 0, 1, 3)
        return out.flatten(1, 2)[None], None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """Attention over the last two dimensions; leading ones of key and value broadcast over those of query."""
    if softcap is None:
        key = key.expand(*query.shape[:2], *key.shape[2:])
        value = value.expand(*query.shape[:2], *value.shape[2:])
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    scores = softcap * torch.tanh(query @ key.mT * scale / softcap)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `seen`, −inf elsewhere. Made once a step: attention would convert a boolean mask again in every layer."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


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
