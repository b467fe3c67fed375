"""Attention over blocks: its definition, what it never reads, its promises about neighbours, and its registration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels import _compile, paged_attention
from kernels.attention import reference
from tests.kernels.attention_cases import LONG, SHAPES, assert_agrees, case, row
from tests.kernels.cases import DTYPES, same_bits
from tests.kernels.interpreter import interpreted

ALL = [*DTYPES, torch.float64]


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, LONG])
def test_equals_the_sum_over_positions(shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    args = case(shape, dtype=dtype)
    assert_agrees(paged_attention(**args), args)


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_equals_the_sum_over_positions(shape: tuple[Any, ...]) -> None:
    args = case(shape)
    assert_agrees(reference(**args), args)


def test_reference_stands_in_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    args = case(SHAPES[1])
    monkeypatch.setattr(_compile, "jit", None)
    assert same_bits(paged_attention(**args), reference(**args))


def test_equals_attention_over_contiguous_rows() -> None:
    args = case((4, 6, 2, 32, 32, 16, (48, 48, 48, 48), 0.0, 0))
    keys, values = (args[name][args["table_NM"].long()].flatten(1, 2) for name in ("key_BPKW", "value_BPKU"))
    want = scaled_dot_product_attention(
        args["query_NHW"][:, :, None],
        keys[:, :48].transpose(1, 2).repeat_interleave(3, dim=1),
        values[:, :48].transpose(1, 2).repeat_interleave(3, dim=1),
        scale=args["scale"],
    )
    torch.testing.assert_close(paged_attention(**args), want.squeeze(2), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES[1:], LONG])
def test_row_alone_equals_row_in_any_batch_and_table(shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    args = case(shape, dtype=dtype)
    whole = paged_attention(**args)
    for n in range(shape[0]):
        alone = row(args, n, n + 1)
        assert same_bits(paged_attention(**alone), whole[n : n + 1])
        used = -(-int(alone["length_N"]) // shape[5])
        assert same_bits(paged_attention(**{**alone, "table_NM": alone["table_NM"][:, :used]}), whole[n : n + 1])


def test_it_does_not_matter_where_a_block_lies() -> None:
    args = case(SHAPES[2])
    order_B = torch.randperm(len(args["key_BPKW"]), generator=torch.Generator().manual_seed(1))
    moved = {**args, "table_NM": order_B.argsort()[args["table_NM"].long()].int()}
    for name in ("key_BPKW", "value_BPKU"):
        moved[name] = args[name][order_B]
    assert same_bits(paged_attention(**moved), paged_attention(**args))


def test_memory_layout_does_not_matter() -> None:
    args = case(SHAPES[2])
    plain = paged_attention(**args)
    both = torch.cat([args["key_BPKW"], args["value_BPKU"]], dim=3)
    N, M = args["table_NM"].shape
    wide = torch.full((N, M + 3), 10**6, dtype=torch.int32)
    wide[:, :M] = args["table_NM"]
    apart = {
        **args,
        "query_NHW": args["query_NHW"].transpose(0, 1).contiguous().transpose(0, 1),
        "key_BPKW": both[..., :24],
        "value_BPKU": both[..., 24:],
        "table_NM": wide[:, :M],
        "length_N": args["length_N"].repeat_interleave(2)[::2],
    }
    assert not apart["query_NHW"].is_contiguous()
    assert same_bits(paged_attention(**apart), plain)


def test_window_is_a_shorter_sequence() -> None:
    args = case((2, 4, 2, 16, 16, 4, (21, 9), 0.0, 0))
    cut = {**args, "table_NM": args["table_NM"][:, 2:], "length_N": args["length_N"] - 8}
    torch.testing.assert_close(
        paged_attention(**{**args, "window": 13})[0], paged_attention(**cut)[0], rtol=1e-6, atol=1e-6
    )
    assert same_bits(paged_attention(**{**args, "window": 21}), paged_attention(**args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_is_a_mean_of_the_values(dtype: torch.dtype) -> None:
    args = case(SHAPES[1], dtype=dtype)
    args["value_BPKU"][:] = 1.5
    assert (paged_attention(**args)[1:] - 1.5).abs().max() <= 2**-8 * (dtype != torch.float32) + 1e-6
    args["key_BPKW"][:] = 0.0
    args["value_BPKU"][:] = torch.randn(args["value_BPKU"].shape).to(dtype)
    first = args["value_BPKU"][args["table_NM"][3].long()].flatten(0, 1)[:17]
    got = paged_attention(**args)[3]
    torch.testing.assert_close(got.float(), first.float().mean(0), rtol=2**-8, atol=1e-6)


def test_immense_scores_choose_one_key() -> None:
    args = case((1, 1, 1, 16, 16, 16, (40,), 0.0, 0))
    args["scale"] = 1e6
    keys, values = (args[name][args["table_NM"][0].long()].flatten(0, 1)[:40, 0] for name in ("key_BPKW", "value_BPKU"))
    best = int((keys @ args["query_NHW"][0, 0]).argmax())
    assert same_bits(paged_attention(**args)[0, 0], values[best])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["query_NHW", "key_BPKW", "value_BPKU"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_visible_and_in_its_row(name: str, value: float, dtype: torch.dtype) -> None:
    args = case(SHAPES[1], dtype=dtype)
    calm = paged_attention(**args)
    at = (4,) if name == "query_NHW" else (int(args["table_NM"][4, 1]), 3)
    args[name][at] = value
    got = paged_attention(**args)
    assert not torch.isfinite(got[4]).any()
    assert same_bits(got[:4], calm[:4])


def test_neither_rows_nor_blocks_are_needed() -> None:
    args = case(SHAPES[1])
    assert paged_attention(**row(args, 0, 0)).shape == (0, 3, 32)
    empty = {**row(args, 0, 1), "table_NM": args["table_NM"][:1, :0]}
    assert not paged_attention(**empty).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("length", [-1, 97])
def test_length_beyond_the_table_is_refused(length: int, dtype: torch.dtype) -> None:
    args = case(SHAPES[1], dtype=dtype)
    args["length_N"][2] = length
    with pytest.raises(IndexError, match=f"length {length} is not in 0 to 96"):
        paged_attention(**args)


@pytest.mark.parametrize("block", [-1, 32])
def test_block_beyond_the_pool_is_refused_where_it_is_used(block: int) -> None:
    args = case(SHAPES[1])
    args["table_NM"][4, 5] = block
    assert_agrees(paged_attention(**args), args)
    args["table_NM"][4, 2] = block
    with pytest.raises(IndexError, match="a block of row 4 is not in 0 to 31"):
        paged_attention(**args)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("query_NHW", lambda v: v[:, :2], "K a divisor of 2"),
        ("query_NHW", lambda v: v[0], r"must be \(N, H, W\)"),
        ("query_NHW", lambda v: v.bfloat16(), "one dtype"),
        ("query_NHW", lambda v: v.mT.contiguous().mT, "last dimension"),
        ("key_BPKW", lambda v: v[..., :-1], "key and value must be"),
        ("key_BPKW", lambda v: v[:, :-1], "key and value must be"),
        ("value_BPKU", lambda v: v[:-1], "key and value must be"),
        ("table_NM", lambda v: v[:-1], "table and length must be"),
        ("table_NM", lambda v: v.long(), "int32"),
        ("length_N", lambda v: v[:-1], "table and length must be"),
        ("softcap", lambda _: -1.0, "softcap and window"),
        ("window", lambda _: -1, "softcap and window"),
    ],
)
def test_wrong_argument_is_named(name: str, wrong: Any, message: str) -> None:
    args = case(SHAPES[1])
    args[name] = wrong(args[name])
    with pytest.raises(ValueError, match=message):
        paged_attention(**args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_registration_passes_opcheck(dtype: torch.dtype) -> None:
    args: tuple[Tensor, ...] = tuple(case(SHAPES[2], dtype=dtype).values())
    torch.library.opcheck(torch.ops.setpoint.paged_attention.default, args)


def test_triton_kernels_in_the_interpreter() -> None:
    done = interpreted("triton_attention.py")
    assert done.returncode == 0, done.stdout + done.stderr
