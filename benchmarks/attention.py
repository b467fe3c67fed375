"""What attention over blocks costs, against rows that lie in one piece and against gathering the blocks first.

    python -m benchmarks.attention [--device cpu] [--shapes 16x256x6x6x32]

Per (rows N, most keys L, query heads H, kv heads K, head width W) and dtype, rows of ragged lengths from L/4 to L,
their blocks of 16 in random order:

* `operator`  `kernels.paged_attention`, one call for the batch
* `rows`      torch's attention over rows that are in one piece already, padded to L and masked
* `gather`    the same after the blocks have been copied together, which is what a pool costs without the operator

Prints medians in microseconds, the two ratios and the keys and values that the operator reads a second, and writes
benchmarks/results/attention-<device>.json. The three are timed in turn within each repetition, as in
`benchmarks.feedback`, and must agree.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.feedback import REPETITIONS, medians
from kernels import paged_attention

SHAPES = {
    "cpu": "1x64x6x6x32,16x64x6x6x32,1x256x6x6x32,16x256x6x6x32,16x256x6x2x32,16x512x32x8x128",
    "cuda": "1x1024x32x8x128,1x8192x32x8x128,16x2048x32x8x128,64x2048x32x8x128,64x2048x32x32x128",
}
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
BLOCK = 16


def candidates(
    N: int, L: int, H: int, K: int, W: int, dtype: torch.dtype, device: str
) -> tuple[dict[str, Callable[[], Tensor]], int]:
    """The three contenders on the same random keys, and how many bytes of them are in range."""
    M = -(-L // BLOCK)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    query_NHW, key_BPKW, value_BPKW = (normal(*n) for n in ((N, H, W), *[(N * M, BLOCK, K, W)] * 2))
    table_NM = torch.randperm(N * M, generator=generator, device=device).view(N, M).int()
    length_N = torch.linspace(L // 4, L, N, device=device).int() if N > 1 else torch.tensor([L], device=device).int()
    at_NM, scale = table_NM.long(), W**-0.5
    beyond = torch.arange(M * BLOCK, device=device) >= length_N[:, None, None, None]
    mask = torch.zeros(beyond.shape, dtype=dtype, device=device).masked_fill_(beyond, float("-inf"))
    rows = [pool[at_NM].flatten(1, 2) for pool in (key_BPKW, value_BPKW)]

    def attend(key_NLKW: Tensor, value_NLKW: Tensor) -> Tensor:
        q_NKGW = query_NHW.view(N, K, H // K, W)
        keys, values = key_NLKW.transpose(1, 2), value_NLKW.transpose(1, 2)
        return scaled_dot_product_attention(q_NKGW, keys, values, attn_mask=mask, scale=scale).flatten(1, 2)

    runs = {
        "operator": lambda: paged_attention(query_NHW, key_BPKW, value_BPKW, table_NM, length_N, scale),
        "rows": lambda: attend(*rows),
        "gather": lambda: attend(key_BPKW[at_NM].flatten(1, 2), value_BPKW[at_NM].flatten(1, 2)),
    }
    first, *others = (run() for run in runs.values())
    for other in others:
        torch.testing.assert_close(first, other, rtol=2e-2, atol=2e-2)
    return runs, int(length_N.sum()) * K * 2 * W * dtype.itemsize


def main() -> None:
    """Measure every shape, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", help="NxLxHxKxW, separated by commas")
    given = parser.parse_args()
    device = given.device
    torch.set_num_threads(1)
    rows = []
    print(
        f"{'N x L x H x K x W':>20} {'dtype':>9} {'operator':>9} {'rows':>9} {'gather':>9}  op/rows  op/gather   GB/s"
    )
    with torch.inference_mode():
        for shape in (given.shapes or SHAPES[device]).split(","):
            N, L, H, K, W = map(int, shape.split("x"))
            for dtype in DTYPES[device]:
                runs, n_bytes = candidates(N, L, H, K, W, dtype, device)
                took = medians(runs, device)
                row = {
                    "rows": N, "keys": L, "heads": H, "kv_heads": K, "width": W,
                    "dtype": str(dtype).removeprefix("torch."), "microseconds": took,
                    "operator_over_rows": round(took["operator"] / took["rows"], 2),
                    "operator_over_gather": round(took["operator"] / took["gather"], 2),
                    "gigabytes_per_second": round(n_bytes / took["operator"] / 1e3, 2),
                }  # fmt: skip
                rows.append(row)
                print(
                    f"{shape:>20} {row['dtype']:>9} {took['operator']:9} {took['rows']:9} {took['gather']:9}"
                    f" {row['operator_over_rows']:8} {row['operator_over_gather']:10} {row['gigabytes_per_second']:6}",
                    flush=True,
                )
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "repetitions": REPETITIONS,
        "rows": rows,
    }
    path = Path(__file__).parent / "results" / f"attention-{device}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
