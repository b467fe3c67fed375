"""Where a family keeps its parts: one frozen row per architecture, no subclasses.

A path is dotted and starts at the causal language model (`blocks`, `final`) or at one block (`attention`, `mlp`,
`mlp_act`). Keys of `LAYOUTS` are values of `config.model_type`. A family that needs a new row needs only a row: its
blocks must take the residual stream first and return it alone, as every decoder of transformers ≥ 5 does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from torch import nn

from steering.errors import PlantError

READERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
    }
)
OUTPUTS: Mapping[str, str] = MappingProxyType(
    {
        "q_out": "self_attn.q_proj",
        "k_out": "self_attn.k_proj",
        "v_out": "self_attn.v_proj",
        "gate_out": "mlp.gate_proj",
        "up_out": "mlp.up_proj",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Module paths of one architecture family."""

    blocks: str = "model.layers"
    """The list of blocks, from the model."""
    final: str = "model.norm"
    """The final norm, from the model; its output is what the head reads."""
    attention: str = "self_attn"
    """The attention, from a block; it returns a tuple whose first entry is its output."""
    mlp: str = "mlp"
    """The MLP, from a block; it returns a tensor."""
    mlp_act: str | None = "mlp.down_proj"
    """The linear map whose input is the MLP's activation, from a block; None where there is no single one."""
    attn_act: str = "self_attn.o_proj"
    """The linear map that mixes the heads, from a block; its input has them side by side."""
    readers: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: READERS)
    """The linear maps that read the input of the attention and of the MLP, from a block."""
    outputs: Mapping[str, str] = field(default_factory=lambda: OUTPUTS)
    """Single linear maps by the tap of their output, from a block; empty where the family fuses them."""
    attn_norm: str | None = "input_layernorm"
    """The norm before the attention, from a block; None where it reads the residual stream itself."""
    attn_post: str | None = None
    """The norm behind the attention's output, from a block; None where the output joins the residual as it is."""
    norm: Literal["rms", "layer"] = "rms"
    """What stands before whatever reads the residual stream: RMSNorm, or LayerNorm, which takes the mean away."""


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "llama": Layout(),
        "mistral": Layout(),
        "qwen2": Layout(),
        "qwen3": Layout(),
        "gemma2": Layout(attn_post="post_attention_layernorm"),
        "gemma3_text": Layout(attn_post="post_attention_layernorm"),
        "phi3": Layout(
            readers=MappingProxyType({"attn_in": ("self_attn.qkv_proj",), "mlp_in": ("mlp.gate_up_proj",)}),
            outputs=MappingProxyType({}),
        ),
        "olmo2": Layout(attn_norm=None, attn_post="post_attention_layernorm"),
        # Each token has the activations of several experts, of changing identity: nothing of a fixed width to tap.
        "mixtral": Layout(
            mlp_act=None,
            readers=MappingProxyType({"attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}),
            outputs=MappingProxyType({name: f"self_attn.{name[0]}_proj" for name in ("q_out", "k_out", "v_out")}),
        ),
        "gpt2": Layout(
            blocks="transformer.h",
            final="transformer.ln_f",
            attention="attn",
            mlp_act="mlp.c_proj",
            attn_act="attn.c_proj",
            attn_norm="ln_1",
            readers=MappingProxyType({"attn_in": ("attn.c_attn",), "mlp_in": ("mlp.c_fc",)}),
            outputs=MappingProxyType({}),
            norm="layer",
        ),
        "gpt_neox": Layout(
            blocks="gpt_neox.layers",
            final="gpt_neox.final_layer_norm",
            attention="attention",
            mlp_act="mlp.dense_4h_to_h",
            attn_act="attention.dense",
            readers=MappingProxyType({"attn_in": ("attention.query_key_value",), "mlp_in": ("mlp.dense_h_to_4h",)}),
            outputs=MappingProxyType({}),
            norm="layer",
        ),
    }
)
"""The supported families, by `config.model_type`."""


def layout_of(model: nn.Module) -> Layout:
    """The row of `model`'s family.

    Raises PlantError if the family has no row, or if the model does not have the parts that its row names.
    """
    family = getattr(getattr(model, "config", None), "model_type", None)
    layout = LAYOUTS.get(str(family))
    if layout is None:
        raise PlantError(
            f"The architecture {family!r} is not supported: expected one of {', '.join(sorted(LAYOUTS))}.",
            param="model",
        )
    try:
        block = blocks_of(model, layout)[0]
        model.get_submodule(layout.final)
        for path in (layout.attention, layout.attn_act, layout.mlp, layout.mlp_act):
            block.get_submodule(path or "")
    except AttributeError as error:
        raise PlantError(
            f"The model is of the family {family!r} but not built like one ({error}): expected a causal language model "
            "as AutoModelForCausalLM loads it.",
            param="model",
        ) from error
    return layout


def blocks_of(model: nn.Module, layout: Layout) -> nn.ModuleList:
    """The blocks of `model`, in order."""
    blocks = model.get_submodule(layout.blocks)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise AttributeError(f"`{layout.blocks}` is not a list of blocks")
    return blocks
