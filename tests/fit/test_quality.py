"""A fit whose figures promise little says so, and says what to do."""

from __future__ import annotations

from typing import Any

import pytest

from steering.fit import warning

GOOD: dict[str, Any] = {"auroc": [0.5, 0.95], "split_half_cosine": [0.1, 0.8], "measured_on": "held-out"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"auroc": [0.4, 0.69]}, "tells the classes apart"),
        ({"split_half_cosine": [-0.9, 0.2]}, "point different ways"),
        ({"measured_on": "fitted"}, "ten or more"),
        ({"filled_context": 3}, "3 examples fill"),
    ],
)
def test_each_doubt_is_told(change: dict[str, Any], said: str) -> None:
    assert said in str(warning(GOOD | change))


def test_good_figures_are_passed_over() -> None:
    assert warning(GOOD) is None
