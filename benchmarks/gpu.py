"""Everything that needs a GPU, in one call of under ten minutes: correctness of the compiled kernels, then speed.

    python -m benchmarks.gpu [--tokens 64] [--repeats 5]

1. the kernels' tests against their references, compiled (`tests/kernels/triton_*.py`), and decode steps that are
   recorded and in the air against plain ones (`tests/runtime/cuda_*.py`);
2. the operators against their floors and the dense form (`benchmarks/feedback.py`, `benchmarks/edits.py`), norms with
   and without a law in their launch (`benchmarks/norm.py`), and attention over blocks against rows in one piece
   (`benchmarks/attention.py`);
3. a random-weight Llama of 8B shapes in bfloat16: steered ÷ unsteered throughput at batch 1, 16 and 64, with up to 256
   programs; and what a decode step costs with and without graphs, the next step in the air, and compiled modules
   (`benchmarks/decode.py`);
4. fits, dense against matrix-free: over width and depth, a whole concept at 8B shapes, and four blocks of 70B shapes,
   which all its blocks would exceed in weights alone, with the peak of memory (`benchmarks/fit.py`).

Writes benchmarks/results/*-cuda.json. Without a GPU it says so and exits with 2. No figure of it is in the README yet.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.shapes import SHAPES, random_llama

ROOT = Path(__file__).parents[1]


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
        ["-m", "pytest", "-q", *(str(path) for path in sorted(ROOT.glob("tests/runtime/cuda_*.py")))],
        ["-m", "benchmarks.feedback", "--device", "cuda"],
        ["-m", "benchmarks.edits", "--device", "cuda"],
        ["-m", "benchmarks.norm", "--device", "cuda"],
        ["-m", "benchmarks.attention", "--device", "cuda"],
        ["-m", "benchmarks.decode", "--device", "cuda", "--shape", "8b"],
        ["-m", "benchmarks.fit", "--device", "cuda", "--widths", "512", "1024", "2048"],
        ["-m", "benchmarks.fit", "--device", "cuda", "--shape", "8b", "--prompts", "16"],
        ["-m", "benchmarks.fit", "--device", "cuda", "--shape", "70b", "--layers", "4", "--prompts", "16"],
    ):
        if status := subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode:
            return status
    from benchmarks.engine import measure, write
    from steering.evaluation.speed import Load
    from steering.plant.plant import Plant

    plant = Plant(random_llama(SHAPES["8b"], "cuda", torch.bfloat16))
    for batch, programs in ((1, (1,)), (16, (1, 16)), (64, (1, 64, 256))):
        load = Load(batch=batch, programs=programs, interventions=(4,), max_tokens=given.tokens, repeats=given.repeats)
        write(measure(plant, load, "random llama of 8B shapes, bfloat16"), f"cuda-{batch}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
