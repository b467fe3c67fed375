"""Where in a model that vLLM runs the sites of `steering.types` are, and the hooks that look at them.

Under vLLM's Transformers backend (`--model-impl transformers`) modules are those of Hugging Face, with vLLM's linear
maps: every site of `steering.plant.taps` is there; q, k, v and gate, up may be columns of one fused map. vLLM's own
decoders hand `hidden` and `residual` from block to block, whose sum is the state; of them the boundaries of blocks and
the final norm's output are offered.

    boundary b    the state between blocks b − 1 and b: resid_post(b − 1), then resid_pre(b), at one hook
    pair          state = hidden + residual; of steered rows residual ← the new state, hidden ← 0, which adds up to it
                  in any number format. Rows that are not steered keep both, bit for bit

Under tensor parallelism the boundaries and outputs of blocks are whole on every rank. The inputs of row-parallel maps
and the outputs of column-parallel ones are slices, side by side in the order of ranks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn

from steering.plant.layouts import LAYOUTS, Layout
from steering.plant.taps import SINGLE
from steering.types import TAPS, Site, Tap

RESIDUAL: tuple[Tap, ...] = ("resid_pre", "resid_post", "final")
"""Taps of the residual stream: those of vLLM's own decoders, and of compiled models unless more are asked for."""
INPUTS = ("attn_in", "attn_act", "mlp_in", "mlp_act")
"""Taps of what a module reads."""


class Act(Protocol):
    """What hooks call: steer a state in place."""

    def wants(self, place: str) -> bool:
        """Whether anything is to be done at a place in this step."""

    def whole(self, state: Tensor, place: str) -> None:
        """A site's own tensor, (…, T, width)."""

    def pair(self, hidden: Tensor, residual: Tensor, place: str) -> None:
        """One whose state is a sum."""


@dataclass(frozen=True, slots=True)
class Place:
    """One hook: the sites it serves, one after another.

    columns: where the site's columns are in the tensor of this rank. is_sharded: whether they are a slice of the site.
    """

    sites: tuple[Site, ...]
    columns: slice | None = None
    is_sharded: bool = False

    @property
    def name(self) -> str:
        """What stands for it in a compiled graph."""
        return "+".join(map(str, self.sites))


class Sites:
    """The sites of one model. `taps`: the kinds there are. `reason`: why there are none, in one sentence."""

    def __init__(self, model: nn.Module, family: str, width: int, n_ranks: int) -> None:
        self.is_transformers = any(base.__module__.startswith(_BACKEND) for base in type(model).__mro__)
        self.width = width
        self.reason = ""
        self._model = model
        self._n_ranks = n_ranks
        self._layout = _layout(model, LAYOUTS.get(family), is_wrapped=self.is_transformers)
        self._blocks = self._find_blocks()
        self.depth = len(self._blocks)
        self.taps: tuple[Tap, ...] = tuple(tap for tap in TAPS if self._has(tap)) if self.depth else ()

    def place(self, site: Site) -> Place:
        """The hook that serves a site which the model has."""
        if site.tap == "final":
            return Place((site,))
        if site.tap in ("resid_pre", "resid_post"):
            boundary = site.layer + (site.tap == "resid_post")
            return Place(
                (*([Site("resid_post", boundary - 1)] if boundary else []),
                 *([Site("resid_pre", boundary)] if boundary < self.depth else []))
            )  # fmt: skip
        module, columns = self._module(site)
        return Place((site,), columns, self._n_ranks > 1 and _is_sharded(module, site.tap))

    def hook(self, place: Place, act: Act) -> None:
        """Call `act` at a place in every forward pass from now on."""
        first, name = place.sites[0], place.name
        if first.tap == "final":
            final = self._model.get_submodule(self._layout.final)
            final.register_forward_hook(_after(lambda state: act.whole(state, name)))
        elif first.tap in ("resid_pre", "resid_post"):
            self._hook_boundary(first, act, name)
        elif first.tap in INPUTS:
            module, _ = self._module(first)
            # What a module reads may be the residual itself (OLMo-2), which must not change with it.
            copies = (lambda: act.wants(name)) if first.tap in ("attn_in", "mlp_in") else None
            module.register_forward_pre_hook(_before(lambda state: act.whole(state, name), copies), with_kwargs=True)
        else:
            module, _ = self._module(first)
            module.register_forward_hook(_after(lambda state: act.whole(state, name)))

    def _hook_boundary(self, first: Site, act: Act, name: str) -> None:
        if first.tap == "resid_pre":
            index = _index(self._blocks[0], "hidden_states")
            whole = _before(lambda state: act.whole(state, name), index=index)
            self._blocks[0].register_forward_pre_hook(whole, with_kwargs=True)
            return

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], Tensor):
                act.pair(output[0], output[1], name)
            else:
                act.whole(output[0] if isinstance(output, tuple) else output, name)

        self._blocks[first.layer].register_forward_hook(hook)

    def _find_blocks(self) -> list[nn.Module]:
        if self._layout is None:
            self.reason = "Setpoint knows no layout for this architecture."
            return []
        try:
            blocks = list(self._model.get_submodule(self._layout.blocks).children())
            self._model.get_submodule(self._layout.final)
        except AttributeError:
            self.reason = "this model is not built like its family: try --model-impl transformers."
            return []
        if any("hidden_states" not in inspect.signature(block.forward).parameters for block in blocks):
            self.reason = "its blocks do not take hidden_states: try --model-impl transformers."
            return []
        return blocks

    def _has(self, tap: Tap) -> bool:
        if tap in RESIDUAL:
            return True
        if not self.is_transformers:
            return False
        try:
            module, _ = self._module(Site(tap, 0))
        except AttributeError:
            return False
        # Ranks that share a head hold it twice.
        return not (tap in ("k_out", "v_out") and getattr(module, "num_kv_head_replicas", 1) > 1)

    def _module(self, site: Site) -> tuple[nn.Module, slice | None]:
        """The module of a site within a block, and the site's columns in it. Raises AttributeError if it has none."""
        layout, block = self._layout, self._blocks[site.layer]
        if site.tap in SINGLE:
            if site.tap not in layout.outputs:
                raise AttributeError(site.tap)
            return _single(block, layout.outputs[site.tap], site.tap)
        paths = {
            "attn_in": layout.attention,
            "attn_out": layout.attention,
            "attn_act": layout.attn_act,
            "mlp_in": layout.mlp,
            "mlp_out": layout.mlp,
            "mlp_act": layout.mlp_act,
        }
        path = paths[site.tap]
        if path is None:
            raise AttributeError(site.tap)
        return block.get_submodule(path), None


_BACKEND = "vllm.model_executor.models.transformers"


def _layout(model: nn.Module, layout: Layout | None, *, is_wrapped: bool) -> Any:
    """The family's layout, from vLLM's model: its Transformers backend calls the decoder `model` in every family."""
    if layout is None or not is_wrapped:
        return layout
    blocks, final = (f"model.{path.split('.', 1)[1]}" for path in (layout.blocks, layout.final))
    return replace(layout, blocks=blocks, final=final)


def _single(block: nn.Module, path: str, tap: str) -> tuple[nn.Module, slice | None]:
    """A single linear map, or its columns in a fused one."""
    parent, _, name = path.rpartition(".")
    owner = block.get_submodule(parent)
    if hasattr(owner, name):
        return owner.get_submodule(name), None
    fused = owner.get_submodule("qkv_proj" if tap in ("q_out", "k_out", "v_out") else "gate_up_proj")
    sizes = list(fused.output_partition_sizes)  # type: ignore[arg-type]
    index = ("q_out", "k_out", "v_out").index(tap) if tap.startswith(("q_", "k_", "v_")) else int(tap == "up_out")
    start = sum(sizes[:index])
    return fused, slice(start, start + sizes[index])


def _is_sharded(module: nn.Module, tap: Tap) -> bool:
    """Whether a rank's tensor at a tap of this module is a slice."""
    if tap in ("attn_act", "mlp_act"):
        return bool(getattr(module, "input_is_parallel", False))
    return tap in SINGLE and not getattr(module, "gather_output", True)


def _index(block: nn.Module, name: str) -> int:
    return list(inspect.signature(block.forward).parameters).index(name)


def _before(
    fn: Callable[[Tensor], None], copies: Callable[[], bool] | None = None, index: int = 0
) -> Callable[..., Any]:
    """A pre-hook that gives `fn` a module's input, or, where `copies` is given and says so, a copy in its place."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        by_position = len(args) > index
        state = args[index] if by_position else kwargs["hidden_states"]
        if copies is None:
            fn(state)
            return None
        if not copies():
            return None
        state = state.clone()
        fn(state)
        if by_position:
            return (*args[:index], state, *args[index + 1 :]), kwargs
        return args, kwargs | {"hidden_states": state}

    return hook


def _after(fn: Callable[[Tensor], None]) -> Callable[..., None]:
    """A hook that gives `fn` a module's output, the first one if there are several."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        fn(output[0] if isinstance(output, tuple) else output)

    return hook
