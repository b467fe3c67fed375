"""The parity table says what it should: every row on the vLLM engine is the native engine's, and the page holds it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from benchmarks import parity, tables
from steering import Finished, SteeringError
from steering.evaluation.entries import ENTRIES
from steering.runtime import Usage


def end(text: str, error: SteeringError | None = None) -> Finished:
    return Finished("a", "error" if error else "length", text, tuple(map(ord, text)), Usage(1, len(text)), error=error)


def test_every_answer_that_was_measured_is_the_native_engines() -> None:
    found: dict[str, Any] = json.loads((tables.RESULTS / "parity.json").read_text(encoding="utf-8"))
    rows = found["rows"]
    assert {entry.name for entry in ENTRIES} | {name for name, _ in parity.extras()} < rows.keys()
    for name, row in rows.items():
        assert row["transformers"].get("same") == 1.0, name
        assert (row["transformers"]["receipt"] or 0) < 1e-3, name
        assert row["vllm"].get("same", 1.0) == 1.0, name
        if "refused" in row["vllm"]:
            assert "--model-impl transformers" in row["vllm"]["refused"], name
    assert sum("same" in row["vllm"] for row in rows.values()) >= 24


def test_the_page_is_what_the_result_says() -> None:
    page = tables.VLLM.read_text(encoding="utf-8")
    assert tables.MARKED.search(page)
    assert tables.filled(page, tables.RESULTS) == page, "run python -m benchmarks.tables"


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ({"a": 1.0, "b": [2.0, 3]}, {"a": 1.5, "b": [2.0, 3]}, 0.5),
        ({"a": 100.0}, {"a": 101.0}, 0.01),
        ({"a": [1.0]}, {"a": [1.0, 1.0]}, math.inf),
        ({"a": 1.0}, {"b": 1.0}, math.inf),
        ({"n": 3}, {"n": 4}, math.inf),
        ({"n": None}, {"n": None}, 0.0),
    ],
    ids=str,
)
def test_the_distance_of_receipts(one: Any, other: Any, expected: float) -> None:
    assert parity.distance(one, other) == pytest.approx(expected)


def test_a_row_that_differs_fails_or_is_refused_is_told_as_such() -> None:
    assert parity.compared([end("ab"), end("ab")], [end("ab"), end("ac")])["same"] == 0.5
    assert parity.compared("why", [end("a")]) == {"refused": "why"}
    assert parity.compared([end("", SteeringError("lost"))], [end("a")]) == {"failed": "lost"}
    body = {"rows": {"x": {"method": "m", "vllm": {"failed": "lost"}, "transformers": {"same": 0.5, "receipt": None}}}}
    told = tables.parity(body | {"versions": {}, "prompts": 1, "tokens": 1, "command": "c"})
    assert "| x | m | failed: lost | 50 % |" in told
