"""What steering costs is measured in pairs, on loads of any shape."""

from __future__ import annotations

import pytest

from steering.errors import SpecError
from steering.evaluation.speed import COLUMNS, Load, fit_times, lines, overhead, program
from steering.plant.plant import Plant
from tests.plants import tiny

PLANT = Plant(tiny("llama"))


def test_each_case_has_its_row() -> None:
    load = Load(batch=2, programs=(1, 5), interventions=(1, 3), prompt_tokens=4, max_tokens=4, repeats=2)
    heard: list[float] = []
    rows = overhead(PLANT, load, lambda _, done: heard.append(done))
    assert [(row.programs, row.interventions, row.requests) for row in rows] == [(1, 1, 2), (5, 1, 5), (2, 3, 2)]
    assert all(row.least <= row.ratio <= row.most and row.plain > 0 and row.steered > 0 for row in rows)
    assert heard[-1] == 1.0
    assert all(len(line) == len(COLUMNS) for line in lines(rows))


def test_a_program_is_that_of_its_seed() -> None:
    one = program(PLANT, 3, 2)
    assert (len(one.terms), one.rank) == (2, 2)
    assert one.shape == program(PLANT, 3, 2).shape != program(PLANT, 4, 2).shape
    assert one.acts


def test_both_kinds_of_gains_are_timed() -> None:
    times = fit_times(PLANT, prompts=2, length=4)
    assert set(times) == {"dense", "matrix_free"}
    assert all(seconds > 0 for seconds in times.values())


@pytest.mark.parametrize("field", ["batch", "prompt_tokens", "max_tokens", "repeats"])
def test_a_size_below_one_is_refused_by_name(field: str) -> None:
    with pytest.raises(SpecError) as caught:
        Load(**{field: 0})  # type: ignore[arg-type]
    assert caught.value.param == field
    with pytest.raises(SpecError):
        Load(programs=(1, 0))
