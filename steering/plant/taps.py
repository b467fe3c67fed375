"""Taps: the only place where a hook is installed in a model.

A tap sees the tensor of a site as the model computes it, the true input or output of its module, so that gate, capture
and actuator read one quantity. `fn` may change the tensor in place, or return a replacement, or return None to leave
it. Taps of one site run in the order of their installation, each on what the one before it left.

    resid_pre   input of block l            attn_in    input of its attention, after its norm where there is one
    attn_act    input of its last linear    attn_out   output of its attention, before a post-norm (Gemma, OLMo-2)
    mlp_in      input of its MLP            mlp_act    input of the MLP's last linear
    mlp_out     its output, before a post-norm
    resid_post  output of block l           final      output of the final norm, what the head reads
    q_out, k_out, v_out, gate_out, up_out   outputs of single linear maps, in the families that have them apart

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

SINGLE = ("q_out", "k_out", "v_out", "gate_out", "up_out")
"""Taps of the outputs of single linear maps."""
TapFn = Callable[[Tensor], Tensor | None]
"""What a tap calls with the tensor of its site, of whatever batch shape the forward pass has: (…, width)."""


def tap(model: nn.Module, layout: Layout, site: Site, fn: TapFn) -> RemovableHandle:
    """Call `fn` with the tensor of `site` on every forward pass of `model`, until the handle is removed.

    Raises PlantError if the model has no such site.
    """
    module = site_module(model, layout, site)
    if site.tap in ("resid_pre", "attn_in", "attn_act", "mlp_in", "mlp_act"):
        return module.register_forward_pre_hook(_before(fn), with_kwargs=True)
    if site.tap == "attn_out":
        return module.register_forward_hook(_after_tuple(fn))
    return module.register_forward_hook(_after(fn))


def build_in(model: nn.Module, layout: Layout, layer: int, fn: TapFn) -> None:
    """`tap` of `resid_post` for as long as the tree lives. Raises PlantError if the model has no such layer.

    It wraps the block's forward pass: 3 µs a call. A hook makes torch take the long way round, which is 11 µs.
    """
    block: Any = site_module(model, layout, Site("resid_post", layer))
    compute = block.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = compute(*args, **kwargs)
        changed = fn(output)
        return output if changed is None else changed

    block.forward = forward


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
    if site.tap in SINGLE and site.tap not in layout.outputs:
        raise PlantError(
            f"This architecture fuses its linear maps, so it has no {site.tap}: use the output of the attention or of "
            "the MLP.",
            param="site.tap",
        )
    if site.tap == "mlp_act" and layout.mlp_act is None:
        raise PlantError(
            "This architecture mixes experts, so it has no single MLP activation to tap: use mlp_out, not mlp_act.",
            param="site.tap",
        )
    paths = {
        "attn_in": layout.attention,
        "attn_out": layout.attention,
        "attn_act": layout.attn_act,
        "mlp_in": layout.mlp,
        "mlp_out": layout.mlp,
        "mlp_act": layout.mlp_act or "",
        **layout.outputs,
    }
    return block.get_submodule(paths.get(site.tap, ""))


def site_width(model: nn.Module, layout: Layout, site: Site) -> int:
    """Width of the tensor at `site`: the residual width, or that of the linear map before or behind it."""
    module = site_module(model, layout, site)
    if site.tap in ("mlp_act", "attn_act"):
        return linear_shape(module)[1]
    if site.tap in SINGLE:
        return linear_shape(module)[0]
    return int(model.config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]


def linears_at(model: nn.Module, layout: Layout, site: Site) -> list[nn.Module]:
    """The linear maps that read `site`. Raises PlantError where no linear map does, or not the same for all tokens."""
    module = site_module(model, layout, site)
    if site.tap in ("attn_act", "mlp_act"):
        return [module]
    paths = layout.readers.get(site.tap)
    if paths is None:
        raise PlantError(
            f"No linear map of its own reads {site}: expected attn_in, attn_act, mlp_in or mlp_act.", param="site.tap"
        )
    block = blocks_of(model, layout)[site.layer]
    return [block.get_submodule(path) for path in paths]


def linear_weight(module: nn.Module) -> Tensor:
    """The weight (out, in) of a linear map, whichever way it is stored."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear map; of a quantised one what it maps, not the shape in which its weight is packed."""
    if isinstance(module, Conv1D):
        return int(module.nf), int(module.nx)
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


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
