"""Keys and values of all running sequences: one row a sequence, one pair of tensors a layer.

    K_l, V_l  (rows, max_len, kv heads, head width)

A list per layer, never one stacked tensor (stacking made a step three times slower). Sequences own whole rows, so a
row in use costs nothing to find and nothing to free. Memory is set aside once, at start.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from steering.errors import SpecError

SHARE = 0.5
"""Share of the free memory that a cache of automatic length may take."""


@dataclass(frozen=True, slots=True)
class KVShape:
    """(kv heads, head width) of the keys and the values of one layer."""

    key: tuple[int, int]
    value: tuple[int, int]

    @property
    def numbers(self) -> int:
        """Numbers held per position."""
        return self.key[0] * self.key[1] + self.value[0] * self.value[1]


class KVCache:
    """Rows of keys and values on a device, zero at first."""

    def __init__(self, shapes: list[KVShape], rows: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows, self.length = rows, length
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for shape in shapes:
            self.keys.append(torch.zeros(rows, length, *shape.key, dtype=dtype, device=device))
            self.values.append(torch.zeros(rows, length, *shape.value, dtype=dtype, device=device))

    def write(self, layer: int, at_T: Tensor, key_THD: Tensor, value_THD: Tensor) -> None:
        """Store tokens at flat places `row · length + position`."""
        self.keys[layer].flatten(0, 1).index_copy_(0, at_T, key_THD)
        self.values[layer].flatten(0, 1).index_copy_(0, at_T, value_THD)

    def clear(self, row: int, length: int) -> None:
        """Zero the first positions of a row that its sequence leaves.

        Its control may have left NaN or Inf there, and attention weighs masked values with 0: 0 · NaN is NaN, in the
        batch of whoever holds the row next.
        """
        for tensor in (*self.keys, *self.values):
            tensor[row, :length].zero_()


def cache_bytes(shapes: list[KVShape], rows: int, length: int, dtype: torch.dtype) -> int:
    """Memory of a cache, in bytes."""
    return sum(shape.numbers for shape in shapes) * rows * length * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as lines:
            return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def cache_length(
    shapes: list[KVShape], rows: int, wanted: int | None, context: int, dtype: torch.dtype, free: int
) -> int:
    """Positions per row: `wanted`, or as many as the context and half of the free memory allow.

    Raises SpecError if `wanted` exceeds the context or does not fit, or if not even 16 positions fit.
    """
    if wanted is not None and not 1 <= wanted <= context:
        raise SpecError("max_len", expected=f"1 to {context}, the model's context", got=wanted)
    per_position = cache_bytes(shapes, rows, 1, dtype)
    length = wanted or min(context, int(free * SHARE) // per_position)
    if (length < min(16, context) and wanted is None) or per_position * length > free:
        raise SpecError(
            "max_batch",
            expected=f"keys and values that fit in {free / 2**20:.0f} MiB of free memory",
            got=f"{rows} rows x {length} positions = {per_position * max(length, 1) / 2**20:.0f} MiB",
            advice="lower max_batch or max_len",
        )
    return length
