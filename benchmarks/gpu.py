"""Everything that needs a GPU, in one call of under ten minutes: correctness of the compiled kernels, then speed.

    python -m benchmarks.gpu [--tokens 64] [--repeats 5]

1. the kernels' tests against their references, compiled (`tests/kernels/triton_*.py`);
2. the operators against their floors and the dense form (`benchmarks/feedback.py`, `benchmarks/edits.py`);
3. a random-weight Llama of 8B shapes in bfloat16: steered ÷ unsteered throughput at batch 1, 16 and 64, with up to 256
   programs;
4. a fit's products at 8B shapes, dense against matrix-free (`benchmarks/fit.py --device cuda`).

Writes benchmarks/results/*-cuda.json. Without a GPU it says so and exits with 2. No figure of it is in the README yet.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]


def llama_8b() -> LlamaForCausalLM:
    """A random Llama of the 8B shapes, bfloat16, made on the GPU."""
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14_336,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def main() -> int:
    """Run the parts in turn; the exit status is that of the first that failed."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--tokens", type=int, default=64)
    arguments.add_argument("--repeats", type=int, default=5)
    given = arguments.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA device: this benchmark has nothing to measure here.", file=sys.stderr)
        return 2
    for command in (
        ["-m", "pytest", "-q", *(str(path) for path in sorted(ROOT.glob("tests/kernels/triton_*.py")))],
        ["-m", "benchmarks.feedback", "--device", "cuda"],
        ["-m", "benchmarks.edits", "--device", "cuda"],
        ["-m", "benchmarks.fit", "--device", "cuda"],
    ):
        if status := subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode:
            return status
    from benchmarks.engine import measure, write
    from steering.evaluation.speed import Load
    from steering.plant.plant import Plant

    plant = Plant(llama_8b())
    for batch, programs in ((1, (1,)), (16, (1, 16)), (64, (1, 64, 256))):
        load = Load(batch=batch, programs=programs, interventions=(4,), max_tokens=given.tokens, repeats=given.repeats)
        write(measure(plant, load, "random llama of 8B shapes, bfloat16"), f"cuda-{batch}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
