"""Layer Jacobians of the last token.

    A_l = (1/P) Σ_p ∂f_l^p(x) / ∂x  at x = x_l^p,        A_l[i, j] = ∂f_i / ∂x_j

f_l^p is block l as a map of the last token's residual (D,) → (D,). All other positions of prompt p stand still, and
with them their keys and values in block l; the last token's own key and value move with x. Since attention is causal
this is the exact last-token block of the full-sequence Jacobian.

So each prefix runs once into a KV cache, and f_l costs one token. K products are K rows of one batch: the last token
repeated, the prefix's keys and values broadcast, then one backward pass with the K cotangents as gradient (`vjp`), or
one dual forward pass with the K tangents (`jvp`). The arguments a family passes to its blocks (rotary tables, masks,
windows) are taken from a real forward pass of the last token instead of rebuilt.

Source: A-LQR, arXiv:2604.19018 (linearisation along the depth). Oracles: central differences at step 1e-3 ·
autograd through the full sequence · jvp against vjp.
Where the model is served in a 16-bit format, prefix and x_l are the real ones, and the block itself runs in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call
from transformers import Cache, DynamicCache, PreTrainedModel

from steering.errors import DimensionMismatch, PlantError
from steering.plant.capture import Pause, Progress, check_prompts
from steering.plant.layouts import blocks_of
from steering.plant.plant import Plant
from steering.plant.taps import watch
from steering.types import Site

Method = Literal["vjp", "jvp"]
CHUNK = 64
"""Products computed in one batch: bounds memory, does not change the result."""


class _Prefix:
    """One layer's keys and values before the last token, standing still. Does a cache's `update` without keeping."""

    def __init__(self, keys: Tensor | None, values: Tensor | None) -> None:
        self._past = (keys, values)

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Prefix and new token together, (rows, heads, prefix + 1, head width)."""
        keys, values = (
            new if old is None else torch.cat([old.to(new.dtype).expand(new.shape[0], -1, -1, -1), new], dim=-2)
            for old, new in zip(self._past, (keys, values), strict=True)
        )
        return keys, values


@dataclass(frozen=True, slots=True)
class _Call:
    """How the model called one block on one prompt's last token, its cache replaced by the frozen prefix."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Linearisation:
    """The blocks of a plant as maps of the last token, linearised along some prompts.

    Prompts are truncated to their last `max_context` tokens. Construction runs each prompt once. `pause` is called
    after each of them, and after each chunk of products.
    Raises PlantError if there is no prompt, or one is empty or has unknown tokens.
    """

    def __init__(
        self,
        plant: Plant,
        prompts: Sequence[Sequence[int]],
        *,
        max_context: int = 24,
        progress: Progress | None = None,
        pause: Pause | None = None,
    ) -> None:
        if max_context < 1:
            raise PlantError(f"max_context: expected at least 1 token, got {max_context}.", param="max_context")
        tokens = [list(prompt)[-max_context:] for prompt in prompts]
        check_prompts(plant, tokens)
        self.depth, self.width, self.device = plant.depth, plant.width, plant.device
        self.dtype = torch.promote_types(plant.dtype, torch.float32)
        """Number format of the computation: float32, or float64 where the model is."""
        self.products = 0
        """Vector–Jacobian and Jacobian–vector products computed so far, rows × prompts."""
        self._pause: Pause = pause or (lambda: None)
        shell = plant.shell("eager")  # forward mode has no rule for fused attention
        if hasattr(shell, "set_experts_implementation"):
            shell.set_experts_implementation("eager")  # nor for grouped matrix products
        self._blocks = blocks_of(shell, plant.layout)
        self._calls: list[list[_Call]] = []
        states = []
        for n, prompt in enumerate(tokens):
            state_LD, calls = _run(shell, plant, prompt)
            states.append(state_LD)
            self._calls.append(calls)
            self._pause()
            if progress is not None:
                progress(n + 1, len(tokens))
        self.states_PLD = torch.stack(states).to(self.dtype)
        """x_0 … x_L of each prompt's last token, (P, L + 1, D)."""

    def step(self, layer: int, prompt: int, x_KD: Tensor) -> Tensor:
        """f_l^p of each row of `x_KD`, (K, D). Raises PlantError if there is no such layer or prompt."""
        if not 0 <= prompt < len(self._calls):
            raise PlantError(f"There is no prompt {prompt}: expected 0 to {len(self._calls) - 1}.", param="prompt")
        f = self._map(layer, prompt, self._weights(layer))
        with torch.no_grad():
            return f(x_KD.to(self.device, self.dtype)).to(x_KD)

    def vjp(self, layer: int, W_KD: Tensor, *, chunk: int = CHUNK) -> Tensor:
        """W A_l: each row of `W_KD` times the mean Jacobian, (K, D), in the format and on the device of `W_KD`.

        Raises PlantError if there is no such layer, DimensionMismatch unless `W_KD` is (K, D).
        """
        return self._mean(layer, W_KD, chunk, _pull)

    def jvp(self, layer: int, V_KD: Tensor, *, chunk: int = CHUNK) -> Tensor:
        """A_l v for each row v of `V_KD`, (K, D); V A_lᵀ. Otherwise as `vjp`."""
        return self._mean(layer, V_KD, chunk, _push)

    def jacobian(self, layer: int, method: Method = "vjp", *, chunk: int = CHUNK) -> Tensor:
        """A_l (D, D), the mean over the prompts. Raises PlantError if there is no such layer or method."""
        identity = torch.eye(self.width, device=self.device, dtype=self.dtype)
        if method == "vjp":
            return self.vjp(layer, identity, chunk=chunk)
        if method == "jvp":
            return self.jvp(layer, identity, chunk=chunk).T
        raise PlantError(f"method: expected vjp or jvp, got {method!r}.", param="method")

    def jacobians(
        self,
        layers: Sequence[int] | None = None,
        method: Method = "vjp",
        *,
        chunk: int = CHUNK,
        progress: Progress | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (l, A_l) from the last of `layers` (all by default) backward, the order of the Riccati recursion."""
        order = sorted(range(self.depth) if layers is None else set(layers), reverse=True)
        for n, layer in enumerate(order):
            yield layer, self.jacobian(layer, method, chunk=chunk)
            if progress is not None:
                progress(n + 1, len(order))

    def _mean(self, layer: int, rows_KD: Tensor, chunk: int, product: Callable[..., Tensor]) -> Tensor:
        """The mean over prompts of `product`, `chunk` rows at a time."""
        if rows_KD.dim() != 2 or rows_KD.shape[1] != self.width:
            raise DimensionMismatch(f"Expected vectors of shape (K, {self.width}), got {tuple(rows_KD.shape)}.")
        rows = rows_KD.detach().to(self.device, self.dtype)
        weights = self._weights(layer)
        total_KD = torch.zeros_like(rows)
        for prompt in range(len(self._calls)):
            f = self._map(layer, prompt, weights)
            x_D = self.states_PLD[prompt, layer]
            for start in range(0, len(rows), chunk):
                part = rows[start : start + chunk]
                total_KD[start : start + chunk] += product(f, x_D.expand_as(part), part)
                self._pause()
        self.products += len(rows) * len(self._calls)
        return (total_KD / len(self._calls)).to(rows_KD)

    def _weights(self, layer: int) -> dict[str, Tensor]:
        """The block's weights in the computation's number format: themselves, or a copy of those of 16 bits."""
        if not 0 <= layer < self.depth:
            raise PlantError(f"There is no layer {layer}: expected 0 to {self.depth - 1}.", param="layer")
        return {name: p.to(self.dtype) for name, p in self._blocks[layer].named_parameters()}

    def _map(self, layer: int, prompt: int, weights: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        """f_l^p on rows (K, D), in the computation's number format."""
        block, call = self._blocks[layer], self._calls[prompt][layer]

        def f(x_KD: Tensor) -> Tensor:
            y_K1D: Tensor = functional_call(block, weights, (x_KD[:, None], *call.args), call.kwargs)
            return y_K1D[:, 0]

        return f


def _pull(f: Callable[[Tensor], Tensor], x_KD: Tensor, w_KD: Tensor) -> Tensor:
    """Reverse mode: row k of the result is w_k ∂f(x_k). Rows do not mix, so one backward pass serves all."""
    with torch.enable_grad():
        x_KD = x_KD.detach().requires_grad_()
        (grad_KD,) = torch.autograd.grad(f(x_KD), x_KD, w_KD)
    return grad_KD


def _push(f: Callable[[Tensor], Tensor], x_KD: Tensor, v_KD: Tensor) -> Tensor:
    """Forward mode: row k of the result is ∂f(x_k) v_k."""
    with forward_ad.dual_level():
        y_KD = f(forward_ad.make_dual(x_KD.contiguous(), v_KD.contiguous()))
        tangent_KD = forward_ad.unpack_dual(y_KD).tangent
    assert tangent_KD is not None, "a block passes its input on, so its output has a tangent"
    return tangent_KD


def _run(shell: PreTrainedModel, plant: Plant, prompt: Sequence[int]) -> tuple[Tensor, list[_Call]]:
    """Run the prefix into a cache and the last token past it: its states (L + 1, D) and how each block was called."""
    ids = torch.tensor([list(prompt)], device=plant.device)
    cache = DynamicCache(config=shell.config)
    calls: list[_Call] = []
    states: list[Tensor] = []

    def record(past: _Prefix) -> Callable[[tuple[Any, ...], dict[str, Any]], None]:
        def note(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states.append(args[0][0, 0])
            calls.append(_Call(_swap(args[1:], past), _swap(kwargs, past)))

        return note

    with torch.no_grad(), ExitStack() as stack:
        if len(prompt) > 1:
            shell.base_model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
        for layer in range(plant.depth):
            # References are enough: the cache grows by concatenation into new tensors.
            kept: Any = cache.layers[layer] if len(prompt) > 1 else None
            past = _Prefix(kept.keys, kept.values) if kept is not None else _Prefix(None, None)
            stack.callback(watch(shell, plant.layout, layer, record(past)).remove)
        last = Site("resid_post", plant.depth - 1)
        stack.callback(plant.tap(shell, last, lambda x_11D: states.append(x_11D[0, 0])).remove)
        shell.base_model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
    return torch.stack(states), calls


def _swap(value: Any, past: _Prefix) -> Any:
    """`value` with every cache in it replaced by `past`."""
    if isinstance(value, Cache):
        return past
    if isinstance(value, tuple):
        return tuple(_swap(item, past) for item in value)
    if isinstance(value, dict):
        return {name: _swap(item, past) for name, item in value.items()}
    return value
