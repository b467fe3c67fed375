"""What the edits of one site and the linear map that skips columns cost, against the least and against a dense product.

    python -m benchmarks.edits [--device cpu] [--shapes 16x192,1x14336]

Per (tokens T, width E), every token with its own program and a knob, a cap and a budget:

* `mask`      `kernels.mask_`;                           floor: y *= s, one row for all tokens
* `turn`      `kernels.turn_`;                           floor: y += (y Bᵀ) B with two rows B
* `count`     `kernels.sparsify_`, half by count;        floor: y *= k
* `threshold` `kernels.sparsify_`, half by a threshold;  floor: y *= k
* `linear`    `kernels.sparse_linear` at half zeros;     floor: the sum of the columns that one token uses

`bound` is the same operator by `kernels.bind`, all arguments but the row resolved before: what an engine's layer pays.
`dense` is the product of y with an E×E matrix, which a rotation or a projection would be otherwise, and which a sparse
input is meant to make cheaper. Prints medians in microseconds and the ratios of the bound call, and writes
benchmarks/results/edits-<device>.json. All are timed in turn within each repetition, as in `benchmarks.feedback`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.feedback import REPETITIONS, SLOTS, medians
from kernels import bind, mask_, sparse_linear, sparsify_, turn_

SHAPES = {"cpu": "1x192,16x192,16x2304", "cuda": "1x4096,16x4096,1x14336,16x14336,512x4096"}
KINDS = ("mask", "turn", "count", "threshold", "linear")


def candidates(kind: str, T: int, E: int, device: str) -> dict[str, Callable[[], object]]:
    """The contenders on the same random rows, bfloat16 on a GPU."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    def full(value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, device=device)

    y_TE, W_EE = normal(T, E).to(dtype), (normal(E, E) / math.sqrt(E)).to(dtype).mT
    half_TE = y_TE * (normal(T, E) > 0)
    dense = {"dense": lambda: linear(y_TE, W_EE)}
    if kind == "linear":
        used = half_TE[0].nonzero().squeeze(1)
        floor = lambda: W_EE.mT.index_select(0, used).sum(0)  # noqa: E731
        run = lambda: sparse_linear(half_TE, W_EE, None)  # noqa: E731
        return {"operator": run, "bound": run, "floor": floor, **dense}

    slot_T = torch.arange(T, device=device, dtype=torch.int32) % (SLOTS - 1) + 1
    channel_SM = torch.zeros(SLOTS, 1, device=device, dtype=torch.int32)
    row_SME, one_SM = full(1.0, SLOTS, 1, E), full(1.0, SLOTS, 1)
    knobs = (full(1e-3, T, 1), full(0.5, T, 1), full(math.inf, T), full(0.0, T))
    account = (full(0.0, T, 1), full(0.0, T), torch.zeros(T, dtype=torch.int32, device=device))
    scale_E, plane_2E = full(1.0, E).to(dtype), torch.linalg.qr(normal(E, 2)).Q.mT.contiguous()
    floors = {"turn": lambda: y_TE.add_((y_TE @ plane_2E.mT.to(dtype)) @ plane_2E.to(dtype), alpha=1e-3)}
    count_SM = torch.full((SLOTS, 1), E // 2 if kind == "count" else 0, device=device, dtype=torch.int32)
    bank: dict[str, tuple[Tensor, ...]] = {
        "mask": (0 * row_SME, 0 * row_SME, math.inf * -row_SME, math.inf * row_SME, channel_SM),
        "turn": (plane_2E.expand(SLOTS, 1, 2, E).contiguous(), 0 * one_SM, channel_SM, full(1.0, T, 1)),
        "sparse": (row_SME, 0.67 * one_SM, count_SM, torch.empty(SLOTS, 1, 0, E, device=device), channel_SM),
    }
    operator = {"mask": mask_, "turn": turn_}.get(kind, sparsify_)
    arguments = (y_TE, slot_T, *bank.get(kind, bank["sparse"]), *knobs, *account)
    bound = bind(operator, *arguments[1:])
    return {
        "operator": lambda: operator(*arguments),
        "bound": lambda: bound(y_TE, y_TE),
        "floor": floors.get(kind, lambda: y_TE.mul_(scale_E)),
        **dense,
    }


def main() -> None:
    """Measure every kind at every shape, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", help="TxE, separated by commas")
    given = parser.parse_args()
    device = given.device
    torch.set_num_threads(1)
    rows = []
    print(f"{'T':>4} {'E':>6} {'kind':>10} {'operator':>9} {'bound':>8} {'floor':>8} {'dense':>9}  b/floor  b/dense")
    with torch.inference_mode():
        for shape in (given.shapes or SHAPES[device]).split(","):
            T, E = map(int, shape.split("x"))
            for kind in KINDS:
                took = medians(candidates(kind, T, E, device), device)
                row = {
                    "tokens": T, "width": E, "kind": kind, "microseconds": took,
                    "bound_over_floor": round(took["bound"] / took["floor"], 2),
                    "bound_over_dense": round(took["bound"] / took["dense"], 3),
                }  # fmt: skip
                rows.append(row)
                print(
                    f"{T:4} {E:6} {kind:>10} {took['operator']:9} {took['bound']:8} {took['floor']:8}"
                    f" {took['dense']:9} {row['bound_over_floor']:8} {row['bound_over_dense']:8}",
                    flush=True,
                )
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": "bfloat16" if device == "cuda" else "float32",
        "repetitions": REPETITIONS,
        "rows": rows,
    }
    path = Path(__file__).parent / "results" / f"edits-{device}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
