"""What a norm costs, with and without the law before it, against the operations it replaces, on this machine.

    python -m benchmarks.norm [--device cpu]

Per (tokens T, width E, dtype):

* `module`  LlamaRMSNorm as transformers writes it: six operations
* `torch`   torch's own `rms_norm`
* `norm`    `kernels.bind_norm`, what the engine runs in its place
* `apart`   the law of `kernels.feedback_`, bound as the engine binds it, then `norm`
* `fused`   on a GPU, where the engine runs it: `kernels.norm_` with that law in one launch

What a law costs is `fused` (on a CPU `apart`) against `norm`, not against `module`: an unsteered step runs `norm` too.
Prints medians in microseconds, timed in turn within each repetition as in `benchmarks.feedback`, and writes
benchmarks/results/norm-<device>.json.
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
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from benchmarks.feedback import medians
from kernels import bind, bind_norm, feedback_, norm_

SHAPES = [(1, 192), (16, 192), (64, 192), (512, 192), (16, 2304), (16, 4096), (64, 4096)]
DTYPES = (torch.float32, torch.bfloat16)
SLOTS = 32
EPS = 1e-6


def contenders(T: int, E: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[], object]]:
    """The contenders on the same random rows; a law of one channel, a program of its own for each token, up to 31."""

    def full(value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, device=device)

    module = LlamaRMSNorm(E, eps=EPS).to(device, dtype)
    weight_E = module.weight.detach()
    y_TE = torch.randn(T, E, device=device, dtype=dtype)
    slot_T = torch.arange(T, device=device, dtype=torch.int32) % (SLOTS - 1) + 1
    bank_SRE = torch.randn(2, SLOTS, 1, E, device=device) / math.sqrt(E)
    law = (
        slot_T, bank_SRE[0], bank_SRE[1], bank_SRE[1].norm(dim=-1), full(math.inf, SLOTS, 1),
        full(-math.inf, SLOTS, 1), full(-math.inf, SLOTS, 1), full(0.0, SLOTS, 1),
        full(1.0, T, 1), full(1e-3, T, 1), full(0.5, T, 1), full(math.inf, T), full(0.0, T),
        full(0.0, T, 1), full(0.0, T), torch.zeros(T, dtype=torch.int32, device=device),
    )  # fmt: skip
    steer, norm = bind(feedback_, *law), bind_norm(weight_E, None, "rms", EPS)
    y_1TE = y_TE[None]

    def apart() -> Tensor:
        steer(y_TE, y_TE)
        return norm(y_1TE)

    found: dict[str, Callable[[], object]] = {
        "module": lambda: module(y_1TE),
        "torch": lambda: functional.rms_norm(y_1TE, (E,), weight_E, EPS),
        "norm": lambda: norm(y_1TE),
        "apart": apart,
    }
    if device == "cuda":
        found["fused"] = lambda: norm_(y_TE, weight_E, None, "rms", EPS, law=(y_TE, *law))
    return found


def main() -> None:
    """Measure every shape, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    torch.set_num_threads(1)
    rows = []
    steered = "fused" if device == "cuda" else "apart"
    with torch.inference_mode():
        for dtype in DTYPES:
            for T, E in SHAPES:
                took = medians(contenders(T, E, dtype, device), device)
                row = {
                    "tokens": T, "width": E, "dtype": str(dtype).removeprefix("torch."), "microseconds": took,
                    "norm_over_module": round(took["norm"] / took["module"], 3),
                    "steered_over_norm": round(took[steered] / took["norm"], 3),
                }  # fmt: skip
                rows.append(row)
                times = "".join(f"{name:>8} {value:<7}" for name, value in took.items())
                ratios = f"norm/module {row['norm_over_module']:<6} {steered}/norm {row['steered_over_norm']}"
                print(f"{T:4} {E:5} {row['dtype']:>9}{times} {ratios}", flush=True)
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    result = {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
    path = Path(__file__).parent / "results" / f"norm-{device}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
