"""Vectors that travel in the request are added as they are, and bytes that are no such vector are refused by field."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
import torch

from steering.errors import SpecError
from steering.methods import Add
from steering.methods.inline import InlineTensor, encoded
from steering.types import across
from tests.toy import toy

BENCH = toy(depth=4, width=6).resident()
VECTOR = torch.tensor([1.5, -2.0, 0.25, 0.0, 3.0, -0.5])


def inline(vector: torch.Tensor = VECTOR, **changes: Any) -> InlineTensor:
    return InlineTensor(**{**encoded(vector), "shape": tuple(vector.shape), **changes})


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_every_format_carries_the_numbers(dtype: str) -> None:
    if dtype == "bfloat16":
        raw = VECTOR.to(torch.bfloat16).view(torch.int16).numpy().astype("<i2").tobytes()
    else:
        raw = VECTOR.numpy().astype(np.dtype(dtype).newbyteorder("<")).tobytes()
    one = InlineTensor(dtype=dtype, shape=(6,), data=base64.b64encode(raw).decode())  # type: ignore[arg-type]
    assert torch.equal(one.tensor(), VECTOR)


def test_each_vector_is_added_at_its_block_s_output_and_not_shared_out() -> None:
    term = Add(inline={"layer.1": inline(), "layer.3": inline(2 * VECTOR)}, strength=0.5).compile(BENCH)
    assert set(term.laws) == {across(1), across(3)}
    x = torch.randn(3, 6)
    for layer, factor in ((1, 0.5), (3, 1.0)):
        torch.testing.assert_close(term.laws[across(layer)](x, x), x + factor * VECTOR)
    only = Add(inline={"layer.1": inline(), "layer.3": inline()}, layers=(3,)).compile(BENCH)
    assert set(only.laws) == {across(3)}


@pytest.mark.parametrize(
    ("vectors", "param"),
    [
        ({}, "inline"),
        ({"layer.4": inline()}, "inline.layer.4"),
        ({"layer.-1": inline()}, "inline.layer.-1"),
        ({"4": inline()}, "inline.4"),
        ({"layer.1": inline(VECTOR[:5])}, "inline.layer.1.shape"),
        ({"layer.1": inline(data="AAAA")}, "inline.layer.1.data"),
        ({"layer.1": inline(data="not base64!")}, "inline.layer.1.data"),
        ({"layer.1": inline(VECTOR * float("nan"))}, "inline.layer.1.data"),
        ({"layer.1": inline(0 * VECTOR)}, "inline"),
    ],
)
def test_what_is_no_vector_of_the_model_is_refused(vectors: Any, param: str) -> None:
    with pytest.raises(SpecError) as refused:
        Add(inline=vectors).compile(BENCH)
    assert refused.value.param == param


@pytest.mark.parametrize("shape", [(), (0,), (2**23,), (1, 1, 1, 1, 1)])
def test_impossible_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SpecError, match="shape"):
        inline(shape=shape)


def test_a_concept_or_vectors_but_not_both_nor_neither() -> None:
    for given in ({}, {"concept": "tone", "inline": {"layer.1": inline()}}):
        with pytest.raises(SpecError, match="either concept or inline"):
            Add(**given)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="layers that inline has"):
        Add(inline={"layer.1": inline()}, layers=(1, 2)).compile(BENCH)
