"""Inputs for attention over blocks, and the loop over rows, heads and positions in float64 that it must equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.tolerances import KERNELS

SHAPES = [
    # N, H, K, W, U, P, lengths, softcap, window
    (1, 1, 1, 16, 16, 16, (1,), 0.0, 0),
    (5, 3, 3, 32, 32, 16, (0, 1, 16, 17, 80), 0.0, 0),
    (3, 6, 2, 24, 40, 16, (64, 33, 7), 5.0, 0),
    (4, 8, 2, 96, 64, 8, (40, 3, 24, 9), 0.0, 9),
    (2, 4, 1, 256, 80, 5, (19, 13), 30.0, 16),
]
LONG = (3, 4, 2, 32, 16, 16, (600, 257, 0), 0.0, 0)
"""More keys than one stretch of a GPU's launch holds."""


def case(shape: tuple[Any, ...], *, dtype: torch.dtype = torch.float32, spare: int = 2) -> dict[str, Any]:
    """The operator's arguments: blocks in random order, the unused places of the pool NaN, `spare` blocks too many."""
    N, H, K, W, U, P, lengths, softcap, window = shape
    generator = torch.Generator().manual_seed(N * 131 + H * 17 + W)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    M = max(1, -(-max(lengths) // P)) + 1
    order = torch.randperm(N * M + spare, generator=generator)[: N * M].view(N, M)
    key_BPKW = torch.full((N * M + spare, P, K, W), torch.nan, dtype=torch.float64)
    value_BPKU = torch.full((N * M + spare, P, K, U), torch.nan, dtype=torch.float64)
    for n, length in enumerate(lengths):
        for i in range(max(0, length - window) if window else 0, length):
            key_BPKW[order[n, i // P], i % P] = normal(K, W)
            value_BPKU[order[n, i // P], i % P] = normal(K, U)
    return {
        "query_NHW": normal(N, H, W).to(dtype),
        "key_BPKW": key_BPKW.to(dtype),
        "value_BPKU": value_BPKU.to(dtype),
        "table_NM": order.int(),
        "length_N": torch.tensor(lengths, dtype=torch.int32),
        "scale": 1.3 * W**-0.5,
        "softcap": softcap,
        "window": window,
    }


def row(args: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The same for some of the rows."""
    own = {name: args[name][start:stop] for name in ("query_NHW", "table_NM", "length_N")}
    return {**args, **own}


def assert_agrees(out_NHU: Tensor, args: dict[str, Any], stored: str = "stored") -> None:
    """Equality with the sum over positions. An error of a score is relative to its terms, and moves every weight."""
    query_NHW, key_BPKW, value_BPKU = (args[name].double() for name in ("query_NHW", "key_BPKW", "value_BPKU"))
    P, K = key_BPKW.shape[1:3]
    assert out_NHU.dtype == args["query_NHW"].dtype
    unit = KERNELS["float64" if out_NHU.dtype == torch.float64 else "float32"]
    rounding = KERNELS[stored][str(out_NHU.dtype).removeprefix("torch.")]
    for n, length in enumerate(args["length_N"].tolist()):
        first = max(0, length - args["window"]) if args["window"] else 0
        places = [(int(args["table_NM"][n, i // P]), i % P) for i in range(first, length)]
        for h in range(query_NHW.shape[1]):
            if not places:
                assert not out_NHU[n, h].any()
                continue
            k = h // (query_NHW.shape[1] // K)
            key_LW = torch.stack([key_BPKW[block, place, k] for block, place in places])
            value_LU = torch.stack([value_BPKU[block, place, k] for block, place in places])
            score_L = args["scale"] * key_LW @ query_NHW[n, h]
            if args["softcap"]:
                score_L = args["softcap"] * torch.tanh(score_L / args["softcap"])
            weight_L = torch.exp(score_L - score_L.max())
            weight_L /= weight_L.sum()
            want_U = weight_L @ value_LU
            terms = 1 + args["scale"] * (key_LW.abs() @ query_NHW[n, h].abs()).max()
            bound_U = rounding * want_U.abs() + 2 * unit * terms * (weight_L @ value_LU.abs())
            assert ((out_NHU[n, h].double() - want_U).abs() <= bound_U).all(), (n, h)
