"""Taps: the only place where a hook is installed in a model.

A tap sees the tensor of a site as the model computes it, the true input or output of its module, so that gate, capture
and actuator read one quantity. `fn` may change the tensor in place, or return a replacement, or return None to leave
it. Taps of one site run in the order of their installation, each on what the one before it left.

    resid_pre   input of block l            attn_in    input of its attention, after its norm where there is one
    resid_post  output of block l           attn_out   output of its attention, before a post-norm (Gemma, OLMo-2)
    mlp_act     input of the last linear    mlp_out    output of its MLP, before a post-norm
    final       output of the final norm, what the head reads

`resid_post(l)` and `resid_pre(l + 1)` are the same tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from steering.errors import PlantError
from steering.plant.layouts import Layout, blocks_of
from steering.types import TAPS, Site

TapFn = Callable[[Tensor], Tensor | None]
"""What a tap calls with the tensor of its site, of whatever batch shape the forward pass has: (…, width)."""


def tap(model: nn.Module, layout: Layout, site: Site, fn: TapFn) -> RemovableHandle:
    """Call `fn` with the tensor of `site` on every forward pass of `model`, until the handle is removed.

    Raises PlantError if the model has no such site.
    """
    module = site_module(model, layout, site)
    if site.tap in ("resid_pre", "attn_in", "mlp_act"):
        return module.register_forward_pre_hook(_before(fn), with_kwargs=True)
    if site.tap == "attn_out":
        return module.register_forward_hook(_after_tuple(fn))
    return module.register_forward_hook(_after(fn))


def watch(
    model: nn.Module, layout: Layout, layer: int, fn: Callable[[tuple[Any, ...], dict[str, Any]], None]
) -> RemovableHandle:
    """Call `fn` with the arguments and keywords that the model passes to block `layer`, residual first.

    Raises PlantError if the model has no such layer.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        fn(args if args else (rest.pop("hidden_states"),), rest)

    return site_module(model, layout, Site("resid_pre", layer)).register_forward_pre_hook(hook, with_kwargs=True)


def site_module(model: nn.Module, layout: Layout, site: Site) -> nn.Module:
    """The module whose input or output is `site`.

    Raises PlantError for an unknown tap, a layer out of range, or a site this architecture does not have.
    """
    if site.tap not in TAPS:
        raise PlantError(f"The site {site.tap!r} does not exist: expected one of {', '.join(TAPS)}.", param="site.tap")
    blocks = blocks_of(model, layout)
    depth = 1 if site.tap == "final" else len(blocks)
    if not 0 <= site.layer < depth:
        raise PlantError(
            f"The site {site.tap} has no layer {site.layer}: expected 0 to {depth - 1}.", param="site.layer"
        )
    if site.tap == "final":
        return model.get_submodule(layout.final)
    block = blocks[site.layer]
    if site.tap in ("resid_pre", "resid_post"):
        return block
    if site.tap in ("attn_in", "attn_out"):
        return block.get_submodule(layout.attention)
    if site.tap == "mlp_out":
        return block.get_submodule(layout.mlp)
    if layout.mlp_act is None:
        raise PlantError(
            "This architecture mixes experts, so it has no single MLP activation to tap: use mlp_out, not mlp_act.",
            param="site.tap",
        )
    return block.get_submodule(layout.mlp_act)


def site_width(model: nn.Module, layout: Layout, site: Site) -> int:
    """Width of the tensor at `site`: the residual width, or the inner width of the MLP at `mlp_act`."""
    module = site_module(model, layout, site)
    if site.tap != "mlp_act":
        return int(model.config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]
    return int(module.nx if isinstance(module, Conv1D) else module.in_features)  # type: ignore[arg-type]


def _before(fn: TapFn) -> Callable[..., Any]:
    """A pre-hook that gives `fn` the module's first input, which families pass by position or as `hidden_states`."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        changed = fn(args[0] if args else kwargs["hidden_states"])
        if changed is None:
            return None
        return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": changed})

    return hook


def _after(fn: TapFn) -> Callable[..., Any]:
    """A hook on a module that returns a tensor."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return fn(output)

    return hook


def _after_tuple(fn: TapFn) -> Callable[..., Any]:
    """A hook on a module that returns a tuple with the site's tensor first."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> tuple[Any, ...] | None:
        changed = fn(output[0])
        return None if changed is None else (changed, *output[1:])

    return hook
