"""Messages repeat a caller's value as the caller wrote it: JSON, and never much of it."""

from __future__ import annotations

import pytest

from steering.condition import When
from steering.errors import echo
from steering.program import Positions, Scope


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("word", "'word'"),
        (1.5, "1.5"),
        (True, "true"),
        ((1, 2), "[1, 2]"),
        ({"a": None}, '{"a": null}'),
        (Scope(Positions((1,)), "none"), '{"prompt": {"positions": [1]}, "generation": "none"}'),
        (
            When(concept="c", layer=1, above=0.0),
            '{"concept": "c", "layer": 1, "above": 0.0, "on": "prompt", "units": "',
        ),
        ({1, 2}, "{1, 2}"),
        ([object], "[<class 'object'>]"),
    ],
)
def test_a_value_is_told_as_json_has_it(value: object, told: str) -> None:
    assert echo(value).startswith(told)


def test_a_long_or_endless_value_is_cut() -> None:
    endless: list[object] = []
    endless.append(endless)
    assert len(echo("x" * 1000)) == 80
    assert echo(endless) == "[[...]]"
