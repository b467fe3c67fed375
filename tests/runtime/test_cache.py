"""Memory is computed before it is taken."""

from __future__ import annotations

import pytest
import torch

from steering.errors import SpecError
from steering.runtime.cache import BLOCK, KVPool, KVShape, pool_size, position_bytes

SHAPES = [KVShape((2, 8), (2, 4))] * 3
PER_POSITION = 3 * (16 + 8) * 4  # layers · numbers · float32
CPU = torch.device("cpu")


def size(
    wanted: int | None, free: int, *, longest: int | None = None, context: int = 100, rows: int = 5
) -> tuple[int, int]:
    return pool_size(rows, wanted, longest, context, PER_POSITION, free * PER_POSITION)


def test_the_bytes_are_those_of_the_tensors() -> None:
    pool = KVPool(SHAPES, 7, torch.float32, CPU)
    numbers = sum(t.numel() for t in (*pool.keys, *pool.values))
    assert position_bytes(SHAPES, torch.float32) == PER_POSITION
    assert numbers * 4 == (7 + 1) * BLOCK * PER_POSITION


def test_an_automatic_pool_takes_half_of_what_is_free() -> None:
    assert size(None, 10**6) == (5 * 7, 100)  # five sequences of 100 positions, 7 blocks each
    assert size(None, 640) == (20, 100)
    assert size(None, 96) == (3, 48)
    assert size(None, 10**6, context=8) == (5, 8)
    assert size(None, 10**6, longest=20) == (10, 20)
    assert size(None, 64, longest=60) == (4, 60)  # one sequence of the length that was asked for may take all
    assert size(100, 10**6) == (7, 100)


@pytest.mark.parametrize(
    ("wanted", "longest", "free", "field"),
    [
        (None, 101, 10**6, "max_model_len"),
        (None, 0, 10**6, "max_model_len"),
        (None, 60, 59, "max_model_len"),
        (None, None, 20, "max_batch"),
        (2000, None, 1000, "kv_tokens"),
        (32, 60, 10**6, "kv_tokens"),
        (40, None, 10**6, "kv_tokens"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(wanted: int | None, longest: int | None, free: int, field: str) -> None:
    with pytest.raises(SpecError) as error:
        size(wanted, free, longest=longest)
    assert error.value.param == field


def test_a_write_lands_in_its_block_is_read_back_and_clearing_leaves_the_others() -> None:
    pool = KVPool(SHAPES, 3, torch.float32, CPU)
    key, value = torch.randn(3, 2, 8), torch.randn(3, 2, 4)
    pool.write(1, torch.tensor([1 * BLOCK + 3, 2 * BLOCK, 3 * BLOCK - 1]), key, value)
    keys, values = pool.read(1, torch.tensor([2, 1]), BLOCK + 4)
    assert torch.equal(keys[:, 0], key[1])
    assert torch.equal(keys[:, BLOCK + 3], key[0])
    assert torch.equal(values[:, BLOCK - 1], value[2])
    assert keys.shape == (2, BLOCK + 4, 8)
    pool.clear([1])
    assert not pool.keys[1][1].any()
    assert pool.values[1][2, 0].any()
    assert not pool.keys[0].any()
