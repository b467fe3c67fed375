"""Bytes that a token of context and a program cost, measured against what the shapes say.

    python -m benchmarks.memory [--model DIR | --shape 8b] [--device cpu|cuda] [--batch 4] [--name cpu]

Each figure is a slope: two engines that differ in one size, and the difference of what they hold divided by the
difference of the size. What is held is counted in every tensor that is alive, each storage once (on a GPU: what its
allocator has given out), so nothing that the engine keeps is left out.

    context     one position of the pool of keys and values   Σ_layers 2 · kv heads · head width · bytes of a number
    slot        one program resident on the device            Σ_routes (D + E + 5) · 4
    known       one program more than slots, on the host      the same: kept so that it need not be prepared again

On a CPU a resident program is held twice, as known and in its slot; the slot's figure is that without the other. A
program is that of `lqr`: one channel on all blocks but the first, of which a slot holds what `Law.resident`
says. Writes benchmarks/results/memory-NAME.json.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.shapes import SHAPES, random_llama
from steering import Engine, EngineSettings, Plant, Request, Sampling
from steering.demo import MODEL
from steering.evaluation.speed import program

RESULTS = Path(__file__).parent / "results"
LENGTHS = (64, 128)
SLOTS = (8, 16)
"""Powers of two: a bank may grow by doubling."""
KNOWN = (8, 16)
KINDS = (torch.Tensor, torch.nn.Parameter)
"""Tensors that have memory: what torch traces a function with, say, has none."""
SCALARS = 5
"""Numbers of a channel beside probe and gain that a slot holds: limit, knee, floor, relative and ‖gain‖."""


def held(device: torch.device) -> int:
    """Bytes of all tensors that are alive on a device, each storage once."""
    gc.collect()
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    tensors = [one for one in gc.get_objects() if type(one) in KINDS and one.device.type == "cpu"]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


def slope(measure: Callable[[int], int], sizes: tuple[int, int]) -> float:
    """What one more of a size costs."""
    low, high = (measure(size) for size in sizes)
    return (high - low) / (sizes[1] - sizes[0])


def context_bytes(plant: Plant, batch: int) -> tuple[float, int]:
    """Bytes of one position, measured and by the shapes."""

    def measure(length: int) -> int:
        before = held(plant.device)
        engine = Engine(plant, EngineSettings(max_batch=batch, max_model_len=length, program_slots=1))
        after = held(plant.device)
        engine.stop()
        return after - before

    return slope(measure, LENGTHS) / batch, position_bytes(plant)


def position_bytes(plant: Plant) -> int:
    """Bytes of the keys and values of one position by the shapes."""
    heads = plant.heads
    return 2 * plant.depth * heads.kv_count * heads.width * plant.dtype.itemsize


def program_bytes(plant: Plant) -> int:
    """Bytes of a program by the shapes."""
    return max(plant.depth - 1, 1) * (2 * plant.width + SCALARS) * 4


def slot_bytes(plant: Plant) -> float:
    """Bytes of one slot of the bank, filled."""

    def measure(slots: int) -> int:
        before = held(plant.device)
        engine = Engine(plant, EngineSettings(max_batch=1, max_model_len=16, program_slots=slots))
        _run(engine, plant, range(slots))
        after = held(plant.device)
        engine.stop()
        return after - before

    filled = slope(measure, SLOTS)
    return filled if plant.device.type == "cuda" else filled - known_bytes(plant)


def known_bytes(plant: Plant) -> float:
    """Bytes that the host keeps of a program that has been served and let go; the bank has its size already."""

    def measure(programs: int) -> int:
        engine = Engine(plant, EngineSettings(max_batch=1, max_model_len=16, program_slots=8))
        _run(engine, plant, range(8))
        before = held(torch.device("cpu"))
        _run(engine, plant, range(8, 8 + programs))
        after = held(torch.device("cpu"))
        engine.stop()
        return after - before

    return slope(measure, KNOWN)


def _run(engine: Engine, plant: Plant, seeds: range) -> None:
    """Serve one token under each program, one program after another."""
    for seed in seeds:
        engine.generate([Request(str(seed), (3,), Sampling(max_tokens=1), program(plant, seed))])


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint; the embedded model without it")
    parser.add_argument("--shape", choices=SHAPES, help="a random Llama in place of a checkpoint, bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--name", help="of the results, in place of the device")
    given = parser.parse_args()
    if given.shape:
        plant = Plant(random_llama(SHAPES[given.shape], given.device, torch.bfloat16))
    else:
        plant = Plant.load(given.model or str(MODEL), device=given.device)
    found = {
        "context": context_bytes(plant, given.batch),
        "slot": (slot_bytes(plant), program_bytes(plant)),
        "known": (known_bytes(plant), program_bytes(plant)),
    }
    rows = {name: {"measured_bytes": measured, "formula_bytes": formula} for name, (measured, formula) in found.items()}
    for name, row in rows.items():
        print(f"{name:8} " + "  ".join(f"{key} {value:.6g}" for key, value in row.items()))
    body = {
        "device": torch.cuda.get_device_name() if plant.device.type == "cuda" else "cpu",
        "model": f"random llama, {given.shape}" if given.shape else given.model or "embedded",
        "dtype": str(next(plant.model.parameters()).dtype).removeprefix("torch."),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"memory-{given.name or plant.device.type}.json").write_text(json.dumps(body, indent=2) + "\n")


if __name__ == "__main__":
    main()
