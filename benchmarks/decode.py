"""What a decode step costs with its launches recorded as a graph, and with the next one in the air: steps apart.

    python -m benchmarks.decode [--device cpu|cuda] [--shape 16x512] [--batch 1 16 64] [--interventions 4]
                                [--steps 64] [--repeats 5]

Engines over one model take steps in turn, so that a busy machine slows all alike: without either, with graphs, with
both, and with the feed-forward modules compiled besides; each unsteered and with as many programs as requests. A figure
is the median over repeats of the time of so many steps, prompts left out. On a CPU nothing can be recorded and a step
in the air saves nothing: there it shows what both cost the host. Writes benchmarks/results/decode-<device>.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import SHAPES, random_llama
from steering.evaluation.speed import program
from steering.plant.plant import Plant
from steering.program import Program
from steering.runtime import Engine, EngineSettings, Request, Sampling

RESULTS = Path(__file__).parent / "results"
WAYS: Mapping[str, dict[str, bool]] = {
    "plain": {"graphs": False, "pipeline": False},
    "graphs": {"graphs": True, "pipeline": False},
    "graphs, ahead": {"graphs": True, "pipeline": True},
    "graphs, ahead, compiled": {"graphs": True, "pipeline": True, "compile": True},
}
PROMPT = 16
WARM = 12
"""Steps before the first that counts: graphs are recorded in them."""


def decoding(plant: Plant, way: str, batch: int, programs: Sequence[Program], steps: int) -> Engine:
    """An engine with a full batch on its way, its prompts read and its graphs recorded."""
    length = PROMPT + WARM + steps + 8
    engine = Engine(plant, EngineSettings(max_batch=batch, program_slots=max(batch, 1), max_len=length, **WAYS[way]))
    sampling = Sampling(max_tokens=length - PROMPT, temperature=0.0, ignore_eos=True)
    for i in range(batch):
        prompt = tuple((7 * i + j) % 500 + 3 for j in range(PROMPT))
        engine.submit(Request(f"r{i}", prompt, sampling, programs[i] if programs else Program()), lambda _: None)
    before = 0
    while before < WARM * batch:
        engine.step()
        before = engine.stats().generated_tokens
    return engine


def measure(plant: Plant, batch: int, interventions: int, steps: int, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds a step, by way, unsteered and steered."""
    cases = {"unsteered": [], "steered": [program(plant, seed, interventions) for seed in range(batch)]}
    engines = {
        (way, name): decoding(plant, way, batch, programs, steps * repeats)
        for way in WAYS
        for name, programs in cases.items()
    }
    times: dict[tuple[str, str], list[float]] = {key: [] for key in engines}
    for _ in range(repeats):
        for key, engine in engines.items():
            start = time.perf_counter()
            for _ in range(steps):
                engine.step()
            times[key].append((time.perf_counter() - start) / steps)
    for engine in engines.values():
        engine.stop()
    return {way: {name: 1e3 * statistics.median(times[way, name]) for name in cases} for way in WAYS}


def main() -> None:
    """Measure, print and write the results."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--shape", choices=SHAPES, default="16x512")
    arguments.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    arguments.add_argument("--interventions", type=int, default=4)
    arguments.add_argument("--steps", type=int, default=64)
    arguments.add_argument("--repeats", type=int, default=5)
    given = arguments.parse_args()
    on_gpu = given.device.startswith("cuda")
    plant = Plant(random_llama(SHAPES[given.shape], given.device, torch.bfloat16 if on_gpu else torch.float32))
    rows: dict[int, Any] = {}
    for batch in given.batch:
        rows[batch] = measure(plant, batch, given.interventions, given.steps, given.repeats)
        for way, found in rows[batch].items():
            ratio = found["unsteered"] / found["steered"]
            print(f"batch {batch:3}  {way:24}", *(f"{name} {ms:8.3f} ms" for name, ms in found.items()), f"{ratio:.3f}")
    body = {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "model": f"random llama, {given.shape}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "interventions": given.interventions,
        "steps": given.steps,
        "milliseconds": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"decode-{'cuda' if on_gpu else 'cpu'}.json").write_text(json.dumps(body, indent=2) + "\n")


if __name__ == "__main__":
    main()
