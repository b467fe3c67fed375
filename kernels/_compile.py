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
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

try:
    import numba
    from llvmlite import ir
    from numba.core.caching import FunctionCache, IndexDataCacheFile
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
    _OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract"}}
    _SOURCES = sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()

    class _Kept(FunctionCache):
        """Compiled code on disk, under a name that tells the text of all kernels.

        Numba looks at a function's own file, but what it calls from another file of ours is compiled into it. And it
        writes its index before the code: who dies between the two, or finds the disk full, would leave an index of this
        text that names the code of an older one. What goes wrong with a file costs a compilation, never the call.
        """

        def __init__(self, function: Callable[..., Any]) -> None:
            super().__init__(function)
            name, stamp = f"{self._impl.filename_base}-{_SOURCES[:16]}", self._impl.locator.get_source_stamp()
            self._cache_file = IndexDataCacheFile(self._cache_path, name, stamp)

        def load_overload(self, *arguments: Any) -> Any:
            """The compiled code, or None."""
            with suppress(OSError, EOFError, ValueError, UnpicklingError):
                return super().load_overload(*arguments)

        def save_overload(self, *arguments: Any) -> None:
            """Keep it where there is room; an index that is damaged is begun anew."""
            with suppress(OSError):
                try:
                    super().save_overload(*arguments)
                except (EOFError, ValueError, UnpicklingError):
                    self.flush()
                    super().save_overload(*arguments)

    def _jit(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled: Callable[..., Any] = numba.njit(function, **_OPTIONS)
        # RuntimeError: no place to keep it, neither beside the source nor in a cache directory of the user
        with suppress(RuntimeError):
            compiled._cache = _Kept(function)  # type: ignore[attr-defined]  # as its enable_caching does
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
