"""Layer Jacobians of the last token.

    A_l = (1/P) Σ_p ∂f_l^p(x) / ∂x  at x = x_l^p,        A_l[i, j] = ∂f_i / ∂x_j

f_l^p is block l as a map of the last token's residual (D,) → (D,). All other positions of prompt p stand still, and
with them their keys and values in block l; the last token's own key and value move with x. Since attention is causal
this is the exact last-token block of the full-sequence Jacobian.

So each prefix runs once into a KV cache, and f_l costs one token (`steering.plant.frozen`). All prompts of a group run
as one batch. K products W A_l (`vjp`) take one forward pass of P tokens, and one backward pass that carries K · P
cotangents at once: every linear map of the block is one matrix product over them. `jvp` takes one dual forward pass of
K · P tangents. Layers cannot be batched: the cotangents of one come out of the next; that the products of a recursion
are all carried along, K at layer l for the K layers behind it, is what fills the batch.

Cost of K products over P prompts, N weights in a block: 2 N P (K + 1) FLOP, and the block's weights read in its own
format, written once and read twice in float32: 14 bytes × N from 16 bits. A fit of a model of 8B (N = 218M, 31 layers,
16 prompts):

    matrix-free   K = 1 … 31, 496 products a prompt     3.7 TFLOP     0.09 TB
    dense         K = 4096 a layer, 126976 a prompt     890 TFLOP     + 13 TFLOP in float64 for the recursion

So a GPU's float32 of 50 TFLOP/s takes a tenth of a second for the one, and 18 s for the other.

Memory beside the model's, whatever its depth: one block's weights in float32, one piece, A_l, and the prefixes in the
model's format. At 70B (N = 855M, D = 8192): 3.4 GB, 2 GB, 0.3 GB, 20 MB a prompt of 64 tokens; the recursion's float64
matrices of D × D are 0.5 GB each, half a dozen at a time.

Source: A-LQR, arXiv:2604.19018 (linearisation along the depth). Oracles: central differences at step 1e-3 ·
autograd through the full sequence · jvp against vjp.
Where the model is served in a 16-bit or a quantised format, prefix and x_l are the real ones, and the block itself runs
in float32 (`steering.plant.quantised`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call

from steering.errors import DimensionMismatch, PlantError
from steering.plant.capture import Pause, Progress, check_prompts
from steering.plant.frozen import Call, rest, together, use_last_token_attention
from steering.plant.layouts import blocks_of
from steering.plant.plant import Plant
from steering.plant.quantised import unquantise

Method = Literal["vjp", "jvp"]
GROUP = 32
"""Most prompts of one batch."""
LEAST_ROWS = 64
"""Rows of a piece that even the largest block is given: fewer would read its weights for too little."""
PIECE_FLOP_CPU, PIECE_FLOP_GPU = 2e9, 1e13
"""Work of one piece, tens of milliseconds on a core and a fifth of a second on a GPU: the time between two pauses."""
PIECE_BYTES = 2**31
"""Memory of one piece, at 32 bytes for each row and unit of the block's widest layer."""


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
        states: list[Tensor] = []
        calls: list[list[Call]] = []
        for n, prompt in enumerate(tokens):
            state_LD, call_L = rest(shell, plant, prompt)
            states.append(state_LD)
            calls.append(call_L)
            self._pause()
            if progress is not None:
                progress(n + 1, len(tokens))
        use_last_token_attention(shell)
        self._groups = [
            _Group(start, tuple(together(call_P) for call_P in zip(*calls[start : start + GROUP], strict=True)))
            for start in range(0, len(tokens), GROUP)
        ]
        self._blocks = blocks_of(shell, plant.layout)
        self._weights_of = [unquantise(block, plant.dtype, self.dtype) for block in self._blocks]
        self._held: tuple[int, dict[str, Tensor]] | None = None
        self.states_PLD = torch.stack(states).to(self.dtype)
        """x_0 … x_L of each prompt's last token, (P, L + 1, D)."""

    def step(self, layer: int, prompt: int, x_KD: Tensor) -> Tensor:
        """f_l^p of each row of `x_KD`, (K, D). Raises PlantError if there is no such layer or prompt."""
        if not 0 <= prompt < len(self.states_PLD):
            raise PlantError(f"There is no prompt {prompt}: expected 0 to {len(self.states_PLD) - 1}.", param="prompt")
        self._check_layer(layer)
        call = self._groups[prompt // GROUP].call_L[layer].of(prompt % GROUP)
        with torch.no_grad():
            return self._map(layer, call)(x_KD.to(self.device, self.dtype)[None])[0].to(x_KD)

    def vjp(self, layer: int, W_KD: Tensor, *, chunk: int | None = None, progress: Progress | None = None) -> Tensor:
        """W A_l: each row of `W_KD` times the mean Jacobian, (K, D), in the format and on the device of `W_KD`.

        `chunk` is the number of rows carried at once for each prompt of a group; None chooses by the block's size. It
        bounds memory and does not change the result. `progress` is called after each piece with rows × prompts.
        Raises PlantError if there is no such layer, DimensionMismatch unless `W_KD` is (K, D).
        """
        return self._mean(layer, W_KD, chunk, progress, _pull)

    def jvp(self, layer: int, V_KD: Tensor, *, chunk: int | None = None, progress: Progress | None = None) -> Tensor:
        """A_l v for each row v of `V_KD`, (K, D); V A_lᵀ. Otherwise as `vjp`."""
        return self._mean(layer, V_KD, chunk, progress, _push)

    def jacobian(
        self, layer: int, method: Method = "vjp", *, chunk: int | None = None, progress: Progress | None = None
    ) -> Tensor:
        """A_l (D, D), the mean over the prompts. Raises PlantError if there is no such layer or method."""
        identity = torch.eye(self.width, device=self.device, dtype=self.dtype)
        if method == "vjp":
            return self.vjp(layer, identity, chunk=chunk, progress=progress)
        if method == "jvp":
            return self.jvp(layer, identity, chunk=chunk, progress=progress).T
        raise PlantError(f"method: expected vjp or jvp, got {method!r}.", param="method")

    def jacobians(
        self,
        layers: Sequence[int] | None = None,
        method: Method = "vjp",
        *,
        chunk: int | None = None,
        progress: Progress | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (l, A_l) from the last of `layers` (all by default) backward, the order of the Riccati recursion.

        `progress` is called many times a layer, with products × prompts of all the layers.
        """
        order = sorted(range(self.depth) if layers is None else set(layers), reverse=True)
        for n, layer in enumerate(order):
            yield layer, self.jacobian(layer, method, chunk=chunk, progress=_part(progress, n, len(order)))

    def _mean(
        self, layer: int, rows_KD: Tensor, chunk: int | None, progress: Progress | None, product: _Product
    ) -> Tensor:
        """The mean over prompts of `product`, a piece of the rows and a group of the prompts at a time."""
        if rows_KD.dim() != 2 or rows_KD.shape[1] != self.width:
            raise DimensionMismatch(f"Expected vectors of shape (K, {self.width}), got {tuple(rows_KD.shape)}.")
        self._check_layer(layer)
        rows = rows_KD.detach().to(self.device, self.dtype)
        total_KD = torch.zeros_like(rows)
        done, of = 0, len(rows) * len(self.states_PLD)
        for group in self._groups:
            x_PD = self.states_PLD[group.start : group.start + group.size, layer]
            of_rows = product(self._map(layer, group.call_L[layer]), x_PD)
            piece = chunk or max(1, self._rows(layer) // group.size)
            for start in range(0, len(rows), piece):
                part_KD = rows[start : start + piece]
                total_KD[start : start + piece] += of_rows(part_KD)
                self._pause()
                done += len(part_KD) * group.size
                if progress is not None:
                    progress(done, of)
        self.products += of
        return (total_KD / len(self.states_PLD)).to(rows_KD)

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.depth:
            raise PlantError(f"There is no layer {layer}: expected 0 to {self.depth - 1}.", param="layer")

    def _rows(self, layer: int) -> int:
        """Rows × prompts of one piece of this block's work."""
        matrices = [p for p in self._weights(layer).values() if p.dim() > 1]
        flop = 2 * sum(p.numel() for p in matrices)
        in_time = (PIECE_FLOP_CPU if self.device.type == "cpu" else PIECE_FLOP_GPU) / flop
        in_memory = PIECE_BYTES / (32 * max(max(p.shape) for p in matrices))
        return max(LEAST_ROWS, int(min(in_time, in_memory)))

    def _weights(self, layer: int) -> dict[str, Tensor]:
        """The block's weights in the computation's number format. Those of the last block asked for are kept."""
        if self._held is None or self._held[0] != layer:
            self._held = None  # two blocks at once would double the memory
            self._held = (layer, self._weights_of[layer]())
        return self._held[1]

    def _map(self, layer: int, call: Call) -> _Map:
        """f_l of P prompts on (P, K, D), K states of each, in the computation's number format."""
        block, weights = self._blocks[layer], self._weights(layer)

        def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return functional_call(block, weights, args, kwargs)

        return lambda x_PKD: call(run, x_PKD)


_Map = Callable[[Tensor], Tensor]
_Product = Callable[[_Map, Tensor], Callable[[Tensor], Tensor]]


@dataclass(frozen=True, slots=True)
class _Group:
    """Prompts that run as one batch: the number of the first, and every block's call on all of them."""

    start: int
    call_L: tuple[Call, ...]

    @property
    def size(self) -> int:
        return self.call_L[0].prefix.mask_PT.shape[0]


def _part(progress: Progress | None, n: int, of: int) -> Progress | None:
    """What reports the work of piece `n` of `of` equal ones as work of the whole."""
    return None if progress is None else lambda done, total: progress(n * total + done, of * total)


def _pull(f: _Map, x_PD: Tensor) -> Callable[[Tensor], Tensor]:
    """Reverse mode: row k of the result is Σ_p w_k ∂f_p(x_p). One forward pass serves every piece of rows."""
    with torch.enable_grad():
        x_PD = x_PD.detach().requires_grad_()
        y_PD = f(x_PD[:, None])[:, 0]

    def of(w_KD: Tensor) -> Tensor:
        w_KPD = w_KD[:, None].expand(-1, *x_PD.shape)
        (grad_KPD,) = torch.autograd.grad(y_PD, x_PD, w_KPD, retain_graph=True, is_grads_batched=True)
        return grad_KPD.sum(1)

    return of


def _push(f: _Map, x_PD: Tensor) -> Callable[[Tensor], Tensor]:
    """Forward mode: row k of the result is Σ_p ∂f_p(x_p) v_k."""

    def of(v_KD: Tensor) -> Tensor:
        shape = (len(x_PD), *v_KD.shape)
        with torch.no_grad(), forward_ad.dual_level():
            states, tangents = x_PD[:, None].expand(shape), v_KD.expand(shape)
            y_PKD = f(forward_ad.make_dual(states.contiguous(), tangents.contiguous()))
            moved_PKD = forward_ad.unpack_dual(y_PKD).tangent
        assert moved_PKD is not None, "a block passes its input on, so its output has a tangent"
        return moved_PKD.sum(0)

    return of
