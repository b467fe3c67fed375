"""What the operator costs, against the least it could and against the published form, in one run on this machine.

    python benchmarks/feedback.py [--device cpu]

Per (tokens T, width D, channels R, programs):

* `operator`  `kernels.feedback_` with knobs, limits, caps and budgets, one call for the batch
* `bound`     the same by `kernels.bind`, all arguments but the rows resolved before: what an engine's layer pays
* `floor`     y += (r − x·c) g in plain torch: two products and nothing else, one program for all tokens
* `dense`     y += (K @ ((β − v·x) v)): the published form of A-LQR (arXiv 2604.19018, Sec. 4), an n×n product a token

Prints medians in microseconds and the ratios of the bound call, and writes benchmarks/results/feedback-<device>.json.
All are timed in turn within each repetition, so that a busy machine disturbs them alike; on a CPU the clock is one
thread's CPU time, on a GPU it is the wall's, and each call is waited for.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kernels import bind, feedback_

SHAPES = [(1, 192, 1), (16, 192, 1), (16, 192, 4), (512, 192, 1), (1, 2304, 1), (16, 2304, 1), (16, 4096, 1)]
REPETITIONS = 100
SLOTS = 32


def candidates(T: int, D: int, R: int, distinct: bool, device: str) -> dict[str, Callable[[], object]]:
    """The contenders on the same random rows. `distinct`: a different program for each token, up to 31."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device) / math.sqrt(shape[-1])

    def full(value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, device=device)

    y_TE, x_TD = normal(T, D), normal(T, D)
    probe_SRD, gain_SRE = normal(SLOTS, R, D), normal(SLOTS, R, D)
    slot_T = (
        torch.arange(T, device=device, dtype=torch.int32) % (SLOTS - 1) + 1
        if distinct
        else torch.full_like(torch.empty(T, dtype=torch.int32, device=device), 1)
    )
    arguments = (
        y_TE, x_TD, slot_T, probe_SRD, gain_SRE, gain_SRE.norm(dim=-1), full(math.inf, SLOTS, R),
        full(-math.inf, SLOTS, R), full(-math.inf, SLOTS, R), full(0.0, SLOTS, R),
        full(1.0, T, R), full(1e-3, T, R), full(0.5, T, R), full(math.inf, T), full(0.0, T),
        full(0.0, T, R), full(0.0, T), torch.zeros(T, dtype=torch.int32, device=device),
    )  # fmt: skip
    C_RD, G_RE, K_ED = probe_SRD[1], 1e-3 * gain_SRE[1], 1e-3 * normal(D, D)

    def floor() -> Tensor:
        return y_TE.add_((1.0 - x_TD @ C_RD.mT) @ G_RE)

    def dense() -> None:
        for v_D in C_RD:
            y_TE.add_(((1.0 - x_TD @ v_D)[:, None] * v_D) @ K_ED.mT)

    bound = bind(feedback_, *arguments[2:])
    return {
        "operator": lambda: feedback_(*arguments),
        "bound": lambda: bound(y_TE, x_TD),
        "floor": floor,
        "dense": dense,
    }


def medians(runs: dict[str, Callable[[], object]], device: str) -> dict[str, float]:
    """Median microseconds a call of each, interleaved."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    clock = time.perf_counter if device == "cuda" else time.thread_time
    seen: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(REPETITIONS + 10):
        for name, run in runs.items():
            wait()
            start = clock()
            run()
            wait()
            if repetition >= 10:
                seen[name].append(1e6 * (clock() - start))
    return {name: round(statistics.median(times), 1) for name, times in seen.items()}


def main() -> None:
    """Measure every shape, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    torch.set_num_threads(1)
    rows = []
    print("   T     D  R programs  operator    bound    floor     dense  b/floor  b/dense")
    with torch.inference_mode():
        for T, D, R in SHAPES:
            for distinct in (False, True) if T > 1 else (False,):
                took = medians(candidates(T, D, R, distinct, device), device)
                row = {
                    "tokens": T, "width": D, "channels": R, "programs": min(T, SLOTS - 1) if distinct else 1,
                    "microseconds": took,
                    "bound_over_floor": round(took["bound"] / took["floor"], 2),
                    "bound_over_dense": round(took["bound"] / took["dense"], 3),
                }  # fmt: skip
                rows.append(row)
                print(
                    f"{T:4} {D:5} {R:2} {row['programs']:8} {took['operator']:9} {took['bound']:8} {took['floor']:8}"
                    f" {took['dense']:9} {row['bound_over_floor']:8} {row['bound_over_dense']:8}",
                    flush=True,
                )
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    result = {
        "device": name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "repetitions": REPETITIONS,
        "rows": rows,
    }
    path = Path(__file__).parent / "results" / f"feedback-{device}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
