"""The Triton kernels of `paged_attention` against the sum over positions and against their own promises.

`test_attention.py` runs this file in Triton's interpreter, in a process of its own. On a machine with a GPU it runs the
compiled kernels: `python -m pytest tests/kernels/triton_attention.py`.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import paged_attention
from tests.kernels.attention_cases import LONG, SHAPES, assert_agrees, case, row
from tests.kernels.cases import DTYPES, same_bits

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from kernels import _attention  # noqa: E402

STORED = "stored_interpreted" if INTERPRETED else "stored"


def run(args: dict[str, Any]) -> Tensor:
    if INTERPRETED:
        return _attention.launch(**args)
    return paged_attention(**{k: v.cuda() if isinstance(v, Tensor) else v for k, v in args.items()}).cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, LONG])
def test_equals_the_sum_over_positions(shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    args = case(shape, dtype=dtype)
    assert_agrees(run(args), args, STORED)


@pytest.mark.parametrize("window", [1, 40, 300])
def test_window_over_several_stretches(window: int) -> None:
    args = case((*LONG[:7], 4.0, window))
    assert_agrees(run(args), args, STORED)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], LONG])
def test_row_alone_equals_row_in_any_batch_and_table(shape: tuple[Any, ...]) -> None:
    args = case(shape, dtype=torch.bfloat16)
    whole = run(args)
    for n in range(shape[0]):
        alone = row(args, n, n + 1)
        assert same_bits(run(alone), whole[n : n + 1])
        wide = torch.cat([alone["table_NM"], torch.full((1, 130), 10**6, dtype=torch.int32)], dim=1)
        assert same_bits(run({**alone, "table_NM": wide}), whole[n : n + 1])


def test_many_stretches_are_added_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_attention, "STRETCH", 32)
    args = case(LONG)
    assert_agrees(run(args), args, STORED)


def test_long_tables_have_longer_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_attention, "STRETCH", 16)
    monkeypatch.setattr(_attention, "MOST_STRETCHES", 3)
    args = case(LONG)
    assert_agrees(run(args), args, STORED)


@pytest.mark.parametrize("name", ["query_NHW", "key_BPKW", "value_BPKU"])
@pytest.mark.parametrize("shape", [SHAPES[1], (2, 2, 2, 16, 16, 16, (20, 300), 0.0, 0)])
def test_what_is_not_finite_stays_visible_and_in_its_row(shape: tuple[Any, ...], name: str) -> None:
    args = case(shape)
    calm = run(args)
    last = shape[0] - 1
    args[name][(last,) if name == "query_NHW" else (int(args["table_NM"][last, 1]), 3)] = torch.nan
    got = run(args)
    assert not torch.isfinite(got[last]).any()
    assert same_bits(got[:last], calm[:last])


def test_tanh_where_its_two_forms_meet() -> None:
    args = case((1, 4, 4, 16, 16, 16, (64,), 0.5, 0))
    args["scale"] = 0.0625 / 4  # |score / softcap| around 1/8
    assert_agrees(run(args), args, STORED)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_graph_serves_other_lengths() -> None:
    args = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in case(LONG, dtype=torch.bfloat16).items()}
    args["key_BPKW"].nan_to_num_()
    args["value_BPKU"].nan_to_num_()
    paged_attention(**args)  # compiled outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(**args)
    args["length_N"].copy_(torch.tensor([3, 600, 20]))
    graph.replay()
    assert same_bits(out.cpu(), paged_attention(**args).cpu())


def test_last_dimension_with_gaps_is_refused() -> None:
    args = case(SHAPES[1])
    args["value_BPKU"] = args["value_BPKU"].mT.contiguous().mT
    with pytest.raises(ValueError, match="last dimension"):
        run(args)
