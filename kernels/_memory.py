"""How a compiled function reaches the tensors of a batch: by address, so that one compilation serves every layout.

Given arrays, numba compiles a function anew for each mixture of layouts and unpacks every array at every call, which
costs more than the work of a small batch. Here tensors that stay the same for many calls become one table of int64,
a row each: the address, then the strides of up to three leading dimensions in elements, 0 where there is none. The
rows that differ by call come as address, stride and kind. What a table points to must be kept alive beside it.
Only for modules that are imported where numba is; legend as in `kernels.feedback`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray
from numba.extending import intrinsic
from torch import Tensor

from kernels._compile import BITS, jit, narrow, widen

assert jit is not None, "imported only where numba is"

KINDS: dict[torch.dtype, int] = {dtype: kind for kind, dtype in enumerate(BITS)}
"""How a compiled function is told the dtype of rows: 0 float32, 1 bfloat16, 2 float16."""

LEADING = 3
"""Leading dimensions that a table has strides for."""

FIRST = np.int64(0)
"""The place along a dimension that is not there. Of numpy, as are the rows of a table: a plain constant is a type of
its own to numba, and every function would be compiled once for each of them."""


def table(tensors: Sequence[Tensor]) -> np.ndarray:
    """The table of some tensors on a CPU."""
    flat: list[int] = []
    for each in tensors:
        strides = each.stride()[:LEADING]
        flat += (each.data_ptr(), *strides, *(0,) * (LEADING - len(strides)))
    return np.array(flat, dtype=np.int64).reshape(len(tensors), 1 + LEADING)


@intrinsic
def pointer(_: Any, address: Any, like: Any) -> Any:
    """A pointer to elements of the type of `like`."""

    def generate(context: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(like).as_pointer())

    return numba.types.CPointer(like)(numba.int64, like), generate


@intrinsic
def _load(_: Any, address: Any, like: Any) -> Any:
    """The element at an address, of the type of `like`."""

    def generate(context: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.load(builder.inttoptr(arguments[0], context.get_value_type(like).as_pointer()))

    return like(numba.int64, like), generate


@intrinsic
def _store(_: Any, address: Any, value: Any) -> Any:
    """Write an element of four bytes to an address."""

    def generate(context: Any, builder: Any, __: Any, arguments: Any) -> Any:
        builder.store(arguments[1], builder.inttoptr(arguments[0], ir.IntType(32).as_pointer()))

    def generate_float(context: Any, builder: Any, __: Any, arguments: Any) -> Any:
        builder.store(arguments[1], builder.inttoptr(arguments[0], ir.FloatType().as_pointer()))

    return numba.void(numba.int64, value), generate if value == numba.int32 else generate_float


@jit
def number(table: Any, which: Any, i: Any, j: Any) -> Any:
    """Element (i, j) of a float32 tensor; j = FIRST where it has one dimension."""
    return _load(table[which, 0] + 4 * (i * table[which, 1] + j * table[which, 2]), np.float32(0))


@jit
def integer(table: Any, which: Any, i: Any, j: Any) -> Any:
    """Element (i, j) of an int32 tensor; j = FIRST where it has one dimension."""
    return np.int64(_load(table[which, 0] + 4 * (i * table[which, 1] + j * table[which, 2]), np.int32(0)))


@jit
def put(table: Any, which: Any, i: Any, j: Any, value: Any) -> None:
    """Write element (i, j) of a float32 or int32 tensor."""
    _store(table[which, 0] + 4 * (i * table[which, 1] + j * table[which, 2]), value)


@jit
def row(table: Any, which: Any, i: Any, j: Any, k: Any, width: Any) -> Any:
    """Row (i, j, k) of a float32 tensor whose last dimension is contiguous."""
    offset = i * table[which, 1] + j * table[which, 2] + k * table[which, 3]
    return carray(pointer(table[which, 0] + 4 * offset, np.float32(0)), (width,))


@jit
def read(address: Any, kind: Any, scratch: Any) -> Any:
    """A row in float32, as long as the scratch: where it lies if it is float32, else widened into the scratch."""
    width = scratch.size
    if kind == 0:
        return carray(pointer(address, np.float32(0)), (width,))
    if kind == 1:
        brain = carray(pointer(address, np.uint16(0)), (width,))
        for i in range(width):
            scratch[i] = widen(brain[i])
    else:
        half = carray(pointer(address, np.int16(0)), (width,))
        for i in range(width):
            scratch[i] = widen(half[i])
    return scratch


@jit
def add(address: Any, kind: Any, step: Any) -> None:
    """Add a float32 step to a row and round once."""
    width = step.size
    if kind == 0:
        full = carray(pointer(address, np.float32(0)), (width,))
        for i in range(width):
            full[i] += step[i]
    elif kind == 1:
        brain = carray(pointer(address, np.uint16(0)), (width,))
        for i in range(width):
            brain[i] = narrow(widen(brain[i]) + step[i], brain[i])
    else:
        half = carray(pointer(address, np.int16(0)), (width,))
        for i in range(width):
            half[i] = narrow(widen(half[i]) + step[i], half[i])


@jit
def write(address: Any, kind: Any, new: Any, old: Any) -> None:
    """Write a float32 row over the one it came from where their bits differ, so that a NaN that stays keeps its own."""
    width = new.size
    now, before = new.view(np.int32), old.view(np.int32)
    if kind == 1:
        brain = carray(pointer(address, np.uint16(0)), (width,))
        for i in range(width):
            if now[i] != before[i]:
                brain[i] = narrow(new[i], brain[i])
    elif kind == 2:
        half = carray(pointer(address, np.int16(0)), (width,))
        for i in range(width):
            if now[i] != before[i]:
                half[i] = narrow(new[i], half[i])


@jit
def length(values: Any) -> Any:
    """The norm of a row. Squares in float32: an overflow must be seen."""
    total = np.float32(0)
    for i in range(values.size):
        total += values[i] * values[i]
    return np.sqrt(total)


@jit
def dot(one: Any, other: Any) -> Any:
    """The product of two rows."""
    total = np.float32(0)
    for i in range(one.size):
        total += one[i] * other[i]
    return total


@jit
def copy(values: Any, into: Any) -> None:
    """Copy a row. Numba's slices would bring the text of their errors along: seconds of compiling."""
    for i in range(values.size):
        into[i] = values[i]


@jit
def least(one: Any, other: Any) -> Any:
    """The smaller of two numbers, NaN if either is."""
    return one if one < other or math.isnan(one) else other


@jit
def most(one: Any, other: Any) -> Any:
    """The larger of two numbers, NaN if either is."""
    return one if one > other or math.isnan(one) else other


@jit
def beyond(table: Any, which: Any, n_tokens: Any, n_slots: Any) -> Any:
    """Whether a token's slot is none of the bank's: the compiled functions look before they touch anything."""
    for t in range(n_tokens):
        slot = integer(table, which, t, FIRST)
        if slot < 0 or slot >= n_slots:
            return True
    return False
