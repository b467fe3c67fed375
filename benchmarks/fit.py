"""Gains of one concept, dense against matrix-free: time and products, for the same cost and the same answer.

    python benchmarks/fit.py [--device cpu|cuda] [--prompts N] [--repeats N]

The network is synthetic, x + U tanh(V x) with H = 4 D, a residual block near the identity whose rows W A cost what an
MLP's do. Dense: every Jacobian by D products a prompt and layer, then the float64 recursion. Matrix-free: L (L + 1) / 2
products a prompt. Both in turn in one process, so a busy machine slows both; the ratio is what to read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steering.control import Weights, output_regulate, regulate_along

N_LAYERS = 8
WEIGHTS = Weights(1.0, 1.0, 1.0)


class Network:
    """L random residual blocks and the states of N prompts before each; counts the rows it pulls back."""

    def __init__(self, width: int, n_prompts: int, device: str) -> None:
        generator = torch.Generator().manual_seed(width)
        self.V_LHD = torch.randn(N_LAYERS, 4 * width, width, generator=generator).div_(width**0.5).to(device)
        self.U_LDH = torch.randn(N_LAYERS, width, 4 * width, generator=generator).div_(5 * width**0.5).to(device)
        x_ND = torch.randn(n_prompts, width, generator=generator).to(device)
        self.slopes_LNH = torch.empty(N_LAYERS, n_prompts, 4 * width, device=device)
        for layer in range(N_LAYERS):
            h_NH = torch.tanh(x_ND @ self.V_LHD[layer].T)
            self.slopes_LNH[layer] = 1 - h_NH.square()
            x_ND = x_ND + h_NH @ self.U_LDH[layer].T
        self.products = 0

    def vjp(self, layer: int, W_KD: Tensor) -> Tensor:
        """Mean over prompts of W A_layer, one prompt at a time, as a network must."""
        W_KD = W_KD.float()
        pulled_KD = torch.zeros_like(W_KD)
        for slope_H in self.slopes_LNH[layer]:
            pulled_KD += W_KD + ((W_KD @ self.U_LDH[layer]) * slope_H) @ self.V_LHD[layer]
            self.products += W_KD.shape[0]
        return pulled_KD / self.slopes_LNH.shape[1]


def timed(fit: Callable[[], Tensor], network: Network) -> tuple[float, int, Tensor]:
    """Seconds, products and gains of one fit."""
    network.products = 0
    start = time.perf_counter()
    w_LD = fit().cpu()  # the copy waits for the device
    return time.perf_counter() - start, network.products, w_LD


def compare(width: int, n_prompts: int, repeats: int, device: str) -> dict[str, Any]:
    """One row of the table."""
    network = Network(width, n_prompts, device)
    generator = torch.Generator().manual_seed(1)
    v_LD = torch.nn.functional.normalize(torch.randn(N_LAYERS + 1, width, generator=generator), dim=1).to(device)
    eye_DD = torch.eye(width, device=device)

    def dense() -> Tensor:
        jacobians = (network.vjp(layer, eye_DD) for layer in reversed(range(N_LAYERS)))
        return regulate_along(jacobians, v_LD, WEIGHTS, "output")

    def matrix_free() -> Tensor:
        return output_regulate(network.vjp, v_LD, WEIGHTS, range(N_LAYERS)).w_LD

    timed(matrix_free, network)
    runs = [(timed(dense, network), timed(matrix_free, network)) for _ in range(repeats)]
    (_, dense_products, dense_w), (_, free_products, free_w) = runs[-1]
    return {
        "layers": N_LAYERS,
        "width": width,
        "prompts": n_prompts,
        "dense_seconds": statistics.median(dense_run[0] for dense_run, _ in runs),
        "matrix_free_seconds": statistics.median(free_run[0] for _, free_run in runs),
        "ratio": statistics.median(dense_run[0] / free_run[0] for dense_run, free_run in runs),
        "dense_products_per_prompt": dense_products // n_prompts,
        "matrix_free_products_per_prompt": free_products // n_prompts,
        "relative_difference": float((free_w - dense_w).abs().max() / dense_w.abs().max()),
    }


def main() -> None:
    """Print the table and write `benchmarks/results/fit-<device>.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 768])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [compare(width, arguments.prompts, arguments.repeats, arguments.device) for width in arguments.widths]
    for row in rows:
        print(
            f"L={row['layers']} D={row['width']:5d}: dense {row['dense_seconds']:.3f} s, "
            f"{row['dense_products_per_prompt']} products a prompt; matrix-free {row['matrix_free_seconds']:.4f} s, "
            f"{row['matrix_free_products_per_prompt']}; ratio {row['ratio']:.0f}, "
            f"relative difference {row['relative_difference']:.1e}"
        )
    device = arguments.device.partition(":")[0]
    path = Path(__file__).parent / "results" / f"fit-{device}.json"
    path.parent.mkdir(exist_ok=True)
    record = {"device": device, "threads": 1, "torch": torch.__version__, "repeats": arguments.repeats, "rows": rows}
    path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
