"""Gains of one concept, dense against matrix-free: time over width and depth, for the same cost and the same answer.

    python -m benchmarks.fit [--device cpu|cuda] [--widths D …] [--depths L …] [--prompts P] [--repeats N] [--plot FILE]
    python -m benchmarks.fit --shape 8b --device cuda [--layers L]       a whole fit at one shape, stage by stage

The first form times random Llamas (inner width 4 D) through the code that a fit runs, `Linearisation` and
`steering.control`. Dense: every Jacobian by D products a prompt and layer, then the float64 recursion. Matrix-free:
L (L + 1) / 2 products a prompt. Both in turn in one process, so a busy machine slows both; the ratio is what to read.
The exponent is the slope of log seconds over log width at the default depth, and over log depth at the least width.

What is to be expected: N ∝ D² weights a block, so dense takes L · D · N ∝ L D³ and matrix-free L² · N ∝ L² D²; less
where a piece of work is too small to be bound by its arithmetic.

The second form makes a model of a published shape in bfloat16 and times states, prefixes, products and recursion, with
the peak of the device's memory. `--layers` cuts the depth: nothing but the weights grows with it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import SHAPES, Shape, random_llama
from steering.control import Weights, output_regulate, regulate_along
from steering.fit.concept import difference_of_means, gains_along
from steering.plant.capture import capture_means, state_sites
from steering.plant.jacobian import Linearisation
from steering.plant.plant import Plant

WEIGHTS = Weights(1.0, 1.0, 1.0)
DEPTH = 8
"""Depth at which widths are compared."""
CONTEXT = 32
"""Tokens of a prompt along which the blocks are linearised."""
RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def prompts_of(plant: Plant, count: int, length: int) -> list[list[int]]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, plant.vocab, (count, length), generator=generator).tolist()


def timed(fit: Callable[[], Tensor], linear: Linearisation) -> tuple[float, int, Tensor]:
    """Seconds, products and gains of one fit."""
    before = linear.products
    start = time.perf_counter()
    w_LD = fit().cpu()  # the copy waits for the device
    return time.perf_counter() - start, linear.products - before, w_LD


def compare(width: int, depth: int, n_prompts: int, repeats: int, device: str) -> Row:
    """One row of the table."""
    torch.manual_seed(width + depth)
    plant = Plant(random_llama(Shape(width, depth, width // 32, width // 32, 4 * width), device))
    linear = Linearisation(plant, prompts_of(plant, n_prompts, CONTEXT), max_context=CONTEXT)
    generator = torch.Generator().manual_seed(1)
    v_LD = torch.nn.functional.normalize(torch.randn(depth + 1, width, generator=generator), dim=1).to(device)

    def dense() -> Tensor:
        return regulate_along((A for _, A in linear.jacobians()), v_LD, WEIGHTS, "output")

    def matrix_free() -> Tensor:
        return output_regulate(linear.vjp, v_LD, WEIGHTS, range(depth)).w_LD

    timed(matrix_free, linear)
    runs = [(timed(dense, linear), timed(matrix_free, linear)) for _ in range(repeats)]
    (_, dense_products, dense_w), (_, free_products, free_w) = runs[-1]
    return {
        "layers": depth,
        "width": width,
        "prompts": n_prompts,
        "dense_seconds": statistics.median(dense_run[0] for dense_run, _ in runs),
        "matrix_free_seconds": statistics.median(free_run[0] for _, free_run in runs),
        "ratio": statistics.median(dense_run[0] / free_run[0] for dense_run, free_run in runs),
        "dense_products_per_prompt": dense_products // n_prompts,
        "matrix_free_products_per_prompt": free_products // n_prompts,
        "relative_difference": float((free_w - dense_w).abs().max() / dense_w.abs().max()),
    }


def exponent(sizes: Iterable[float], seconds: Iterable[float]) -> float:
    """The slope of log seconds over log size, by least squares."""
    x, y = ([math.log(value) for value in values] for values in (sizes, seconds))
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread if spread else math.nan


def exponents(rows: list[Row], width: int) -> dict[str, dict[str, float | None]]:
    """Of both gains over width at depth `DEPTH`, and over depth at `width`; None where one size alone was measured."""
    found: dict[str, dict[str, float | None]] = {}
    for over, chosen in (
        ("width", [row for row in rows if row["layers"] == DEPTH]),
        ("layers", [row for row in rows if row["width"] == width]),
    ):
        sizes = [row[over] for row in chosen]
        slopes = {
            kind: exponent(sizes, [row[f"{kind}_seconds"] for row in chosen]) for kind in ("dense", "matrix_free")
        }
        found[over] = {kind: None if math.isnan(slope) else round(slope, 2) for kind, slope in slopes.items()}
    return found


def whole_fit(shape: Shape, device: str, n_prompts: int, examples: int, length: int) -> Row:
    """Seconds of every stage of a concept at one shape, in bfloat16, and the device's peak memory behind each."""
    plant = Plant(random_llama(shape, device, torch.bfloat16))
    cuda = torch.device(device).type == "cuda"
    sites = state_sites(plant)
    layers = range(min(1, plant.depth - 1), plant.depth)
    row: Row = {**{name: getattr(shape, name) for name in Shape.__slots__}, "prompts": n_prompts, "examples": examples}

    def stage(name: str, work: Callable[[], Any]) -> Any:
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        made = work()
        if cuda:
            torch.cuda.synchronize()
            row[f"{name}_peak_bytes"] = torch.cuda.max_memory_allocated()
        row[f"{name}_seconds"] = time.perf_counter() - start
        return made

    texts = prompts_of(plant, examples, length)
    capture_means(plant, texts[:2], sites)  # compiles and allocates
    means = stage("states", lambda: capture_means(plant, texts, sites))
    states_NLD = torch.stack([means[site] for site in sites], dim=1)
    direction_LD, _, _ = difference_of_means(states_NLD[::2], states_NLD[1::2])
    linear = stage("prefixes", lambda: Linearisation(plant, texts[:n_prompts], max_context=length))
    for kind in ("matrix_free", "dense"):
        stage(kind, lambda kind=kind: gains_along(linear, kind, direction_LD, WEIGHTS, layers, lambda *_: None))
    return row


def plot(record: Row, path: Path) -> None:
    """Seconds over width and over depth, both on logarithmic axes, with the fitted exponents."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    rows, least = record["rows"], min(row["width"] for row in record["rows"])
    panels = (("width", "layers", DEPTH), ("layers", "width", least))
    for axis, (over, fixed, at) in zip(axes, panels, strict=True):
        chosen = sorted((row for row in rows if row[fixed] == at), key=lambda row: row[over])
        for kind, label in (("dense", "dense"), ("matrix_free", "matrix-free")):
            slope = record["exponents"][over][kind]
            name = label if slope is None else f"{label}, exponent {slope:.2f}"
            axis.plot([row[over] for row in chosen], [row[f"{kind}_seconds"] for row in chosen], "o-", label=name)
        axis.set(xscale="log", yscale="log", xlabel=over, title=f"{fixed} {at}")
        axis.minorticks_off()
        sizes = [row[over] for row in chosen]
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.legend()
    axes[0].set_ylabel("seconds a fit")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--out", type=Path, help="a file other than benchmarks/results/fit-….json")
    return parser


def _sweep(given: argparse.Namespace) -> Row:
    """The first form: prints and returns the table."""
    if wrong := [width for width in given.widths if width % 32 or width < 32]:
        sys.exit(f"--widths: expected multiples of 32, got {wrong}.")
    least = min(given.widths)
    cases = dict.fromkeys([*((width, DEPTH) for width in given.widths), *((least, depth) for depth in given.depths)])
    rows = []
    for width, depth in cases:
        row = compare(width, depth, given.prompts, given.repeats, given.device)
        rows.append(row)
        print(
            f"L={depth:3d} D={width:5d}: dense {row['dense_seconds']:.3f} s, matrix-free "
            f"{row['matrix_free_seconds']:.4f} s, ratio {row['ratio']:.0f}; products a prompt "
            f"{row['dense_products_per_prompt']} and {row['matrix_free_products_per_prompt']}; "
            f"relative difference {row['relative_difference']:.1e}"
        )
    found = exponents(rows, least)
    for over, slopes in found.items():
        print(f"exponent over {over}: dense {slopes['dense']}, matrix-free {slopes['matrix_free']}")
    return {"repeats": given.repeats, "rows": rows, "exponents": found}


def main() -> None:
    """Print the table and write `benchmarks/results/fit-….json`."""
    given = _parser().parse_args()
    torch.set_num_threads(1)
    device = given.device.partition(":")[0]
    record: Row = {"device": device, "threads": 1, "torch": torch.__version__}
    if given.shape is None:
        record |= _sweep(given)
        path = RESULTS / f"fit-{device}.json"
    else:
        shape = SHAPES[given.shape]
        shape = replace(shape, depth=given.layers or shape.depth)
        record |= {"shape": given.shape, **whole_fit(shape, given.device, given.prompts, given.examples, given.length)}
        print(json.dumps(record, indent=2))
        path = RESULTS / f"fit-{given.shape}-{device}.json"
    path = given.out or path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    if given.plot is not None:
        plot(record, given.plot)


if __name__ == "__main__":
    main()
