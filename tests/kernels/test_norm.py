"""The norm with the law before it: its definition, what it promises, and its registration."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from kernels import _compile, bind_norm, feedback_, norm_
from kernels.norm import FORMS, Form, normed
from tests.kernels.cases import DTYPES, MUTATED, assert_same, clone, same_bits, tokens
from tests.kernels.interpreter import interpreted
from tests.kernels.norm_cases import EPS, SHAPES, assert_agrees, case, law_of, reading_itself, weights
from tests.tolerances import KERNELS

OPERATIONS = """
import re
from collections import Counter
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import _launch, _norm

FLOATS = {"size", "eps"}
INTEGERS = {"slot_t", "saturated"}
ROWS = {"out", "y", "x", "residual", "weight", "bias"}


def operations(kernel, dtype, **constants):
    kinds = {
        name: "constexpr" if name in constants
        else "*i32" if name in INTEGERS
        else "i32" if name in ("D", "E")
        else "fp32" if name in FLOATS
        else "i64" if "_" in name
        else f"*{dtype}" if name in ROWS
        else "*fp32"
        for name in kernel.arg_names
    }
    made = triton.compile(ASTSource(kernel, kinds, constants), target=GPUTarget("cuda", 90, 32)).asm  # H100, H200
    assert len(made["cubin"]) > 1000
    return Counter(re.findall(r"\\b(?:fma|mul|add|sub|div|sqrt|cvt)[.\\w]*[.]f32", made["ptx"]))


for dtype in ("bf16", "fp32"):
    law = {"R": 2, "UNROLL": 2, "BLOCK_D": 256, "FLOOR": 1e-38}
    is_layer = dtype == "fp32"
    form = {"BLOCK_E": 256, "OFFSET": 0.0, "CENTRED": is_layer, "BIASED": is_layer, "ROUNDS": not is_layer}
    alone = operations(_norm._norm_kernel, dtype, **form, ADDS=False)
    apart = alone + operations(_launch._feedback_kernel, dtype, BLOCK_E=256, **law)
    assert sum(alone.values()) > 10
    assert operations(_norm._law_norm_kernel, dtype, **form, **law, ADDS=False) == apart
    operations(_norm._norm_kernel, dtype, **form, ADDS=True)  # compiles
"""
"""Compiles the Triton kernels and counts what they compute."""

MODULES: dict[Form, type[nn.Module]] = {
    "rms": LlamaRMSNorm,
    "rms_wide": Olmo2RMSNorm,
    "rms_plus_one": Gemma2RMSNorm,
    "layer": nn.LayerNorm,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_formula(shape: tuple[int, int], dtype: torch.dtype, form: Form) -> None:
    y_TE, (weight_E, bias_E) = case(*shape, dtype)["y_TE"], weights(form, shape[1], dtype)
    before = y_TE.clone()
    out = norm_(y_TE, weight_E, bias_E, form, EPS[form])
    unit = KERNELS["float64" if dtype == torch.float64 else "float32"]
    assert_agrees(out, y_TE, weight_E, bias_E, form, KERNELS["stored"][str(dtype).removeprefix("torch.")], unit)
    assert out.is_contiguous()
    assert same_bits(y_TE, before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_modules_of_transformers(dtype: torch.dtype, form: Form) -> None:
    y_TE, (weight_E, bias_E) = case(40, 192, dtype)["y_TE"], weights(form, 192, dtype)
    module = MODULES[form](192, eps=EPS[form]).to(dtype)
    module.load_state_dict({"weight": weight_E} if bias_E is None else {"weight": weight_E, "bias": bias_E})
    with torch.no_grad():
        want = module(y_TE)
    out = norm_(y_TE, weight_E, bias_E, form, EPS[form])
    if dtype == torch.float32:
        torch.testing.assert_close(out, want, rtol=0, atol=KERNELS["float32"] * want.abs().amax().item())
    else:  # the sum's order may move a number across the middle between two
        assert (out == want).float().mean() > KERNELS["same_in_half"]


def test_weight_may_be_wider_than_the_rows() -> None:
    y_TE = case(5, 40, torch.bfloat16)["y_TE"]
    weight_E, _ = weights("rms_wide", 40, torch.float32)
    out = norm_(y_TE, weight_E, None, "rms_wide", 1e-5)
    assert_agrees(out, y_TE, weight_E, None, "rms_wide", KERNELS["stored"]["bfloat16"], KERNELS["float32"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("E", [17, 192, 4096])
def test_token_alone_equals_token_in_any_batch(E: int, dtype: torch.dtype, form: Form) -> None:
    y_TE, (weight_E, bias_E) = case(33, E, dtype)["y_TE"], weights(form, E, dtype)
    whole = norm_(y_TE, weight_E, bias_E, form, EPS[form])
    for start, stop in ((0, 1), (1, 3), (4, 9), (0, 32), (32, 33)):
        alone = norm_(y_TE[start:stop].clone(), weight_E, bias_E, form, EPS[form])
        assert same_bits(alone, whole[start:stop])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("itself", [True, False])
def test_law_and_norm_are_the_two_in_turn(itself: bool, dtype: torch.dtype, form: Form) -> None:
    args, (weight_E, bias_E) = case(9, 40, dtype, knees=True), weights(form, 40, dtype)
    residual_TE = case(9, 40, dtype, seed=1)["y_TE"]
    apart, fused = (reading_itself(args) if itself else clone(args) for _ in range(2))
    apart["y_TE"] += residual_TE
    feedback_(*apart.values())
    want = norm_(apart["y_TE"], weight_E, bias_E, form, EPS[form])
    out = norm_(fused["y_TE"], weight_E, bias_E, form, EPS[form], residual_TE, law_of(fused))
    assert same_bits(out, want)
    assert_same(fused, apart)
    assert not same_bits(fused["y_TE"], args["y_TE"] + residual_TE), "the law must act"


@pytest.mark.parametrize("slot", [0, 3])
def test_strength_zero_changes_no_bit_of_the_output(slot: int) -> None:
    args, (weight_E, _) = case(6, 40, torch.bfloat16), weights("rms", 40, torch.bfloat16)
    args["strength_TR"][:] = 0
    args["setpoint_TR"][:] = torch.inf
    args["slot_T"][:] = slot
    steered = clone(args)
    want = norm_(args["y_TE"], weight_E, None, "rms", 1e-6)
    assert same_bits(norm_(steered["y_TE"], weight_E, None, "rms", 1e-6, None, law_of(steered)), want)
    assert same_bits(steered["y_TE"], args["y_TE"])
    assert bool(steered["measured_TR"].any()) == bool(slot)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_finite_stays_visible_and_in_its_row(form: Form) -> None:
    y_TE, (weight_E, bias_E) = case(6, 40, torch.float32)["y_TE"], weights(form, 40, torch.float32)
    calm = norm_(y_TE, weight_E, bias_E, form, EPS[form])
    y_TE[1, 3], y_TE[3, 0], y_TE[4] = torch.nan, torch.inf, 0.0
    out = norm_(y_TE, weight_E, bias_E, form, EPS[form])
    assert torch.isnan(out[1]).all()
    assert torch.isnan(out[3]).any()
    assert torch.equal(out[4], torch.zeros(40) if bias_E is None else bias_E)
    assert same_bits(out[[0, 2, 5]], calm[[0, 2, 5]])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bound_norm_takes_rows_of_any_shape(dtype: torch.dtype, form: Form) -> None:
    weight_E, bias_E = weights(form, 16, dtype)
    bound = bind_norm(weight_E, bias_E, form, EPS[form])
    heads = case(24, 16, dtype)["y_TE"].contiguous().view(1, 6, 4, 16)
    want = norm_(heads.view(24, 16), weight_E, bias_E, form, EPS[form]).view(1, 6, 4, 16)
    assert same_bits(bound(heads), want)
    turned = bound(heads.transpose(1, 2))
    assert turned.stride() == heads.transpose(1, 2).stride()
    assert same_bits(turned, want.transpose(1, 2))
    assert same_bits(bound(heads[:, :, ::2]), want[:, :, ::2])
    assert same_bits(bound(heads[:, 1:, :1]), want[:, 1:, :1])
    assert bound(heads[:, :0]).shape == (1, 0, 4, 16)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(4, 16), (3, 4), (2, 12)])
def test_bound_norm_refuses_rows_of_another_width(shape: tuple[int, int], form: Form) -> None:
    weight_E, bias_E = weights(form, 8, torch.float32)
    with pytest.raises((ValueError, RuntimeError)):  # torch's own where numba is missing
        bind_norm(weight_E, bias_E, form, 1e-6)(torch.ones(shape))


@pytest.mark.parametrize("form", FORMS)
def test_without_numba_the_reference_serves(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    y_TE, (weight_E, bias_E) = case(5, 40, torch.float32)["y_TE"], weights(form, 40, torch.float32)
    monkeypatch.setattr(_compile, "jit", None)
    want = normed(y_TE, weight_E, bias_E, form, EPS[form])
    assert same_bits(norm_(y_TE, weight_E, bias_E, form, EPS[form]), want)
    assert same_bits(bind_norm(weight_E, bias_E, form, EPS[form])(y_TE[None])[0], want)


@pytest.mark.parametrize("with_law", [True, False])
def test_registration_passes_opcheck(with_law: bool) -> None:
    args, (weight_E, bias_E) = case(5, 16, torch.float32), weights("layer", 16, torch.float32)
    law = law_of(args) if with_law else []
    residual_TE = args["y_TE"].clone()
    operands = (args["y_TE"], weight_E, bias_E, "layer", 1e-5, residual_TE, law[:13], law[13:])
    torch.library.opcheck(torch.ops.setpoint.norm_.default, operands)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_E": torch.ones(15)}, "y, weight and bias must be"),
        ({"bias_E": torch.ones(16)}, "bias must be None"),
        ({"form": "batch"}, "form must be one of rms, rms_wide"),
        ({"residual_TE": torch.ones(4, 16)}, "residual must be as y"),
        ({"residual_TE": torch.ones(5, 16).bfloat16()}, "residual must be as y"),
        ({"y_TE": torch.ones(16, 5).mT}, "y_TE: rows must be contiguous"),
        ({"law": [torch.ones(1)]}, "law must be nothing or the 17 arguments"),
    ],
)
def test_wrong_argument_is_named(change: dict[str, object], message: str) -> None:
    right = {"y_TE": torch.ones(5, 16), "weight_E": torch.ones(16), "bias_E": None, "form": "rms", "eps": 1e-6}
    with pytest.raises(ValueError, match=message):
        norm_(**(right | change))  # type: ignore[arg-type]


def test_tokens_of_a_fused_launch_do_not_meet() -> None:
    args, (weight_E, _) = case(12, 192, torch.float32), weights("rms", 192, torch.float32)
    whole = clone(args)
    out = norm_(whole["y_TE"], weight_E, None, "rms", 1e-6, None, law_of(whole))
    for t in range(0, 12, 3):
        alone = tokens(args, t, t + 1)
        assert same_bits(norm_(alone["y_TE"], weight_E, None, "rms", 1e-6, None, law_of(alone)), out[t : t + 1])
        for name in MUTATED:
            assert same_bits(alone[name], whole[name][t : t + 1]), name


def test_triton_kernels_compute_the_same_in_one_launch_or_two(tmp_path: Path) -> None:
    """Compiled for a GPU on a machine that has none: Triton brings NVIDIA's assembler with it."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", OPERATIONS],
        cwd=Path(__file__).parents[2],
        env={**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_triton_kernels_in_the_interpreter() -> None:
    done = interpreted("triton_norm.py")
    assert done.returncode == 0, done.stdout + done.stderr
