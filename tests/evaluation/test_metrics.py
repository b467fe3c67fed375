"""Figures against their slow definitions, and results that are always JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from steering.errors import SpecError
from steering.evaluation.conditions import METHODS, Condition, meters
from steering.evaluation.metrics import distinct, perplexity, wilson
from steering.evaluation.report import HEADER, markdown, rows, write
from steering.evaluation.suite import Cell, Suite, as_json, choose
from steering.plant.plant import Plant
from tests.plants import prompts, tiny
from tests.tolerances import CORE
from tests.toy import toy

# Perplexity


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_perplexity_is_the_loop_over_tokens(batch: int) -> None:
    plant = Plant(tiny("llama", layers=2))
    texts = prompts(6, seed=3)
    pairs = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts] + [(texts[0], [])]
    total, count = 0.0, 0
    for prompt, answer in pairs:
        for i, token in enumerate(answer):
            logits = plant.model(torch.tensor([[*prompt, *answer[:i]]])).logits[0, -1].double()
            total -= float(logits.log_softmax(-1)[token])
            count += 1
    found = perplexity(plant, pairs, batch=batch)
    assert found == pytest.approx(math.exp(total / count), rel=CORE["perplexity"])


def test_perplexity_of_nothing_is_nan() -> None:
    plant = Plant(tiny("llama", layers=1))
    assert math.isnan(perplexity(plant, []))
    assert math.isnan(perplexity(plant, [([1, 2], [])]))


# Distinct-n and the interval


def test_distinct() -> None:
    assert distinct(["a b a b", "a b"], 2) == 2 / 4
    assert distinct(["a b c", "d"], 1) == 1.0
    assert distinct(["a  b\na"], 1) == 2 / 3
    assert math.isnan(distinct(["a", ""], 2))
    assert math.isnan(distinct([], 1))


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=6), max_size=4), st.integers(1, 3))
def test_distinct_is_the_share_of_different_ngrams(words: list[list[str]], n: int) -> None:
    grams = [" ".join(text[i : i + n]) for text in words for i in range(len(text)) if i + n <= len(text)]
    found = distinct([" ".join(text) for text in words], n)
    assert (math.isnan(found) and not grams) or found == len(set(grams)) / len(grams)


@pytest.mark.parametrize(("hits", "trials"), [(0, 1), (1, 1), (0, 64), (3, 64), (32, 64), (64, 64), (999, 1000)])
def test_wilson_is_scipy_s(hits: int, trials: int) -> None:
    expected = binomtest(hits, trials).proportion_ci(0.95, "wilson")
    assert wilson(hits, trials) == pytest.approx((expected.low, expected.high), abs=CORE["interval"])


def test_wilson_knows_nothing_without_trials() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


# Choosing and reporting


CELL = Cell(
    concept="tone",
    method="lqr dense",
    kind="neutral",
    split="test",
    strength=1.5,
    chosen=True,
    n=4,
    effect=0.5,
    interval=(0.2, 0.8),
    effect_by_seed=[0.5],
    perplexity=3.14159265,
    perplexity_ratio=1.1,
    distinct_2=0.9,
    fluency=1.0,
    effort=0.1,
    tracking_mean=1.4,
    tracking_sd=0.1,
    tracking_error=0.1,
    failed=0,
    samples=["a | b"],
)


def candidate(strength: float, effect: float, ratio: float) -> Cell:
    return replace(CELL, strength=strength, effect=effect, perplexity_ratio=ratio)


@pytest.mark.parametrize(
    ("candidates", "strength"),
    [
        ([(1, 0.5, 1.0), (2, 0.9, 1.1), (3, 1.0, 1.2)], 2),  # the strongest is beyond the cap
        ([(1, 0.9, 1.1), (2, 0.9, 1.05)], 2),  # of equal effect the more fluent
        ([(1, 0.9, 1.15), (2, 0.1, 1.0)], 1),  # the cap itself is within it
        ([(1, 0.5, 3.0), (2, 0.9, 2.0)], 2),  # none is within it: the least perplexity
        ([(1, 0.5, math.nan), (2, 0.1, 2.0)], 2),
        ([(1, 0.5, math.nan), (2, 0.1, math.nan)], 1),
        ([(1, 1.0, math.nan), (2, 0.1, 1.0)], 2),
    ],
)
def test_choose(candidates: list[tuple[float, float, float]], strength: float) -> None:
    assert choose([candidate(*c) for c in candidates], 1.15).strength == strength


def test_json_has_no_nan_and_four_digits() -> None:
    broken = replace(CELL, perplexity=math.nan, interval=(math.inf, 0.123456), tracking_error=None)
    (data,) = as_json([broken])
    assert data["perplexity"] is None
    assert data["interval"] == [None, 0.1235]
    assert data["tracking_error"] is None
    assert as_json([CELL])[0]["perplexity"] == 3.142
    json.dumps(data, allow_nan=False)


def test_the_table_shows_test_cells_and_marks_the_chosen_strength() -> None:
    cells = [CELL, replace(CELL, chosen=False, strength=2.0), replace(CELL, split="tune"), replace(CELL, method="none")]
    table = rows(cells)
    assert [row[HEADER.index("strength")] for row in table] == ["1.5*", "2", "–"]
    assert all(len(row) == len(HEADER) for row in table)
    assert rows([replace(CELL, perplexity=math.nan)])[0][HEADER.index("ppl")] == "–"
    assert len(markdown(HEADER, rows(cells)).splitlines()) == 2 + 3


def test_results_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_plot(*_: object) -> Path:
        raise ImportError

    monkeypatch.setattr("steering.evaluation.report.plot", no_plot)
    cells = [replace(CELL, perplexity=math.nan), replace(CELL, split="tune")]
    paths = write(tmp_path / "new", cells, {"model": "m"})
    assert [path.name for path in paths] == ["eval.json", "eval.md"]
    data = json.loads(paths[0].read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert data["about"] == {"model": "m"}
    assert [cell["split"] for cell in data["cells"]] == ["test", "tune"]
    assert paths[1].read_text(encoding="utf-8") == markdown(HEADER, rows(cells))


def test_no_results_are_no_report(tmp_path: Path) -> None:
    with pytest.raises(SpecError):
        write(tmp_path, [], {})


# Conditions


@pytest.mark.parametrize("method", METHODS)
def test_every_condition_compiles(method: str) -> None:
    bench = toy().resident()
    gains = {**bench.tone.gains, "matrix_free": bench.tone.gains["dense"]}
    bench = replace(bench, tone=replace(bench.tone, gains=gains))
    for strength in METHODS[method]:
        program = Condition("tone", method, strength).program(bench)
        assert program.acts  # meters too: what does not act is not measured
        assert {route.read.layer for route in program.terms[0].gauges} == {1, 2, 3}


def test_meters_change_nothing() -> None:
    bench = toy().resident()
    term = meters(bench.tone)
    assert not any(law.gain.any() for law in term.laws.values())


def test_an_unknown_method_is_not_served_unsteered() -> None:
    with pytest.raises(SpecError) as caught:
        Condition("tone", "lqr sparse", 1.0).intervention()
    assert caught.value.param == "method"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"concepts": ("absent",)}, "concepts"),
        ({"concepts": ()}, "concepts"),
        ({"methods": ("none", "magic")}, "methods"),
        ({"methods": ("add",)}, "methods"),
        ({"tune_prompts": 0}, "tune_prompts"),
        ({"test_prompts": 0}, "test_prompts"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seeds": ()}, "seeds"),
    ],
)
def test_an_impossible_suite_is_refused_by_name(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as caught:
        Suite(**{"concepts": ("positive",), **changes})
    assert caught.value.param == param
