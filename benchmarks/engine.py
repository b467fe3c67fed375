"""Throughput of the native engine: unsteered against every request steered in its own way, in one run.

Batches of n greedy requests run plain and steered in turn, so that a busy machine slows both; figures are medians of
the repeats, the ratio is the median of the pairs' ratios. Every steered request has a program of its own: A-LQR's route
(error at the block's input, control at its output) on all layers but the first. Time counts from the first decode step
on.

    python -m benchmarks.engine [--model DIR] [--device cpu|cuda] [--batch 1 16 32] [--tokens 64] [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from steering.law import Law
from steering.plant.plant import Plant
from steering.program import Program, Scope, Term
from steering.runtime import Engine, EngineSettings, Request, Sampling
from steering.types import across

RESULTS = Path(__file__).parent / "results"


def demo_sized(width: int = 192, layers: int = 8, vocab: int = 4096) -> LlamaForCausalLM:
    """A random Llama of the embedded model's size."""
    heads = width // 32
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=width * 8 // 3,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )
    )


def program(plant: Plant, seed: int) -> Program:
    """A program with a unit probe and a gain along it, as a fitted concept has, on layers 1 … L − 1."""
    generator = torch.Generator().manual_seed(seed)
    laws = {}
    for layer in range(1, plant.depth):
        direction = torch.randn(plant.width, generator=generator)
        direction /= direction.norm()
        laws[across(layer)] = Law.of(direction, 1.0, 0.5 * direction)
    gauges = dict.fromkeys(laws, (0.0, 1.0))
    return Program((Term(f"c{seed}", "lqr", laws, Scope(), target=1.0, gauges=gauges),))


def rate(engine: Engine, n: int, n_tokens: int, programs: list[Program], prompt_tokens: int) -> float:
    """Generated tokens per second of a batch of n, prompts not counted."""
    left, start = n, 0.0

    def deliver(event: object) -> None:
        nonlocal left
        left -= not hasattr(event, "token")

    sampling = Sampling(max_tokens=n_tokens, temperature=0.0, ignore_eos=True)
    for i in range(n):
        prompt = tuple((7 * i + j) % 1000 + 3 for j in range(prompt_tokens))
        engine.submit(Request(str(i), prompt, sampling, programs[i] if programs else Program()), deliver)
    engine.step()
    start = time.perf_counter()
    while left:
        engine.step()
    return n * (n_tokens - 1) / (time.perf_counter() - start)


def measure(plant: Plant, batches: list[int], n_tokens: int, repeats: int, model: str) -> dict[str, Any]:
    """Medians and ratios for batches of each size, printed as they come."""
    settings = EngineSettings(max_batch=max(batches), program_slots=max(batches), max_len=n_tokens + 32)
    engine = Engine(plant, settings)
    programs = [program(plant, seed) for seed in range(max(batches))]
    rows = []
    for n in batches:
        rate(engine, n, 8, programs, 16)  # programs become resident, taps are installed
        pairs = [(rate(engine, n, n_tokens, [], 16), rate(engine, n, n_tokens, programs, 16)) for _ in range(repeats)]
        plain, steered = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
        ratio = statistics.median(s / p for p, s in pairs)
        rows.append({"n": n, "plain_tok_s": round(plain), "steered_tok_s": round(steered), "ratio": round(ratio, 3)})
        print(f"n = {n:3d}   plain {plain:8.0f} tok/s   steered {steered:8.0f} tok/s   ratio {ratio:.3f}", flush=True)
    on_gpu = plant.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "model": model,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "tokens": n_tokens,
        "repeats": repeats,
        "rows": rows,
    }


def write(body: dict[str, Any], kind: str) -> None:
    """Keep the results of a kind of device."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"engine-{kind}.json").write_text(json.dumps(body, indent=2) + "\n")


def main() -> None:
    """Measure, print and write the results."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", help="a checkpoint; without it a random one of the embedded model's size")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--batch", type=int, nargs="+", default=[1, 16, 32])
    arguments.add_argument("--tokens", type=int, default=64)
    arguments.add_argument("--repeats", type=int, default=5)
    given = arguments.parse_args()
    plant = Plant.load(given.model, device=given.device) if given.model else Plant(demo_sized().to(given.device))
    model = given.model or "random llama, width 192, 8 layers, vocabulary 4096"
    write(measure(plant, given.batch, given.tokens, given.repeats, model), plant.device.type)


if __name__ == "__main__":
    main()
