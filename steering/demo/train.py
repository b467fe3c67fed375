"""Train the embedded model on a CPU: `python -m steering.demo.train --minutes 60 --out steering/demo/model`.

A Llama of about four million parameters, AdamW, a warm-up, a flat stretch and a linear decay to 2 %. The corpus is
drawn from its seed while training runs, so no document is seen twice. The schedule follows the larger of the share of
the tokens and the share of the minutes spent, so that a run ends on time on a slow machine too; with `--tokens` alone
it depends on no clock. Held-out loss is measured on documents of another seed, answers only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from steering.demo import tokenizer as tokenizers
from steering.demo.documents import documents

# glibc gives large buffers back to the kernel after every step: 1.0-2.9k tokens/s, against 4.1k with these settings.
# They are read when a process starts, so the trainer starts itself again with them.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "OMP_NUM_THREADS": "1",
}
HELD_OUT_SEED, CONTEXT = 2, 512
LENGTHS = (40, 56, 72, 96, 136, 208, 448)  # padded lengths of the rows, one compiled graph each
Batch = tuple[torch.Tensor, torch.Tensor]


def model_config(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> LlamaConfig:
    """The architecture: heads of 32, an MLP of 8/3 of the width, tied embeddings."""
    return LlamaConfig(
        vocab_size=tokenizers.VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
        num_key_value_heads=width // 32, intermediate_size=width * 8 // 3, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True, rms_norm_eps=1e-5, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, size: int, chunk: int = 4096, thin: float = 0.0
) -> Iterator[Batch]:
    """Yield (tokens_BT, labels_BT) of `size` tokens or a little less; -100 marks what is not learnt.

    Rows are padded on the right, which a causal model needs no mask for, to one of a few lengths: each shape is
    compiled once, and compiled steps are 1.9 times as fast. Rows that do not fill a batch wait for the next chunk.
    """
    rng = random.Random(seed)
    source = documents(seed, thin=thin)
    waiting: dict[int, list[tuple[list[int], list[bool]]]] = {length: [] for length in LENGTHS}
    while True:
        ready = []
        for row in tokenizers.encode(tokenizer, [next(source) for _ in range(chunk)]):
            length = next((n for n in LENGTHS if n >= len(row[0])), None)
            if length is None:
                continue
            waiting[length].append(row)
            if len(waiting[length]) == size // length:
                ready.append((length, waiting[length]))
                waiting[length] = []
        rng.shuffle(ready)
        for length, rows in ready:
            tokens = torch.full((len(rows), length), tokenizer.pad_token_id)
            labels = torch.full((len(rows), length), -100)
            for i, (ids, learnt) in enumerate(rows):
                tokens[i, : len(ids)] = torch.tensor(ids)
                labels[i, : len(ids)] = torch.where(torch.tensor(learnt), torch.tensor(ids), -100)
            yield tokens, labels


def loss_of(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy in nats over the learnt tokens of `batch`."""
    tokens, labels = batch
    logits = model(input_ids=tokens, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
    )


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, n: int = 16) -> float:
    """Mean loss in nats per token over `n` batches of the held-out seed."""
    source = batches(tokenizer, HELD_OUT_SEED, 2048, 1024)
    return sum(loss_of(model, next(source)).item() for _ in range(n)) / n


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, card: dict[str, object]) -> None:
    """Write a loadable folder beside `out`, then put it in place file by file: a reader never sees half a file."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(tokenizers.END)],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    (part / "training.json").write_text(json.dumps(card, indent=2) + "\n")
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(part.iterdir()):
        file.chmod(0o644)
        os.replace(file, out / file.name)
    part.rmdir()


def rate(progress: float, peak: float, flat: float = 0.35) -> float:
    """Learning rate at `progress` in [0, 1]: flat, then linear to 2 % of `peak`."""
    return peak * (1.0 if progress < flat else 1 - 0.98 * (progress - flat) / (1 - flat))


def train(args: argparse.Namespace) -> LlamaForCausalLM:
    """Train as the command line says; writes checkpoints and the final model to `args.out`."""
    torch.manual_seed(0)
    if args.start:
        tokenizer = AutoTokenizer.from_pretrained(args.start)
        model = LlamaForCausalLM.from_pretrained(args.start, dtype=torch.float32)
    else:
        tokenizer = tokenizers.build()
        model = LlamaForCausalLM(model_config(tokenizer, args.width, args.layers))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    # One graph per row length; the limit is on recompilations of one function.
    torch._dynamo.config.recompile_limit = 2 * len(LENGTHS)
    step_loss = torch.compile(loss_of, dynamic=False) if args.compile else loss_of
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"parameters {n_parameters} vocabulary {len(tokenizer)}", flush=True)
    source, start, seen, step, saved = (
        batches(tokenizer, args.seed, args.batch, thin=args.thin),
        time.monotonic(),
        0,
        0,
        time.monotonic(),
    )
    running, progress = 0.0, 0.0
    while progress < 1:
        batch = next(source)
        for group in optimizer.param_groups:
            group["lr"] = rate(progress, args.lr) * min(1.0, (step + 1) / 100)
        with torch.autocast("cpu", torch.bfloat16):
            loss = step_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, seen = step + 1, seen + batch[0].numel()
        running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
        spent = time.monotonic() - start
        progress = max(seen / args.tokens if args.tokens else 0.0, spent / 60 / args.minutes if args.minutes else 0.0)
        if step % 20 == 0:
            print(
                f"step {step} tokens {seen} loss {running:.4f} {seen / spent:.0f} tok/s {spent:.0f} s {progress:.3f}",
                flush=True,
            )
        if progress >= 1 or time.monotonic() - saved > 60 * args.every:
            held_out = held_out_loss(model, tokenizer)
            saved = time.monotonic()
            print(f"held-out loss {held_out:.4f} at {seen} tokens", flush=True)
            options = {key: str(value) for key, value in vars(args).items() if key != "out"}
            measured = {"parameters": n_parameters, "seen": seen, "steps": step, "seconds": round(spent)}
            save(model, tokenizer, args.out, {**measured, "held_out_loss": round(held_out, 4), "options": options})
    return model


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m steering.demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model, written every --every minutes")
    parser.add_argument("--tokens", type=int, default=0, help="end after this many tokens (0: no bound)")
    parser.add_argument("--minutes", type=float, default=0.0, help="end after this many minutes (0: no bound)")
    parser.add_argument("--every", type=float, default=5.0, help="minutes between checkpoints")
    parser.add_argument("--start", type=Path, help="folder of a model to go on from; a new model without it")
    parser.add_argument("--seed", type=int, default=1, help="seed of the corpus, not 2")
    parser.add_argument("--thin", type=float, default=0.0, help="share of documents without tone and truth left out")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2048, help="tokens per step")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="needs a C++ compiler")
    parser.add_argument("--lr", type=float, default=2.5e-3)
    args = parser.parse_args()
    if not (args.tokens or args.minutes):
        parser.error("say when to end: --tokens or --minutes")
    if "MALLOC_TOP_PAD_" not in os.environ:
        again = [sys.executable, "-m", "steering.demo.train", *sys.argv[1:]]
        os.execve(sys.executable, again, {**os.environ, **MALLOC})
    train(args)


if __name__ == "__main__":
    main()
