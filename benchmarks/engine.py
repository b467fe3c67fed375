"""Throughput of the native engine: unsteered against steered, over distinct programs and interventions a request.

    python -m benchmarks.engine [--model DIR] [--device cpu|cuda] [--batch 16] [--programs 1 16 64 256]
                                [--interventions 1 4 16] [--tokens 64] [--repeats 5] [--width 192] [--layers 8]
                                [--shape 8b] [--name cpu]

What is run, and why in pairs, says `steering.evaluation.speed`; `setpoint bench` prints the same for any model. Without
a model a random Llama of the given size is run, or of one of `benchmarks.shapes`, in bfloat16 on a GPU. Writes
benchmarks/results/engine-NAME.json.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.shapes import SHAPES
from benchmarks.shapes import random_llama as of_shape
from steering.evaluation.speed import Load, lines, overhead
from steering.plant.plant import Plant

RESULTS = Path(__file__).parent / "results"


def random_llama(width: int = 192, layers: int = 8, vocab: int = 4096) -> LlamaForCausalLM:
    """A random Llama; by default of the embedded model's size."""
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


def measure(plant: Plant, load: Load, model: str) -> dict[str, Any]:
    """The rows of a load, printed, and what they were measured on."""
    rows = overhead(plant, load)
    for line in lines(rows):
        print("  ".join(f"{cell:>8}" for cell in line), flush=True)
    on_gpu = plant.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "model": model,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": asdict(load),
        "rows": [asdict(row) for row in rows],
    }


def write(body: dict[str, Any], name: str) -> None:
    """Keep the results under a name, by default the kind of device."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"engine-{name}.json").write_text(json.dumps(body, indent=2) + "\n")


def main() -> None:
    """Measure, print and write the results."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", help="a checkpoint; without it a random Llama")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--batch", type=int, default=16)
    arguments.add_argument("--programs", type=int, nargs="+", default=[1, 16, 64, 256])
    arguments.add_argument("--interventions", type=int, nargs="+", default=[1, 4, 16])
    arguments.add_argument("--tokens", type=int, default=64)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--width", type=int, default=192)
    arguments.add_argument("--layers", type=int, default=8)
    arguments.add_argument("--shape", choices=SHAPES, help="in place of width and layers")
    arguments.add_argument("--name", help="of the results, in place of the device")
    given = arguments.parse_args()
    if given.model:
        plant, model = Plant.load(given.model, device=given.device), given.model
    elif given.shape:
        dtype = torch.bfloat16 if given.device.startswith("cuda") else torch.float32
        plant, model = Plant(of_shape(SHAPES[given.shape], given.device, dtype)), f"random llama, {given.shape}"
    else:
        plant = Plant(random_llama(given.width, given.layers).to(given.device))
        model = f"random llama, width {given.width}, {given.layers} layers, vocabulary 4096"
    load = Load(
        batch=given.batch,
        programs=tuple(given.programs),
        interventions=tuple(given.interventions),
        max_tokens=given.tokens,
        repeats=given.repeats,
    )
    write(measure(plant, load, model), given.name or plant.device.type)


if __name__ == "__main__":
    main()
