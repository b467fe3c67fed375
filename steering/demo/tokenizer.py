"""The embedded model's tokenizer: byte-level BPE learnt from the corpus, special tokens of a chat, the chat template.

No text is out of vocabulary: whatever the merges do not cover falls back to bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from steering.demo.corpus import Document
from steering.demo.documents import documents

VOCABULARY = 2048
BOS, EOS, PAD, END = "<|bos|>", "<|eos|>", "<|pad|>", "<|end|>"
ROLES = ("system", "user", "assistant")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user and assistant') }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' }}{% generation %}{{ message['content'] + '<|end|>' }}"
    "{% endgeneration %}{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def _texts(seed: int, n: int) -> Iterator[str]:
    for document in documents(seed, n):
        yield from (m["content"] for m in document.messages)
        if document.text:
            yield document.text


def build(seed: int = 0, n: int = 20_000) -> PreTrainedTokenizerFast:
    """Learn the tokenizer from `n` documents of `seed`; 2048 tokens, special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, BOS, EOS, END, *(f"<|{role}|>" for role in ROLES)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(s, special=True, normalized=False) for s in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed, n), trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
            ),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[END, *(f"<|{role}|>" for role in ROLES)],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    return fast


def encode(tokenizer: PreTrainedTokenizerFast, batch: list[Document]) -> list[tuple[list[int], list[bool]]]:
    """Token ids of each document and, beside each token, whether it is learnt: answers and plain texts, not prompts."""
    pieces = [text for d in batch for text in (d.text, *(m["content"] for m in d.messages))]
    encoded = iter(tokenizer._tokenizer.encode_batch(pieces, add_special_tokens=False))
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in (BOS, EOS, END, *(f"<|{r}|>" for r in ROLES))}
    out = []
    for document in batch:
        text = list(next(encoded).ids)
        tokens, learnt = [ids[BOS], *text], [False, *(True for _ in text)]
        for message, content in zip(document.messages, islice(encoded, len(document.messages)), strict=True):
            is_answer = message["role"] == "assistant"
            tokens += [ids[f"<|{message['role']}|>"], *content.ids, ids[END]]
            learnt += [False, *(is_answer for _ in content.ids), is_answer]
        out.append(([*tokens, ids[EOS]], [*learnt, True]))
    return out
