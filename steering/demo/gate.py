"""The gate the weights must pass: is every attribute consistent? `python -m steering.demo.gate [MODEL] [--n 96]`.

A model of this size can have a fine perplexity and no usable tone, so the weights are not judged on perplexity. For
every attribute the gate measures, on user messages that were never trained on, at T = 0.8:

* `asked`: the share of answers that carry the concept when the system prompt asks for it; `against`: when it asks for
  the opposite; `free`: when there is no system prompt.
* `keeps`: the share of answers that carry the concept after two sentences which do (what follows is judged alone).

It prints the table and ends with status 1 when a threshold is missed.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from steering.demo import MODEL, TOPICS
from steering.demo.contrast import OPPOSITES, Example, opposite, prompts
from steering.demo.documents import message, system_text
from steering.demo.judges import JUDGES, distinct_n, fluency

Chat = Sequence[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Row:
    """One concept's rates; nan where a measure does not apply."""

    concept: str
    asked: float
    against: float
    free: float
    keeps: float

    @property
    def passes(self) -> bool:
        """`asked` reaches .8 and `keeps` .7, and the system prompt makes a difference of at least a half."""
        return self.asked >= 0.8 and self.asked - self.against >= 0.5 and not self.keeps < 0.7


def load(folder: Path) -> tuple[PreTrainedModel, Any]:
    """The model in float32 and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def encode(tokenizer: Any, example: Example) -> list[int]:
    """Token ids of a prompt: a text, a chat to be answered, or a chat whose last message, an answer, is continued."""
    if isinstance(example, str):
        return list(tokenizer(example).input_ids)
    begun = example[-1]["role"] == "assistant"
    return list(
        tokenizer.apply_chat_template(
            example, tokenize=True, return_dict=False, add_generation_prompt=not begun, continue_final_message=begun
        )
    )


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    temperature: float = 0.8,
    seed: int = 0,
    length: int = 64,
    batch: int = 32,
) -> list[str]:
    """The continuation of each example, at most `length` tokens; greedy at temperature 0."""
    torch.manual_seed(seed)
    ids = [encode(tokenizer, e) for e in examples]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    out = [""] * len(ids)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        width = max(len(ids[i]) for i in rows)
        tokens = torch.full((len(rows), width), tokenizer.pad_token_id)
        for k, i in enumerate(rows):
            tokens[k, width - len(ids[i]) :] = torch.tensor(ids[i])
        made = model.generate(
            tokens, attention_mask=(tokens != tokenizer.pad_token_id).long(), max_new_tokens=length, **sampling
        )
        for i, text in zip(rows, tokenizer.batch_decode(made[:, width:], skip_special_tokens=True), strict=True):
            out[i] = text.strip()
    return out


def rate(concept: str, texts: Sequence[str], examples: Sequence[Example]) -> float:
    """Share of `texts` that the judge of `concept` accepts."""
    return sum(JUDGES[concept](t, e) for t, e in zip(texts, examples, strict=True)) / len(texts)


def _under(rng: random.Random, system: str, examples: Sequence[Example]) -> list[Example]:
    return [[message("system", system_text(rng, system)), *e] for e in examples if not isinstance(e, str)]


def measure(model: PreTrainedModel, tokenizer: Any, concept: str, n: int) -> Row:
    """The rates of one concept over `n` held-out prompts each."""
    rng = random.Random(concept)
    neutral = prompts(concept, "neutral", "test", n)
    name = f"topic:{concept}" if concept in TOPICS else concept
    other = opposite(concept)
    rival = other or f"topic:{TOPICS[(TOPICS.index(concept) + 1) % len(TOPICS)]}"

    def of(examples: Sequence[Example]) -> float:
        return rate(concept, generate(model, tokenizer, examples), examples)

    keeps = float("nan")
    if other in OPPOSITES and other not in ("refusal", "compliance", "english", "spanish"):
        chats = [e for e in prompts(other, "opposed", "test", 2 * n) if not isinstance(e, str)]
        keeps = of([e for e in chats if e[-1]["role"] == "assistant"])
    return Row(concept, of(_under(rng, name, neutral)), of(_under(rng, rival, neutral)), of(neutral), keeps)


def main() -> None:
    """Measure, print, and end with status 1 when the gate is not passed."""
    parser = argparse.ArgumentParser(prog="python -m steering.demo.gate", description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=MODEL)
    parser.add_argument("--n", type=int, default=96, help="prompts per cell")
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    rows = []
    print(f"{'concept':12} {'asked':>7} {'against':>7} {'free':>7} {'keeps':>7}")
    for concept in JUDGES:
        rows.append(measure(model, tokenizer, concept, args.n))
        row = rows[-1]
        rates = " ".join(f"{value:7.2f}" for value in (row.asked, row.against, row.free, row.keeps))
        print(f"{concept:12} {rates}{'' if row.passes else '   below'}", flush=True)
    free = generate(model, tokenizer, prompts("positive", "neutral", "test", args.n))
    tri = sum(map(fluency, free)) / len(free)
    print(f"fluency {tri:.3f}   distinct-2 {distinct_n(free):.3f}")
    if tri < 0.93 or not all(row.passes for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
