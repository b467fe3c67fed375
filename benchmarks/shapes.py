"""Llamas with random weights, in the shapes that are measured: no checkpoint is needed to time one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a Llama decides how long it takes."""

    width: int
    depth: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int = 1024


SHAPES: Mapping[str, Shape] = {
    "16x512": Shape(512, 16, 8, 8, 2048),
    "1b": Shape(2048, 16, 32, 8, 8192, 128_256),
    "8b": Shape(4096, 32, 32, 8, 14_336, 128_256),
    "70b": Shape(8192, 80, 64, 8, 28_672, 128_256),
}
"""The shapes of Llama 3 by name, and one that a laptop can hold."""


def random_llama(shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A model of that shape with random weights, made where it will run."""
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.inner,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        dtype=str(dtype).removeprefix("torch."),
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
