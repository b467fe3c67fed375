"""Prompts at rest: each block as a map of the last token alone, over the keys and values of the prefix before it.

    o = softmax(s([K_p q ; k·q] · scale) + mask_p) [V_p ; v]     q, k, v of the moving token, K_p, V_p of p's prefix

s is the soft cap c·tanh(·/c) where the family has one, else the identity. Rows are (P, K): K states of each of P
prompts, which block and attention see as K tokens that all follow the prefix and see nothing of each other. So the
prefix is never repeated in memory, neither over the rows nor over the query heads of a group: (P, kv heads, T, W) a
layer, in the model's number format, shorter prefixes padded and masked.

What a family passes to its blocks besides (rotary tables, layer types) is taken from a real forward pass of the last
token instead of rebuilt.   Oracle: the model's own forward pass, and autograd through the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, Cache, DynamicCache, PreTrainedModel

from steering.plant.plant import Plant
from steering.plant.taps import watch
from steering.types import Site

LAST_TOKEN = "setpoint_last_token"
"""Name under which transformers knows the attention of this file."""


class StillCache:
    """Stands where a block expects a cache, and keeps nothing: the attention below joins the prefix itself."""

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """The new keys and values alone."""
        return keys, values


@dataclass(frozen=True, slots=True)
class Prefix:
    """One layer's keys and values before the last token of P prompts, which stand still."""

    keys: Tensor
    """(P, kv heads, T, W)"""
    values: Tensor
    mask_PT: Tensor
    """0, or −∞ where the last token does not look: pads, and what a window leaves behind."""


@dataclass(frozen=True, slots=True)
class Call:
    """How the model called one block on the last token of P prompts, with the prefix in place of its cache."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    prefix: Prefix

    def of(self, prompt: int) -> Call:
        """The same for one of the P prompts."""
        here = slice(prompt, prompt + 1)
        past = self.prefix
        row = Prefix(past.keys[here], past.values[here], past.mask_PT[here])
        return Call(_each(self.args, lambda t: t[here]), _each(self.kwargs, lambda t: t[here]), row)

    def __call__(self, block: Callable[[tuple[Any, ...], dict[str, Any]], Any], x_PKD: Tensor) -> Tensor:
        """What `block` makes of the arguments with the states `x_PKD` in front."""
        y_PKD: Tensor = block((x_PKD, *self.args), self.kwargs | {"last_token_prefix": self.prefix})
        return y_PKD


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    last_token_prefix: Prefix,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query (P, H, K, W), key and value (P, kv heads, K, W) → (P, K, H, W), as transformers' interface asks."""
    past, n_rows = last_token_prefix, query.shape[2]
    n_kv = key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q = query.unflatten(1, (n_kv, -1))  # (P, kv heads, group, K, W)
    before = q.flatten(2, 3) @ past.keys.to(q.dtype).transpose(-1, -2)  # (P, kv heads, group · K, T)
    own = (q * key[:, :, None]).sum(-1, keepdim=True)
    scores = torch.cat([before.unflatten(2, (-1, n_rows)), own], dim=-1) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + pad(past.mask_PT, (0, 1))[:, None, None, None]
    share = torch.softmax(scores, dim=-1)
    from_past = share[..., :-1].flatten(2, 3) @ past.values.to(q.dtype)
    out = from_past.unflatten(2, (-1, n_rows)) + share[..., -1:] * value[:, :, None]
    return out.flatten(1, 2).transpose(1, 2), None


def use_last_token_attention(shell: PreTrainedModel) -> None:
    """Put `attend` under the blocks of `shell`."""
    AttentionInterface.register(LAST_TOKEN, attend)
    shell.set_attn_implementation(LAST_TOKEN)


def rest(shell: PreTrainedModel, plant: Plant, prompt: Sequence[int]) -> tuple[Tensor, list[Call]]:
    """Run the prefix into a cache and the last token past it: its states (L + 1, D) and how each block was called."""
    ids = torch.tensor([list(prompt)], device=plant.device)
    cache = DynamicCache(config=shell.config)
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    states: list[Tensor] = []
    with torch.no_grad(), ExitStack() as stack:
        if len(prompt) > 1:
            shell.base_model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
        # References are enough: the cache grows by concatenation into new tensors.
        kept = [(layer.keys, layer.values) for layer in cache.layers] if len(prompt) > 1 else None
        for layer in range(plant.depth):
            stack.callback(watch(shell, plant.layout, layer, lambda args, kwargs: seen.append((args, kwargs))).remove)
        last = Site("resid_post", plant.depth - 1)
        stack.callback(plant.tap(shell, last, lambda x_11D: states.append(x_11D[0, 0])).remove)
        shell.base_model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
    if kept is None:  # the last token's own tell the shape
        kept = [(layer.keys[:, :, :0], layer.values[:, :, :0]) for layer in cache.layers]
    calls = [
        Call(_stilled(args[1:]), _stilled(kwargs), _prefix(past, (*args[1:], *kwargs.values())))
        for (args, kwargs), past in zip(seen, kept, strict=True)
    ]
    return torch.stack([*(args[0][0, 0] for args, _ in seen), *states]), calls


def together(calls: Sequence[Call]) -> Call:
    """One block's calls on several prompts as one, the shorter prefixes padded on the left."""
    longest = max(call.prefix.mask_PT.shape[1] for call in calls)
    padded = [_padded(call.prefix, longest) for call in calls]
    prefix = Prefix(
        torch.cat([p.keys for p in padded]),
        torch.cat([p.values for p in padded]),
        torch.cat([p.mask_PT for p in padded]),
    )
    return Call(_joined([call.args for call in calls]), _joined([call.kwargs for call in calls]), prefix)


def _prefix(kept: tuple[Tensor, Tensor], arguments: Sequence[Any]) -> Prefix:
    """The prefix of one prompt from its cache and from the mask (1, 1, 1, T + 1) among the block's arguments."""
    keys, values = kept
    mask_1T = torch.zeros(1, keys.shape[2], device=keys.device)
    for mask in filter(_is_mask, arguments):
        mask_1T.masked_fill_(mask[0, 0, :, :-1] < -1, -torch.inf)
    return Prefix(keys, values, mask_1T)


def _padded(past: Prefix, length: int) -> Prefix:
    missing = length - past.mask_PT.shape[1]
    keys, values = (pad(t, (0, 0, missing, 0)) for t in (past.keys, past.values))
    return Prefix(keys, values, pad(past.mask_PT, (missing, 0), value=-torch.inf))


def _joined(values: Sequence[Any]) -> Any:
    """Tensors with a row per prompt side by side; of anything else the first, which is that of all."""
    first = values[0]
    if isinstance(first, Tensor) and first.dim() > 1:
        return torch.cat(list(values))
    if isinstance(first, tuple):
        return tuple(_joined(items) for items in zip(*values, strict=True))
    if isinstance(first, dict):
        return {name: _joined([value[name] for value in values]) for name in first}
    return first


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in it that has a row per prompt changed."""
    if isinstance(value, Tensor):
        return change(value) if value.dim() > 1 else value
    if isinstance(value, tuple):
        return tuple(_each(item, change) for item in value)
    if isinstance(value, dict):
        return {name: _each(item, change) for name, item in value.items()}
    return value


def _is_mask(value: Any) -> bool:
    """A block's only argument of four dimensions, (1, 1, 1, T + 1)."""
    return isinstance(value, Tensor) and value.dim() == 4


def _stilled(value: Any) -> Any:
    """`value` with the cache in it replaced by one that keeps nothing, and the mask left out: the prefix has it."""
    if isinstance(value, Cache):
        return StillCache()
    if isinstance(value, tuple):
        return tuple(_stilled(item) for item in value)
    if isinstance(value, dict):
        return {name: _stilled(item) for name, item in value.items()}
    return None if _is_mask(value) else value
