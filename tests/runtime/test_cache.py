"""Memory is computed before it is taken."""

from __future__ import annotations

import pytest
import torch

from steering.errors import SpecError
from steering.runtime.cache import KVCache, KVShape, cache_bytes, cache_length

SHAPES = [KVShape((2, 8), (2, 4))] * 3
PER_POSITION = 3 * (16 + 8) * 4 * 5  # layers · numbers · float32 · rows


def length(wanted: int | None, free: int, context: int = 100) -> int:
    return cache_length(SHAPES, 5, wanted, context, torch.float32, free)


def test_the_bytes_are_those_of_the_tensors() -> None:
    cache = KVCache(SHAPES, 5, 7, torch.float32, torch.device("cpu"))
    tensors = [*cache.keys, *cache.values]
    assert (
        sum(t.numel() * t.element_size() for t in tensors)
        == cache_bytes(SHAPES, 5, 7, torch.float32)
        == 7 * PER_POSITION
    )


def test_an_automatic_length_takes_half_of_what_is_free() -> None:
    assert length(None, 10**9) == 100
    assert length(None, 80 * PER_POSITION) == 40
    assert length(60, 60 * PER_POSITION) == 60
    assert length(None, 10**9, context=8) == 8


@pytest.mark.parametrize(
    ("wanted", "free", "field"),
    [(101, 10**9, "max_len"), (0, 10**9, "max_len"), (60, 59 * PER_POSITION, "max_batch"), (None, 1000, "max_batch")],
)
def test_what_does_not_fit_is_refused_by_name(wanted: int | None, free: int, field: str) -> None:
    with pytest.raises(SpecError) as error:
        length(wanted, free)
    assert error.value.param == field


def test_a_write_lands_in_its_row_and_clearing_leaves_the_others() -> None:
    cache = KVCache(SHAPES, 3, 4, torch.float32, torch.device("cpu"))
    key, value = torch.randn(2, 2, 8), torch.randn(2, 2, 4)
    cache.write(1, torch.tensor([1 * 4 + 3, 2 * 4 + 0]), key, value)
    assert torch.equal(cache.keys[1][1, 3], key[0])
    assert torch.equal(cache.values[1][2, 0], value[1])
    cache.clear(1, 4)
    assert not cache.keys[1][1].any()
    assert cache.values[1][2, 0].any()
    assert not cache.keys[0].any()
