"""How a CPU's kernels are compiled: by numba, at the first call with arguments of a type, kept on disk where one may.

A step on a CPU is many small operators, and an operator of torch costs a microsecond or more before it computes: the
law of a small batch in one compiled function takes 5 µs where ten torch operators take 100. Numba is optional: without
it `jit` is None and every operator runs its reference. Import this module where the first call is made, not at the top
of a module that defines an operator: importing numba takes longer than importing the rest of the package.

Rows reach a compiled function as float32, as uint16 (the bits of bfloat16) or as int16 (the bits of float16); `widen`
and `narrow` read and write all three, `kernels._memory` reaches them.
`fastmath` lets sums be reordered, which vectorises them, and nothing else: NaN and infinity must stay visible.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

try:
    import numba
    from llvmlite import ir
    from numba.extending import intrinsic
except ImportError:
    numba = None

jit: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
"""Decorator of a function that numba can compile; None where numba is missing."""

BITS: dict[torch.dtype, torch.dtype] = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.uint16,
    torch.float16: torch.int16,
}
"""The dtypes whose rows a compiled function takes, and as what."""


if numba is not None:
    _STAMP = sorted((path.name, path.stat().st_mtime_ns) for path in Path(__file__).parent.glob("_*.py"))
    _OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract"}}

    def _jit(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            compiled: Callable[..., Any] = numba.njit(function, cache=True, **_OPTIONS)
        except RuntimeError:  # no place to keep it: neither beside the source nor in a cache directory of the user
            return numba.njit(function, **_OPTIONS)
        # Numba looks at a function's own file, but what it calls from another file of ours is compiled into it.
        kept = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
        if kept is not None:
            kept._source_stamp = (kept._source_stamp, _STAMP)
        return compiled

    jit = _jit

    @intrinsic
    def widen(_: Any, value: Any) -> Any:
        """float32 of an element of rows: itself, or what its 16 bits say."""

        def generate(__: Any, builder: Any, ___: Any, arguments: Any) -> Any:
            if value == numba.uint16:
                wide = builder.shl(builder.zext(arguments[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
                return builder.bitcast(wide, ir.FloatType())
            if value == numba.int16:
                return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())
            return arguments[0]

        return numba.float32(value), generate

    @intrinsic
    def narrow(_: Any, wide: Any, like: Any) -> Any:
        """A float32 as an element of rows like the other argument, rounded to nearest, ties to even; NaN stays NaN."""

        def generate(__: Any, builder: Any, ___: Any, arguments: Any) -> Any:
            if like == numba.int16:
                return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))
            if like != numba.uint16:
                return arguments[0]
            word, half = ir.IntType(32), ir.IntType(16)
            bits = builder.bitcast(arguments[0], word)
            odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
            rounded = builder.add(bits, builder.add(odd, ir.Constant(word, 0x7FFF)))
            is_nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])
            kept = builder.select(is_nan, ir.Constant(word, 0x7FC00000), rounded)
            return builder.trunc(builder.lshr(kept, ir.Constant(word, 16)), half)

        return like(wide, like), generate
