"""Attention over blocks equals a softmax written out, whatever the batch and whatever lies in other blocks."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from steering.runtime.attention import PagedAttention
from steering.runtime.cache import BLOCK, KVPool, KVShape
from steering.runtime.placement import Laid, Placement
from steering.runtime.request import Request
from steering.runtime.scheduler import Batch, Sequence

BLOCKS, KV, GROUP, WIDTH = 12, 2, 3, 8
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
        [(9, 1)],
        [(9, 1), (3, 1), (0, 1)],
        [(40, 1), (15, 1), (16, 1)],
        [(0, 6), (0, 17)],
        [(5, 1), (16, 3), (0, 3), (30, 7), (33, 1)],
    ],
    ids=str,
)
def test_equals_the_formula(pieces: list[tuple[int, int]], window: int | None, cap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    pool = KVPool([KVShape((KV, WIDTH), (KV, WIDTH))], BLOCKS, torch.float32, CPU)
    for tensor in (pool.keys[0], pool.values[0]):
        tensor[1:] = math.nan  # what a sequence that diverged leaves behind
    free = torch.randperm(BLOCKS, generator=generator).tolist()
    sequences = []
    for i, (start, length) in enumerate(pieces):
        one = Sequence(Request(str(i), tuple(range(start + length))))
        one.tables[0].extend(free.pop() + 1 for _ in range(-(-(start + length) // BLOCK)))
        for at in range(start):
            for tensor in (pool.keys[0], pool.values[0]):
                tensor[one.tables[0][at // BLOCK], at % BLOCK] = torch.randn(KV, WIDTH, generator=generator)
        sequences.append((one, start, length))
    batch = Batch.pack(sequences, BLOCK)
    query = torch.randn(1, KV * GROUP, batch.n_tokens, WIDTH, generator=generator)
    key, value = (torch.randn(1, KV, batch.n_tokens, WIDTH, generator=generator) for _ in range(2))
    attention = PagedAttention(pool)
    attention.place = Placement.of(Laid.of(batch, BLOCK), CPU)
    assert attention.place.ids_T.tolist() == [s.start + j for s in batch.segments for j in range(s.length)]
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
        keys, values = pool.read(0, torch.tensor(s.table), s.start + s.length)
        for j in range(s.length):
            end = s.start + j + 1
            seen = keys[:, :end].transpose(0, 1), values[:, :end].transpose(0, 1)
            wanted = expected(query[0, :, s.offset + j], *seen, window, cap, 0.3)
            assert torch.allclose(out[0, s.offset + j].double(), wanted, atol=1e-5)
            assert torch.equal(keys[:, end - 1], key[0, :, s.offset + j])
