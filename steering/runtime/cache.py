"""Keys and values of all running sequences, and of prefixes that may come again: a pool of blocks, a pair a layer.

    K_l, V_l  (blocks + 1, BLOCK, kv heads, head width)

A list per layer, never one stacked tensor (stacking made a step three times slower). Memory is set aside once, at
start. Who holds which block says `steering.runtime.blocks`; block 0 is nobody's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steering.errors import SpecError

SHARE = 0.5
"""Share of the free memory that a pool of automatic size may take."""
BLOCK = 16
"""Positions of a block: the grain in which prefixes are shared."""


@dataclass(frozen=True, slots=True)
class KVShape:
    """(kv heads, head width) of the keys and the values of one layer."""

    key: tuple[int, int]
    value: tuple[int, int]

    @property
    def numbers(self) -> int:
        """Numbers held per position."""
        return self.key[0] * self.key[1] + self.value[0] * self.value[1]


class KVPool:
    """Blocks of keys and values on a device, zero at first."""

    def __init__(self, shapes: list[KVShape], n_blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        self.n_blocks = n_blocks
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for shape in shapes:
            self.keys.append(torch.zeros(n_blocks + 1, BLOCK, *shape.key, dtype=dtype, device=device))
            self.values.append(torch.zeros(n_blocks + 1, BLOCK, *shape.value, dtype=dtype, device=device))

    def write(self, layer: int, at_T: Tensor, key_THD: Tensor, value_THD: Tensor) -> None:
        """Store tokens at flat places `block · BLOCK + position within it`."""
        self.keys[layer].flatten(0, 1).index_copy_(0, at_T, key_THD)
        self.values[layer].flatten(0, 1).index_copy_(0, at_T, value_THD)

    def erase(self, layer: int, at_T: Tensor) -> None:
        """Store zeros at flat places."""
        self.keys[layer].flatten(0, 1).index_fill_(0, at_T, 0)
        self.values[layer].flatten(0, 1).index_fill_(0, at_T, 0)

    def read(self, layer: int, block_M: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """A copy of the first `length` keys and values of a table, each (kv heads, length, head width)."""
        key, value = (each[layer][block_M].flatten(0, 1)[:length].transpose(0, 1) for each in (self.keys, self.values))
        return key, value

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero blocks whose sequence was spoilt.

        Its control may have left NaN or Inf there. Whoever holds the block next writes before it reads, but for layers
        that a program leaves out (`steering.runtime.shortcuts`): what is thrown away there must be finite, as 0 · NaN
        is NaN.
        """
        for tensor in (*self.keys, *self.values):
            tensor[list(blocks)] = 0


def position_bytes(shapes: Sequence[KVShape], dtype: torch.dtype) -> int:
    """Memory of one position in all layers, in bytes."""
    return sum(shape.numbers for shape in shapes) * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as lines:
            return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def pool_size(
    rows: int, wanted: int | None, longest: int | None, context: int, per_position: int, free: int
) -> tuple[int, int]:
    """(blocks of the pool, positions that one sequence may have).

    wanted: positions of the pool (`kv_tokens`); None for as many as `rows` sequences of full length need, as far as
    half of the free memory allows. longest: positions of a sequence (`max_model_len`); None for the model's context, as
    far as an automatic pool allows.

    Raises SpecError, which names the setting, if a sequence may not be so long or the pool does not fit in memory or
    holds not even one sequence of full length.
    """
    if longest is not None and not 1 <= longest <= context:
        raise SpecError("max_model_len", expected=f"1 to {context}, the model's context", got=longest)
    one = -(-(longest or context) // BLOCK) * BLOCK
    affordable = int(free * SHARE) // per_position // BLOCK * BLOCK
    positions = -(-wanted // BLOCK) * BLOCK if wanted else max(min(rows * one, affordable), one if longest else 0)
    if positions < min(BLOCK, one) or per_position * positions > free:
        setting, got = next(
            (name, value)
            for name, value in (("kv_tokens", wanted), ("max_model_len", longest), ("max_batch", rows))
            if value
        )
        room = f"keys and values that fit in {free / 2**20:.0f} MiB of memory, at {per_position} bytes a token"
        raise SpecError(setting, expected=room, got=got, advice="lower it")
    if wanted and positions < one:
        full = f"{longest}, max_model_len" if longest else f"{context}, the model's context"
        raise SpecError("kv_tokens", expected=f"at least {full}", got=wanted, advice="raise it, or lower max_model_len")
    return positions // BLOCK, longest or min(context, positions)
