"""Tiny random-weight models, one per supported family, and a word-level tokenizer with a chat template.

Weights are drawn wider than a fresh initialisation and the norms are moved off their identity, so that a block is far
from x → x and a wrong tap, scale or window changes every number. Windows (8 tokens) and soft caps are small enough to
act on the prompts tests use; head sizes differ from width / heads where the family allows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 64
WIDTH = 32
WINDOW = 8
"""Sliding window of the families that have one: shorter than the prompts of the tests."""

CONFIGS: Mapping[str, Callable[..., PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma2": Gemma2Config,
    "gemma3_text": Gemma3TextConfig,
    "phi3": Phi3Config,
    "gpt2": GPT2Config,
    "gpt_neox": GPTNeoXConfig,
    "olmo2": Olmo2Config,
    "mixtral": MixtralConfig,
}
FAMILIES = tuple(CONFIGS)

OWN: Mapping[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": WINDOW},
    "qwen3": {"head_dim": 16},
    "gemma2": {
        "head_dim": 16,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 16,
    },
    "gemma3_text": {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16},
    "gpt2": {"n_inner": 48},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
"""What a family's tiny configuration adds to the common one."""

TEXT = """
<pad> <s> </s> <unk> <user> <assistant> <system> <end> the a cat dog bird sat ran on under mat tree house and but is was
good bad nice rude happy sad red blue big small I you we they like love hate see know yes no not very . , ! ? one two
three day night sun moon sky sea river hill road come
"""
WORDS = tuple(TEXT.split())
"""The vocabulary of `tiny_tokenizer`, in order of token id."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_config(family: str, *, layers: int = 3, width: int = WIDTH, vocab: int = VOCAB) -> PreTrainedConfig:
    """The configuration `tiny` builds from: 4 heads (2 for keys and values), an inner width of 48."""
    common: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
    }
    own = dict(OWN.get(family, {}))
    if family in ("gpt2", "gpt_neox"):
        del common["num_key_value_heads"], common["attention_dropout"]
    if family == "gpt2":
        del common["intermediate_size"]
    if family in ("gemma2", "gemma3_text"):
        own["layer_types"] = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    return CONFIGS[family](**(common | own))


def tiny(
    family: str = "llama",
    *,
    seed: int = 0,
    layers: int = 3,
    width: int = WIDTH,
    vocab: int = VOCAB,
    dtype: torch.dtype = torch.float32,
    attn: str | None = None,
) -> PreTrainedModel:
    """A random causal language model of `family` in evaluation mode. The same arguments give the same weights.

    `attn` is the attention implementation; None leaves transformers' choice (sdpa, eager for gemma2).
    """
    config = tiny_config(family, layers=layers, width=width, vocab=vocab)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:  # norms and biases: moved off 0 and 1, not replaced
                parameter.add_((0.1 * noise).to(dtype))
            else:
                parameter.copy_((0.25 * noise).to(dtype))
    return model.eval().requires_grad_(False)


def tiny_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the `VOCAB` words of `WORDS` (others become <unk>); text gets a leading <s>."""
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<user>", "<assistant>", "<system>", "<end>"],
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def prompts(n: int = 5, *, longest: int = 14, vocab: int = VOCAB, seed: int = 1) -> list[list[int]]:
    """`n` token lists of mixed lengths 2 … `longest`; the first has the longest length, so windows are exceeded."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [longest, *(int(torch.randint(2, longest, (1,), generator=generator)) for _ in range(n - 1))]
    return [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in lengths]


SINK = 17
"""The massive coordinate of `with_sink`."""


def with_sink(model: PreTrainedModel, size: float = 3000.0) -> PreTrainedModel:
    """A tiny Llama whose first block writes a massive activation at token 1, which every text begins with.

    Coordinate 5 marks this token and nothing else writes it; one neuron of the first MLP answers to it alone.
    """
    embed, blocks = model.model.embed_tokens.weight, model.model.layers
    first = blocks[0]
    with torch.no_grad():
        embed[:, 5] = 0.0
        embed[1] = 0.0
        embed[1, 5] = 1.0
        for block in blocks:
            block.self_attn.o_proj.weight[[5, SINK]] = 0.0
            block.mlp.down_proj.weight[[5, SINK]] = 0.0
        for name, gate in (("gate_proj", 10.0), ("up_proj", 1.0)):
            getattr(first.mlp, name).weight[0] = 0.0
            getattr(first.mlp, name).weight[0, 5] = gate
        first.mlp.down_proj.weight[SINK, 0] = size
    return model
