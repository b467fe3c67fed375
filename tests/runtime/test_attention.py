"""Attention over rows equals a softmax written out, whatever the batch and whatever lies in other rows."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from steering.runtime.attention import Placement, RowAttention
from steering.runtime.cache import KVCache, KVShape
from steering.runtime.request import Request
from steering.runtime.scheduler import Batch, Sequence

ROWS, LENGTH, KV, GROUP, WIDTH = 8, 24, 2, 3, 8
CPU = torch.device("cpu")


def expected(
    query_HW: Tensor, keys: Tensor, values: Tensor, window: int | None, cap: float | None, scale: float
) -> Tensor:
    """(H, W): one query that sees all the keys and values (n, kv, W) given, in float64."""
    out = []
    for head, query in enumerate(query_HW.double()):
        k, v = (x[-window if window else 0 :, head // GROUP].double() for x in (keys, values))
        score = k @ query * scale
        score = cap * torch.tanh(score / cap) if cap else score
        out.append(score.softmax(0) @ v)
    return torch.stack(out)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize(
    "pieces",
    [
        [(0, 9, 1)],
        [(0, 9, 1), (1, 3, 1), (2, 0, 1)],
        [(0, 5, 1), (2, 7, 1), (3, 2, 1)],  # a gap: row 1 is attended and ignored
        [(1, 5, 1), (7, 7, 1)],  # sparse: rows are gathered
        [(3, 0, 6), (0, 4, 5)],
        [(0, 5, 1), (4, 2, 1), (1, 0, 3), (2, 6, 7)],
    ],
    ids=str,
)
def test_equals_the_formula(pieces: list[tuple[int, int, int]], window: int | None, cap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    cache = KVCache([KVShape((KV, WIDTH), (KV, WIDTH))], ROWS, LENGTH, torch.float32, CPU)
    for tensor in (cache.keys[0], cache.values[0]):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
        for row in set(range(ROWS)) - {row for row, _, _ in pieces}:
            tensor[row, 1:] = math.nan  # what a sequence that diverged leaves behind, but for the first position
    sequences = []
    for i, (row, start, length) in enumerate(pieces):
        one = Sequence(Request(str(i), tuple(range(start + length))))
        one.rows = (row,)
        sequences.append((one, start, length))
    batch = Batch.pack(sequences)
    at_T = torch.tensor([s.row * LENGTH + s.start + j for s in batch.segments for j in range(s.length)])
    query = torch.randn(1, KV * GROUP, batch.n_tokens, WIDTH, generator=generator)
    key, value = (torch.randn(1, KV, batch.n_tokens, WIDTH, generator=generator) for _ in range(2))
    attention = RowAttention(cache)
    attention.place = Placement.of(batch, at_T, CPU)
    out, _ = attention(
        SimpleNamespace(layer_idx=0),
        query,
        key,
        value,
        None,
        scaling=0.3,
        sliding_window=window,
        softcap=cap,  # type: ignore[arg-type]
    )
    for s in batch.segments:
        for j in range(s.length):
            end = s.start + j + 1
            keys, values = cache.keys[0][s.row, :end], cache.values[0][s.row, :end]
            wanted = expected(query[0, :, s.offset + j], keys, values, window, cap, 0.3)
            assert torch.allclose(out[0, s.offset + j].double(), wanted, atol=1e-5)
            assert torch.equal(keys[-1], key[0, :, s.offset + j])
