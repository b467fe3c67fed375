"""Every Triton kernel compiles to machine code for a GPU, on a machine that has none.

Triton brings NVIDIA's assembler with it. What the interpreter cannot see is found here: types carried through loops and
branches, and what the language does not have.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import _attention, _edits, _launch, _norm, _sparse_linear

INTEGERS = {"slot_t", "channel", "count", "saturated", "index", "found", "table", "length"}
ROWS = {"y", "x", "residual", "weight", "bias", "out", "query", "key", "value"}


def compiled(kernel, dtype, **constants):
    kinds = {
        name: "constexpr" if name in constants
        else "*i32" if name in INTEGERS
        else "i32" if name in ("D", "E", "places", "stretches")
        else "fp32" if name in ("factor", "softcap", "size", "eps")
        else "i64" if "_" in name
        else f"*{dtype}" if name in ROWS
        else "*fp32"
        for name in kernel.arg_names
    }
    target = GPUTarget("cuda", 90, 32)  # H100, H200
    assert len(triton.compile(ASTSource(kernel, kinds, constants), target=target).asm["cubin"]) > 1000


compiled(_launch._feedback_kernel, "bf16", R=2, UNROLL=2, BLOCK_D=256, BLOCK_E=256, FLOOR=1e-38)
for kernel in (_edits._mask_kernel, _edits._turn_kernel):
    compiled(kernel, "bf16", M=2, E=192, BLOCK_E=256)
for rest in (0, 3):
    compiled(_edits._sparsify_kernel, "bf16", M=2, E=192, BLOCK_E=256, K=rest)
compiled(_sparse_linear._list_kernel, "bf16", D=2304, BLOCK=1024)
for bias in (True, False):
    compiled(_sparse_linear._columns_kernel, "bf16", HAS_BIAS=bias, BLOCK_N=64, BLOCK_E=32)
for dtype, single in (("bf16", False), ("fp32", True)):
    sizes = {"U": 96, "LENGTH": 256, "WINDOW": 0 if single else 512}
    tile = {"BLOCK_G": 16, "BLOCK_W": 128, "BLOCK_U": 128, "BLOCK_L": 32}
    compiled(
        _attention._stretch_kernel, dtype, G=4, W=128, P=16, SINGLE=single, CAPPED=single, WIDE=dtype == "fp32",
        **sizes, **tile,
    )
compiled(_attention._sum_kernel, "bf16", **sizes, ADDED=8, BLOCK_U=128)
law = {"R": 2, "UNROLL": 2, "BLOCK_D": 256, "FLOOR": 1e-38}
for form in ({"CENTRED": False, "ROUNDS": True, "OFFSET": 0.0}, {"CENTRED": True, "ROUNDS": False, "OFFSET": 1.0}):
    form |= {"BLOCK_E": 256, "ADDS": form["ROUNDS"], "BIASED": form["CENTRED"]}
    compiled(_norm._norm_kernel, "bf16", **form)
    compiled(_norm._law_norm_kernel, "bf16", **form, **law)
"""


def test_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        cwd=Path(__file__).parents[2],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
