"""Everything that needs a GPU, in one call of at most ten minutes: correctness of the compiled kernels, then speed.

    python -m benchmarks.gpu [--minutes 10]

1. the kernels' tests against their references, compiled (`tests/kernels/triton_*.py`), and decode steps that are
   recorded and in the air against plain ones (`tests/runtime/cuda_*.py`);
2. random-weight Llamas of 8B and 1B shapes in bfloat16: the time of a decode step unsteered and steered, at 1, 64 and
   256 programs, with and without graphs, the next step in the air and compiled modules, and the share of the bandwidth
   that it reaches (`benchmarks/decode.py`); steered ÷ unsteered throughput up to 256 programs and 4 interventions a
   request (`benchmarks/engine.py`); fits, dense against matrix-free (`benchmarks/fit.py`); bytes per request and
   program (`benchmarks/memory.py`);
3. the operators against their floors and the dense form (`benchmarks/feedback.py`, `edits.py`), norms with and without
   a law in their launch (`norm.py`), attention over blocks against rows in one piece (`attention.py`);
4. fits over width and depth, and of four blocks of 70B shapes, which all its blocks would exceed in weights alone.

Each part is a process of its own and keeps its own results: one that fails, or is not done when the time is up, costs
no other. What matters most comes first. Writes benchmarks/results/*-cuda*.json; prints which parts are missing, and the
exit status is 1 where any is. Without a GPU it says so and exits with 2. No figure of it is in the README yet.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
LIMIT = 150.0
"""Most seconds of one part, so that one that hangs leaves time for the others."""


def _tests(pattern: str) -> str:
    return " ".join(["pytest -q", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(pattern)))])


PARTS: tuple[str, ...] = (
    _tests("tests/kernels/triton_*.py"),
    _tests("tests/runtime/cuda_*.py"),
    "benchmarks.decode --device cuda --shape 8b --batch 1 64 256 --interventions 1 --steps 32 --name cuda-8b",
    "benchmarks.fit --device cuda --shape 8b --prompts 16",
    "benchmarks.engine --device cuda --shape 8b --batch 64 --programs 1 64 256 --interventions 4 --name cuda-8b",
    "benchmarks.memory --device cuda --shape 8b --name cuda-8b",
    "benchmarks.decode --device cuda --shape 1b --batch 1 64 256 --interventions 1 --steps 32 --name cuda-1b",
    "benchmarks.fit --device cuda --shape 1b --prompts 16",
    "benchmarks.engine --device cuda --shape 1b --batch 64 --programs 1 64 256 --interventions 4 --name cuda-1b",
    "benchmarks.memory --device cuda --shape 1b --name cuda-1b",
    "benchmarks.feedback --device cuda",
    "benchmarks.edits --device cuda",
    "benchmarks.norm --device cuda",
    "benchmarks.attention --device cuda",
    "benchmarks.fit --device cuda --shape 70b --layers 4 --prompts 16",
    "benchmarks.fit --device cuda --widths 512 1024 2048",
)
"""Modules with their arguments, the most important first."""


def run(parts: Sequence[str], seconds: float) -> dict[str, str]:
    """Run the parts in turn until the time is up; those that are missing, and why."""
    end, missing = time.monotonic() + seconds, dict[str, str]()
    for part in parts:
        left = min(LIMIT, end - time.monotonic())
        if left <= 0:
            missing[part] = "no time was left"
            continue
        print(f"--- {part}", flush=True)
        command = [sys.executable, "-m", *part.split()]
        try:
            status = subprocess.run(command, cwd=ROOT, timeout=left, check=False).returncode
        except subprocess.TimeoutExpired:
            missing[part] = f"not done after {left:.0f} s"
            continue
        if status:
            missing[part] = f"exit status {status}"
    return missing


def main() -> int:
    """Run all parts; 0 where none is missing."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--minutes", type=float, default=10.0)
    given = arguments.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA device: this benchmark has nothing to measure here.", file=sys.stderr)
        return 2
    missing = run(PARTS, 60 * given.minutes)
    for part, why in missing.items():
        print(f"missing: {part}: {why}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
