"""What a decode step costs with its launches recorded as a graph, and with the next one in the air: steps apart.

    python -m benchmarks.decode [--device cpu|cuda] [--shape 16x512] [--batch 1 16 64] [--interventions 4]
                                [--steps 64] [--repeats 5] [--name cpu]

Engines over one model take steps in turn, the order turned round each time, so that a busy machine slows all alike:
without either, with graphs, with both, and with the feed-forward modules compiled besides, where there is a compiler;
each unsteered and with as many programs as requests. Times are medians over repeats of so many steps, prompts left out;
the ratio, unsteered ÷ steered time, is the median of those within a repeat. `roofline` is the share of the memory's
bandwidth, measured here by a copy, that a step reaches: the weights that it reads (of the embedding only rows, unless
it is the head) and the keys and values of the batch, ÷ the time. On a CPU nothing can be recorded and a step in the air
saves nothing: there it shows what both cost the host. Writes benchmarks/results/decode-NAME.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import position_bytes
from benchmarks.shapes import SHAPES, random_llama
from steering.errors import SpecError
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
    engine = Engine(
        plant, EngineSettings(max_batch=batch, program_slots=max(batch, 1), max_model_len=length, **WAYS[way])
    )
    sampling = Sampling(max_tokens=length - PROMPT, temperature=0.0, ignore_eos=True)
    for i in range(batch):
        prompt = tuple((7 * i + j) % 500 + 3 for j in range(PROMPT))
        engine.submit(Request(f"r{i}", prompt, sampling, programs[i] if programs else Program()), lambda _: None)
    before = 0
    while before < WARM * batch:
        engine.step()
        before = engine.stats().generated_tokens
    return engine


def bandwidth(device: str) -> float:
    """Bytes a second that a copy reads and writes."""
    wait = waiting(device)
    one = torch.empty(2**30 if device.startswith("cuda") else 2**26, dtype=torch.uint8, device=device)
    other, times = torch.zeros_like(one), []
    for _ in range(10):
        wait()
        start = time.perf_counter()
        one.copy_(other)
        wait()
        times.append(time.perf_counter() - start)
    return 2 * one.nbytes / statistics.median(times[2:])


def traffic(plant: Plant, batch: int, context: float) -> float:
    """Bytes that a step of `batch` tokens must read at so many tokens of context."""
    table, head = plant.model.get_input_embeddings().weight, plant.model.get_output_embeddings().weight
    weights = sum(p.nbytes for p in plant.model.parameters()) - (0 if table is head else table.nbytes)
    return weights + batch * context * position_bytes(plant)


def waiting(device: str) -> Callable[[], None]:
    """What waits until a device has done what it was given."""
    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None


def measure(
    plant: Plant, batch: int, interventions: int, steps: int, repeats: int, peak: float
) -> list[dict[str, Any]]:
    """A row for each way; of one that this machine does not have, why."""
    cases = {"unsteered": [], "steered": [program(plant, seed, interventions) for seed in range(batch)]}
    engines: dict[tuple[str, str], Engine] = {}
    absent: dict[str, str] = {}
    for way in WAYS:
        try:
            engines |= {(way, name): decoding(plant, way, batch, own, steps * repeats) for name, own in cases.items()}
        except SpecError as reason:
            absent[way] = str(reason)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in engines}
    wait = waiting(plant.device.type)
    for repeat in range(repeats):
        for key, engine in list(engines.items())[:: -1 if repeat % 2 else 1]:
            wait()  # for the step that another engine has in the air
            start = time.perf_counter()
            for _ in range(steps):
                engine.step()
            wait()
            times[key].append((time.perf_counter() - start) / steps)
    for engine in engines.values():
        engine.stop()
    least = traffic(plant, batch, PROMPT + WARM + steps * repeats / 2) / peak
    rows: list[dict[str, Any]] = []
    for way in WAYS:
        row: dict[str, Any] = {"batch": batch, "way": way}
        rows.append(row)
        if way in absent:
            row["absent"] = absent[way]
            continue
        for name in cases:
            row[f"{name}_ms"] = 1e3 * statistics.median(times[way, name])
            row[f"{name}_roofline"] = 1e3 * least / row[f"{name}_ms"]
        pairs = zip(times[way, "unsteered"], times[way, "steered"], strict=True)
        row["ratio"] = statistics.median(plain / steered for plain, steered in pairs)
    return rows


def main() -> None:
    """Measure, print and write the results."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--shape", choices=SHAPES, default="16x512")
    arguments.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    arguments.add_argument("--interventions", type=int, default=4)
    arguments.add_argument("--steps", type=int, default=64)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--name", help="of the results, in place of the device")
    given = arguments.parse_args()
    on_gpu = given.device.startswith("cuda")
    plant = Plant(random_llama(SHAPES[given.shape], given.device, torch.bfloat16 if on_gpu else torch.float32))
    peak, rows = bandwidth(given.device), list[dict[str, Any]]()
    for batch in given.batch:
        for row in measure(plant, batch, given.interventions, given.steps, given.repeats, peak):
            cells = [f"{name} {value:.3f}" for name, value in row.items() if isinstance(value, float)]
            print(f"batch {batch:3}  {row['way']:24}", *cells, row.get("absent", ""), flush=True)
            rows.append(row)
    body = {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "model": f"random llama, {given.shape}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "interventions": given.interventions,
        "steps": given.steps,
        "repeats": given.repeats,
        "bandwidth_gigabytes_per_second": peak / 1e9,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    name = given.name or ("cuda" if on_gpu else "cpu")
    (RESULTS / f"decode-{name}.json").write_text(json.dumps(body, indent=2) + "\n")


if __name__ == "__main__":
    main()
