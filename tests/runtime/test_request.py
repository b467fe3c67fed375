"""A request is valid once it is made."""

from __future__ import annotations

import math

import pytest

from steering.errors import SpecError
from steering.runtime import Request, Sampling


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", True),
        ("max_tokens", 1.5),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 1.5),
        ("seed", 2**63),
        ("stop", ("",)),
        ("stop", tuple("abcde")),
        ("stop_token_ids", (-1,)),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {-1: 1.0}),
        ("min_tokens", 17),
        ("logprobs", 21),
        ("prompt_logprobs", 21),
        ("prompt_logprobs", True),
    ],
)
def test_an_impossible_value_names_its_field(field: str, value: object) -> None:
    with pytest.raises(SpecError) as error:
        Sampling(**{field: value})  # type: ignore[arg-type]
    assert error.value.param == field


def test_the_ends_of_each_range_are_allowed() -> None:
    Sampling(max_tokens=0, temperature=0, top_p=1, top_k=-1, min_p=1, seed=-(2**63), stop=tuple("abcd"), logprobs=20)
    Sampling(
        temperature=2,
        presence_penalty=-2,
        frequency_penalty=2,
        logit_bias={0: -100},
        min_tokens=16,
        logprobs=0,
        prompt_logprobs=20,
    )
    assert Sampling(temperature=0).is_greedy
    assert not Sampling(temperature=0.01).is_greedy


def test_a_prompt_has_a_token() -> None:
    with pytest.raises(SpecError, match="prompt"):
        Request("a", ())
